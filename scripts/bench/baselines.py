"""What carries the same bytes without keeping, checking or understanding them: the price of everything else.

Each runs in processes of its own, started with `python -c` and the text below: it needs zmq, whose home is the
transport, and multiprocessing and redis, which nothing of ours imports (pickle would run a peer's code).
"""

import asyncio
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from scripts.bench.traffic import CHUNK_TOKENS, Interval, num_rows
from stream_rl import wire
from stream_rl.errors import StreamRLError

_SCRIPT = r"""
import json, multiprocessing, os, subprocess, sys, tempfile, time
import msgspec

kind, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
messages = msgspec.msgpack.decode(open(path, "rb").read())
fork = multiprocessing.get_context("fork")


def feed(put):
    # Until the time is over, two at least, and then an empty message.
    end, i = time.monotonic() + seconds, 0
    while i < 2 or time.monotonic() < end:
        put(messages[i % len(messages)])
        i += 1
    put([b""])


def drain(get):
    # The clock starts when the first message is here.
    get()
    began, count = time.monotonic(), 0
    while get() != [b""]:
        count += 1
    return count, time.monotonic() - began


def zmq_produce(ports):
    import zmq
    context = zmq.Context()
    with context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, 2048)
        socket.connect(f"tcp://127.0.0.1:{ports.recv()}")
        feed(socket.send_multipart)
    context.term()


def zmq_push_pull():
    near, far = fork.Pipe()
    producer = fork.Process(target=zmq_produce, args=(far,))
    producer.start()
    import zmq
    socket = zmq.Context().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 2048)
    near.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    return drain(socket.recv_multipart)


def multiprocessing_queue():
    queue = fork.Queue(2048)
    fork.Process(target=lambda: feed(queue.put)).start()
    return drain(queue.get)


def redis_streams():
    # Each message one entry, as durable as our queue: the server syncs its file before it answers.
    import redis
    directory = tempfile.mkdtemp(dir=os.path.dirname(path))
    socket = os.path.join(directory, "socket")
    server = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", socket, "--dir", directory,
        "--save", "", "--appendonly", "yes", "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    try:
        reader = redis.Redis(unix_socket_path=socket, retry_on_error=[redis.exceptions.ConnectionError],
            retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200))
        reader.ping()
        fork.Process(target=redis_produce, args=(socket,)).start()
        entries = redis_entries(reader)
        return drain(lambda: next(entries))
    finally:
        server.terminate()
        server.wait()


def redis_produce(socket):
    import redis
    pipe, waiting = redis.Redis(unix_socket_path=socket).pipeline(transaction=False), 0

    def put(frames):
        nonlocal waiting
        pipe.xadd("s", dict(enumerate(frames)), maxlen=4096, approximate=True)
        waiting += 1
        if waiting == 16 or frames == [b""]:
            pipe.execute()
            waiting = 0

    feed(put)


def redis_entries(reader):
    last = "0"
    while True:
        for _, entries in reader.xread({"s": last}, count=64, block=10_000):
            for last, fields in entries:
                yield list(fields.values())


count, took = globals()[kind]()
print(json.dumps({"messages": count, "seconds": took}))
"""

KINDS = ("zmq_push_pull", "multiprocessing_queue", "redis_streams")
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """Messages as frames in a file, to be sent round and round."""

    path: pathlib.Path
    tokens: int
    messages: int

    @classmethod
    def write(cls, intervals: Sequence[Interval], path: pathlib.Path) -> "Recorded":
        messages = [[bytes(frame) for frame in wire.encode(interval.chunks)] for interval in intervals]
        path.write_bytes(msgspec.msgpack.encode(messages))
        return cls(path, CHUNK_TOKENS * num_rows(intervals), len(intervals))


def missing(kind: str) -> str:
    """Why a baseline cannot run here, or ""."""
    if kind != "redis_streams":
        return ""
    absent = [] if shutil.which("redis-server") else ["redis-server"]
    absent += [] if importlib.util.find_spec("redis") else ["the package redis"]
    return f"not installed: {', '.join(absent)}" if absent else ""


async def run(kind: str, recorded: Recorded, seconds: float) -> float:
    """Tokens a second, received."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SCRIPT, kind, str(recorded.path), str(seconds), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds + TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise StreamRLError(f"the baseline {kind} did not end {TIMEOUT_S:.0f} s after its time") from None
    if process.returncode:
        raise StreamRLError(f"the baseline {kind} ended with status {process.returncode}; its error is above")
    result = json.loads(output)
    return float(recorded.tokens / recorded.messages * result["messages"] / result["seconds"])
