"""The sandbox's process 1: runs programs and moves files, as it is told through its standard input.

Started by engines/sandbox/box.py within bubblewrap, as a file of its own: it imports the standard library only.  As
process 1 of its namespace it cannot be killed from within, and everything in the namespace ends with it.

    request   {"op": "run", "argv", "seconds", "output_bytes", "environment", "directory"} and the program's stdin
              {"op": "write", "path", "executable"} and the file's bytes
              {"op": "read", "path", "limit"}
    reply     {"exit", "ended", "seconds", "dropped_bytes", "stdout": size of} and stdout, stderr; or {"error"}
Each is the length of a JSON header, the header with `size`, and that many bytes.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import selectors
import signal
import stat
import struct
import sys
import time
import warnings  # noqa: F401 - os.execvpe imports it, as a user who may not be able to read it
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]
Move = Callable[[Header, bytes], tuple[Header, bytes]]
PR_SET_DUMPABLE = 4
SAMPLE_SECONDS = 0.02
"""Between two looks at how much memory all processes have: a core can take 30 MB in this time."""
PIPE_BYTES = 1 << 16
NOT_STARTED = 127
LENGTH = struct.Struct(">I")
EVERYONE = -1


def serve(settings: Header) -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while length := source.read(LENGTH.size):
        request = json.loads(source.read(LENGTH.unpack(length)[0]))
        payload = source.read(request["size"])
        if request["op"] == "run":
            reply, data = run(request, payload, settings)
        else:
            reply, data = in_child(move, request, payload, settings)
        header = json.dumps(reply | {"size": len(data)}).encode()
        sink.write(LENGTH.pack(len(header)) + header + data)
        sink.flush()


def run(request: Header, stdin: bytes, settings: Header) -> tuple[Header, bytes]:
    """Start a program, hear it out, and leave nobody alive."""
    began = time.monotonic()
    ours_in, ours_out, ours_err = (os.pipe() for _ in range(3))
    child = os.fork()
    if not child:
        become(request, settings, (ours_in[0], ours_out[1], ours_err[1]))
    for end in (ours_in[0], ours_out[1], ours_err[1]):
        os.close(end)
    writing, outputs = ours_in[1], {ours_out[0]: bytearray(), ours_err[0]: bytearray()}
    for end in (writing, *outputs):
        os.set_blocking(end, False)
    watch = selectors.DefaultSelector()
    watch.register(writing, selectors.EVENT_WRITE)
    gone = os.pidfd_open(child)
    for end in (gone, *outputs):
        watch.register(end, selectors.EVENT_READ)
    dropped, fed, status, ended = 0, 0, None, "exit"
    deadline, look = began + request["seconds"], began
    # of more, a program may still take away
    most_files = max(settings["files"], files(settings["directories"]))
    while True:
        for key, _ in watch.select(SAMPLE_SECONDS):
            if key.fd == gone:
                continue
            if key.fd == writing:
                fed += feed(writing, stdin, fed)
                if fed >= len(stdin):
                    watch.unregister(writing)
                    os.close(writing)
                    writing = -1
            elif not (got := drain(key.fd, outputs[key.fd], request["output_bytes"])):
                watch.unregister(key.fd)
            else:
                dropped += got[0]
        status, now = reap(child), time.monotonic()
        if status is not None:
            break
        if now > deadline:
            ended = "timeout"
            break
        if now > look:
            look = now + SAMPLE_SECONDS
            if over := passed(settings, most_files):
                ended = over
                break
    status = end_everyone(child, status)
    for end, kept in outputs.items():  # what is still in the pipes; their writers are gone
        while got := drain(end, kept, request["output_bytes"]):
            dropped += got[0]
        os.close(end)
    for end in (gone, writing):
        if end >= 0:
            os.close(end)
    watch.close()
    out, err = outputs.values()
    reply = {"exit": os.waitstatus_to_exitcode(status), "ended": ended, "dropped_bytes": dropped, "stdout": len(out)}
    return reply | {"seconds": time.monotonic() - began}, bytes(out + err)


def feed(end: int, stdin: bytes, fed: int) -> int:
    """How many more bytes the program took; all of them if it closed its end."""
    try:
        return os.write(end, stdin[fed : fed + PIPE_BYTES]) if fed < len(stdin) else 0
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(stdin)


def drain(end: int, kept: bytearray, most: int) -> tuple[int] | None:
    """Read once; how many bytes were over the limit, or None at the end (or, if the writers are gone, when empty)."""
    try:
        data = os.read(end, PIPE_BYTES)
    except BlockingIOError:
        return None
    if not data:
        return None
    room = max(0, most - len(kept))
    kept += data[:room]
    return (len(data) - min(room, len(data)),)


def reap(child: int) -> int | None:
    """Bury who has ended; the child's status if it was among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(EVERYONE, os.WNOHANG))[0]:
            if found[0] == child:
                status = found[1]
    return status


def end_everyone(child: int, status: int | None) -> int:
    """Until nobody is left beside us; the child's status."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(EVERYONE, signal.SIGKILL)
        try:
            found, ended = os.waitpid(EVERYONE, 0)
        except ChildProcessError:
            return 0 if status is None else status
        if found == child:
            status = ended


def passed(settings: Header, most_files: int) -> str:
    """The limit that all processes together are over, if they are."""
    if memory() > settings["memory_bytes"]:
        return "memory"
    return "files" if files(settings["directories"]) > most_files else ""


def files(directories: list[str]) -> int:
    """That there are on these file systems."""
    counts = map(os.statvfs, directories)
    return sum(one.f_files - one.f_ffree for one in counts)


def memory() -> int:
    """Bytes of all processes but this one that are theirs, or shared and in memory.  A page that was not copied since
    a fork counts for parent and child: rather too much than too little."""
    total = 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def become(request: Header, settings: Header, ends: tuple[int, int, int]) -> None:
    """In the child: be the program, limited; or say why not.  Never returns."""
    try:
        for number, end in enumerate(ends):
            os.dup2(end, number)  # what is dup2'ed is inherited, nothing else is
        drop_to_user(settings)
        os.setsid()
        os.nice(5)
        for name, value in settings["resources"].items():
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (most, most))
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(request["directory"])
        os.execvpe(request["argv"][0], request["argv"], request["environment"])
    except Exception as error:  # noqa: BLE001 - the child ends here, whatever it was
        os.write(2, f"{request['argv'][0]}: {error}\n".encode())
    finally:
        os._exit(NOT_STARTED)


def drop_to_user(settings: Header) -> None:
    if (user := settings["user"]) is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def in_child(function: Move, request: Header, payload: bytes, settings: Header) -> tuple[Header, bytes]:
    """As the user whose files they are: the kernel says what may be read and written."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            drop_to_user(settings)
            reply, data = function(request, payload)
        except (OSError, ValueError) as error:
            reply, data = {"error": f"{getattr(error, 'strerror', None) or error}"}, b""
        with os.fdopen(writing, "wb") as file:
            file.write(json.dumps(reply).encode() + b"\n" + data)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        reply, data = json.loads(file.readline() or '{"error": "it ran out of memory"}'), file.read()
    os.waitpid(child, 0)
    return reply, data


def move(request: Header, payload: bytes) -> tuple[Header, bytes]:
    """Write or read one file, following no link: the model may have made them."""
    *folders, name = [part for part in request["path"].split("/") if part not in ("", ".")] or [""]
    if ".." in folders or name in ("", ".."):
        raise ValueError("a path of a file below the sandbox's directory is needed")
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    for part in folders:
        if request["op"] == "write":
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=folder)
        folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    if request["op"] == "write":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)  # whatever it is: a link, a pipe, a file that is being executed
        mode = 0o755 if request["executable"] else 0o644
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)
        with os.fdopen(file, "wb") as out:
            out.write(payload)
        return {}, b""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(file, "rb") as source:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = source.read(request["limit"] + 1)
    if len(data) > request["limit"]:
        raise OSError(errno.EFBIG, f"it has more than {request['limit']} bytes")
    return {}, data


if __name__ == "__main__":
    # of the same user its memory and its pipes would be open to the program through /proc
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    serve(json.loads(sys.argv[1]))
