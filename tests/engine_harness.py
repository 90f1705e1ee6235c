"""One real SGLang server with the plugin and one real publisher; the test plays the queue and the learner."""

import asyncio
import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import aiohttp
import numpy as np
import torch
from update_builders import FlatBits, dtypes_of, flat

from engines.weights.chain import differences
from engines.weights.codes import payload
from engines.weights.codes.payload import Code
from engines.weights.parts import Line, cut, dense_pieces
from stream_rl import config
from stream_rl.messages import (
    Ack,
    Chunks,
    EngineStats,
    EngineVerified,
    Hello,
    LearnerDone,
    Refused,
    UpdatePart,
    VersionOffer,
    VersionReport,
    VersionTaken,
    VersionWanted,
    Welcome,
)
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

RUN = "harness"
T = TypeVar("T")


class Stream:
    """What the queue has seen of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[Version] = []
        self.chunks = 0
        self.finish = ""


class EngineHarness:
    """Starts and stops everything; methods are called from the test's thread."""

    def __init__(self, directory: pathlib.Path, model: pathlib.Path, **sglang: Any) -> None:
        self.directory = directory
        self.streams: dict[str, Stream] = defaultdict(Stream)
        self.reports: list[VersionReport] = []
        self.verified: list[EngineVerified] = []
        self.stats: EngineStats | None = None
        self.stats_seen = 0
        self.problems: Counter[str] = Counter()
        self.answer_acks = True
        self._published: tuple[Version, FlatBits] | None = None
        """What the publisher was handed last."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.recipe = config.Recipe(
            run=config.Run(name="harness", steps=1, directory=str(directory)),
            model=config.Model(path=str(model)),
            task=config.TaskChoice(use="none:None"),
            queue=config.Queue(min_tokens=1, max_tokens=1),
            engine=config.Engine(chunk_tokens=5, chunk_seconds=0.2, resend_seconds=0.5),
            weights=config.Weights(verify_every=0, part_bytes=100_000),
            sglang={
                "device": "cpu",
                "attention_backend": "torch_native",
                "dtype": "float32",
                "skip_tokenizer_init": True,
                "max_total_tokens": 20000,
                "max_running_requests": 32,
                "sleep_on_idle": True,
                **sglang,
            },
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._tasks: list[concurrent.futures.Future[Any]] = []

    def call(self, work: Coroutine[Any, Any, T], timeout: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def start(self) -> None:
        payload.prepare()
        recipe = self.directory / "recipe.toml"
        config.dump(self.recipe, recipe)
        queue_address = self.call(self._open_queue())
        self._tasks.append(asyncio.run_coroutine_threadsafe(self._serve_queue(), self._loop))
        publisher = self._spawn("publisher", "engines.weights.publisher", str(recipe), "--queue", queue_address)
        self.publisher_address = publisher["address"]
        self._learner = self.call(self._connect_learner())
        engine = self._spawn(
            "engine", "engines.sglang.server", str(recipe), "--name", "engine-0", "--queue", queue_address,
            "--publisher", self.publisher_address,
        )  # fmt: skip
        self.http = engine["address"]

    def _spawn(self, name: str, module: str, *arguments: str) -> dict[str, Any]:
        import json

        read, write = os.pipe()
        log = (self.directory / f"{name}.log").open("wb")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["OMP_NUM_THREADS"] = "1"
        command = [
            sys.executable,
            "-m",
            module,
            *arguments,
            "--run-id",
            RUN,
            *(() if "--incarnation" in arguments else ("--incarnation", "1")),
            "--ready-fd",
            str(write),
        ]
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[write], start_new_session=True, env=environment
        )
        self.processes.append(process)
        os.close(write)
        with os.fdopen(read) as pipe:
            line = pipe.readline()
        if not line:
            raise RuntimeError(f"{name} did not start:\n{(self.directory / f'{name}.log').read_text()[-3000:]}")
        return dict(json.loads(line))

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for task in self._tasks:
            task.cancel()
        self.call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _close(self) -> None:
        await asyncio.sleep(0.05)
        self._learner.close()
        self._router.close()

    async def _open_queue(self) -> str:
        self._router = Router.bind("tcp://127.0.0.1:0")
        return self._router.address

    async def _connect_learner(self) -> Dealer:
        return Dealer.connect(self.publisher_address, "learner-0")

    async def _serve_queue(self) -> None:
        next_sequence = 0
        while True:
            peer, message = await self._router.receive()
            match message:
                case Hello():
                    taken = next_sequence if message.role == "engine" else 0
                    await self._router.send(peer, Welcome(run=RUN, next_sequence=taken))
                case Chunks():
                    if not self.answer_acks:
                        self.problems["unanswered"] += 1
                        continue
                    if message.sequence == next_sequence:
                        next_sequence += 1
                        self._take(message)
                    elif message.sequence > next_sequence:
                        self.problems["gap"] += 1
                    resend = message.sequence > next_sequence
                    await self._router.send(peer, Ack(next_sequence=next_sequence, resend=resend))
                case EngineStats():
                    self.stats = message
                    self.stats_seen += 1
                case VersionReport():
                    self.reports.append(message)
                case EngineVerified():
                    self.verified.append(message)

    def _take(self, chunks: Chunks) -> None:
        offset = 0
        for i, rid in enumerate(chunks.rids):
            stream, count = self.streams[rid], int(chunks.counts[i])
            if stream.finish or chunks.starts[i] != len(stream.token_ids):
                self.problems["out of order"] += 1
            stream.token_ids += chunks.token_ids[offset : offset + count].tolist()
            stream.logprobs += chunks.logprobs[offset : offset + count].tolist()
            for _, history, step, n in chunks.spans[chunks.spans[:, 0] == i].tolist():
                stream.versions += [Version(history, step)] * n
            stream.chunks += 1
            stream.finish = chunks.finishes[i]
            offset += count

    # -- what tests do ---------------------------------------------------------------------------------------

    def publish(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Play the learner: hand a version to the publisher, as what changed against the one before."""
        named = {name: tensor.detach().cpu() for name, tensor in tensors}
        bits, dtypes = flat(named), dtypes_of(named)
        base, old = self._published or (version, bits)
        self._published = version, bits

        async def send() -> None:
            await self._learner.send(VersionOffer(base=base, target=version))
            answer = await self._learner.receive(30)
            assert isinstance(answer, VersionWanted) and answer.anchor == (base == version)
            for part in self._parts(Line(RUN, base, version, answer.anchor), old, bits, dtypes):
                await self._learner.send(part)
            assert isinstance(await self._learner.receive(30), VersionTaken)

        self.call(send())

    def _parts(self, line: Line, old: FlatBits, new: FlatBits, dtypes: dict[str, torch.dtype]) -> list[UpdatePart]:
        pieces = differences(old, new, dtypes)
        if line.anchor:
            pieces = [piece for name, bits in new.items() for piece in dense_pieces(name, dtypes[name], bits)]
        return cut(pieces, line, Code.FAST, self.recipe.weights.part_bytes)

    def refuse_engine(self, reason: str) -> None:
        """Play a queue that knows of a newer incarnation."""
        self.call(self._router.send(b"engine-0@1", Refused(reason=reason, detail="played by the harness")))

    def learner_done(self, version: Version) -> None:
        self.call(self._learner.send(LearnerDone(final=version, weights_hash="")))

    async def generate(
        self, rid: str | None, prompt: list[int], max_new_tokens: int, **sampling: Any
    ) -> dict[str, Any]:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 1.0, "ignore_eos": True, **sampling},
            "return_logprob": True,
        }
        if rid is not None:
            body["rid"] = rid
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session,
            session.post(f"{self.http}/generate", json=body) as response,
        ):
            answer: dict[str, Any] = await response.json()
            return answer

    async def post(self, path: str, **body: Any) -> Any:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            session.post(self.http + path, json=body) as response,
        ):
            return await response.text()

    def start_many(self, requests: list[Coroutine[Any, Any, T]]) -> "concurrent.futures.Future[list[T]]":
        async def all_of_them() -> list[T]:
            return await asyncio.gather(*requests)

        return asyncio.run_coroutine_threadsafe(all_of_them(), self._loop)

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Tests may poll; loops of the product may not."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited {timeout} s for {what}"
            time.sleep(0.002)

    def streamed(self) -> dict[str, Stream]:
        """What has streamed so far. The queue's thread adds to `streams` at any time, so nothing may loop over it."""
        return dict(self.streams)

    def fresh_stats(self) -> EngineStats:
        """Counters that were read after this call; they come twice a second."""
        seen = self.stats_seen
        self.wait(lambda: self.stats_seen >= seen + 2, "the engine's counters")
        assert self.stats is not None
        return self.stats

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in self.directory.glob("*.log"))


def logprob_gap(left: list[float], right: list[float]) -> float:
    return float(np.abs(np.array(left) - np.array(right)).max())
