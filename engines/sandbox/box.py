"""A sandbox: one bubblewrap, one private directory, any number of programs one after the other.

    async with Sandbox(Limits(memory_bytes=256 << 20)) as box:
        await box.write("main.py", b"print(6 * 7)")
        result = await box.run(["python3", "main.py"], seconds=5.0)

A program sees the system's /usr, /bin and /lib and this Python, all read-only, a /proc and a /dev of its own, and
/work, /tmp and /dev/shm in memory.  It has a network of its own with nobody in it.  When a program ends, or is ended,
so does everything that it started; when the sandbox is closed, or we are killed, everything in it is gone.

What bounds it: the kernel bounds a process's memory (address space), CPU time and files, the number of processes, and
the size of /work, /tmp and /dev/shm.  The memory of all processes together and the number of files are looked at 50
times a second, and a program over a limit is ended: unless cgroups are delegated to us there is no other means.  The
bound that nothing can pass is therefore `processes` times `memory_bytes`; for a closer one put the actor into a cgroup.
"""

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from engines.sandbox import inside, seccomp
from stream_rl.errors import ConfigError, EngineError

WORK = "/work"
_WRITABLE = (WORK, "/tmp", "/dev/shm")
_INSIDE = "/inside.py"
_LAST_WORDS = 2000
"""Bytes of what bubblewrap says when it fails."""
_ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_ROOTS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Beside /usr; links into it on a merged system."""


class SandboxLost(EngineError):
    """The sandbox is gone, with everything in it: a program took it along, or it did not start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one sandbox."""

    seconds: float = 10.0
    """Of a program, by the clock, if `run` says nothing else."""
    cpu_seconds: int = 60
    """Of one process."""
    memory_bytes: int = 512 << 20
    """Of all processes together, and of the address space of each."""
    processes: int = 32
    """At a time, threads included."""
    disk_bytes: int = 64 << 20
    """Of /work; /tmp and /dev/shm have as much again each."""
    files: int = 20_000
    """In /work, /tmp and /dev/shm together, empty ones and directories included."""
    open_files: int = 256
    """Of one process."""
    output_bytes: int = 1 << 20
    """Of stdout and of stderr that are kept; the rest is read and dropped."""
    start_seconds: float = 30.0
    """Until the sandbox answers, in starting or beyond a program's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of a program."""

    exit: int
    """Its status; below 0 the signal that ended it; 127: it could not be started, stderr says why."""
    ended: Literal["exit", "timeout", "memory", "files"]
    """exit: by itself.  Otherwise the limit for which it was ended."""
    stdout: bytes
    stderr: bytes
    dropped_bytes: int
    """Of output beyond the limit."""
    seconds: float


class Sandbox:
    """One program at a time; not for several tasks at once."""

    def __init__(self, limits: Limits | None = None, readable: Sequence[str] = ()) -> None:
        """readable: further directories that programs may read, under their own names."""
        self._limits, self._readable = limits or Limits(), tuple(readable)
        self._process: asyncio.subprocess.Process | None = None
        self._busy = False

    @staticmethod
    def problem() -> str:
        """Why there can be no sandbox here, with what to do about it; empty if there can."""
        return _problem()

    async def __aenter__(self) -> Self:
        """Raises ConfigError where bubblewrap is missing, SandboxLost if the sandbox does not start."""
        command, environment, files = _command(self._limits, self._readable)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                pass_fds=files,
            )
        finally:
            for file in files:
                os.close(file)
        try:
            await self.run(["/bin/true"])
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            async with asyncio.timeout(self._limits.start_seconds):
                await process.communicate()  # to the end of its pipes, which somebody in the sandbox might have

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        seconds: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a program in /work and wait for it.  Nothing that it started is alive afterwards.

        seconds: until it is ended.  environment: beside PATH, HOME and LANG.  Raises SandboxLost.
        """
        limit = self._limits.seconds if seconds is None else seconds
        request = {
            "op": "run",
            "argv": list(argv),
            "seconds": limit,
            "output_bytes": self._limits.output_bytes,
            "environment": _environment() | dict(environment or {}),
            "directory": WORK,
        }
        reply, data = await self._ask(request, stdin, limit)
        out = reply["stdout"]
        return Result(
            exit=reply["exit"],
            ended=reply["ended"],
            stdout=data[:out],
            stderr=data[out:],
            dropped_bytes=reply["dropped_bytes"],
            seconds=reply["seconds"],
        )

    async def write(self, path: str, data: bytes, executable: bool = False) -> None:
        """Make a file below /work, and the directories to it, in place of one that is there.

        Raises OSError for a path that leads elsewhere or a full disk, SandboxLost.
        """
        await self._move({"op": "write", "path": path, "executable": executable}, data)

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        """A file below /work, of `limit` bytes at most.  Raises OSError if there is none such, SandboxLost."""
        return await self._move({"op": "read", "path": path, "limit": limit}, b"")

    async def _move(self, request: dict[str, Any], payload: bytes) -> bytes:
        reply, data = await self._ask(request, payload, 0.0)
        if "error" in reply:
            raise OSError(f"{request['path']!r}: {reply['error']}")
        return data

    async def _ask(self, request: dict[str, Any], payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        process = self._process
        if process is None:
            raise SandboxLost("the sandbox is not there (any more); use it within `async with`")
        assert not self._busy, "a sandbox runs one program at a time; open another"
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        header = json.dumps(request | {"size": len(payload)}).encode()
        self._busy = True
        try:
            async with asyncio.timeout(seconds + self._limits.start_seconds):
                process.stdin.write(inside.LENGTH.pack(len(header)) + header + payload)
                await process.stdin.drain()
                length = inside.LENGTH.unpack(await process.stdout.readexactly(inside.LENGTH.size))[0]
                reply: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
                data = await process.stdout.readexactly(reply["size"])
        except TimeoutError:
            _kill(process)
            raise SandboxLost(
                f"the sandbox gave no answer within {self._limits.start_seconds} s of when it was due"
            ) from None
        except (EOFError, ConnectionError) as error:
            _kill(process)
            said = (await process.stderr.read(_LAST_WORDS)).decode(errors="replace").strip()
            raise SandboxLost(f"the sandbox ended: {said or 'it was killed'}; {_advice()}") from error
        except BaseException:
            _kill(process)  # the answer to this would be taken for that to the next
            raise
        finally:
            self._busy = False
        return reply, data


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def find_bubblewrap() -> str | None:
    """That of the virtual environment, which scripts/setup.sh puts there, or the system's."""
    own = pathlib.Path(sys.prefix, "bin", "bwrap")
    return str(own) if os.access(own, os.X_OK) else shutil.which("bwrap")


def _python() -> str:
    return str(pathlib.Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))


def _environment() -> dict[str, str]:
    path = ":".join(dict.fromkeys((str(pathlib.Path(_python()).parent), "/usr/local/bin", "/usr/bin", "/bin")))
    return {"PATH": path, "HOME": WORK, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


def _command(limits: Limits, readable: Sequence[str]) -> tuple[list[str], dict[str, str], list[int]]:
    """bubblewrap's command line, environment, and the files that it reads: to be passed on, then closed."""
    bubblewrap = find_bubblewrap()
    if bubblewrap is None:
        raise ConfigError(_INSTALL)
    files = [_file(seccomp.program()), _file(pathlib.Path(inside.__file__).read_bytes())]
    root = os.geteuid() == 0
    command = [bubblewrap, "--die-with-parent", "--new-session", "--as-pid-1", "--seccomp", str(files[0])]
    command += [f"--unshare-{what}" for what in ("pid", "net", "ipc", "uts", "cgroup-try")]
    if root:  # process 1 becomes somebody else for each program: of a namespace's root the kernel counts no processes
        command += ["--cap-drop", "ALL"]
        command += [word for cap in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL") for word in ("--cap-add", cap)]
    else:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for path in _ROOTS:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    own = () if sys.base_prefix.startswith("/usr") else (sys.base_prefix,)
    for path in dict.fromkeys(str(parent) for inner in (*own, *readable, *_ETC) for parent in _parents(inner)):
        command += ["--perms", "0755", "--dir", path]  # it would make them for itself alone
    for path in _ETC:
        command += ["--ro-bind-try", path, path]
    for path in (*own, *readable):
        command += ["--ro-bind", path, path]
    command += ["--perms", "0444", "--ro-bind-data", str(files[1]), _INSIDE]
    for path in _WRITABLE:
        command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", path]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]
    settings = {
        "user": 10_000 + secrets.randbelow(50_000) if root else None,
        "memory_bytes": limits.memory_bytes,
        "files": limits.files,
        "directories": _WRITABLE,
        "resources": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        },
    }
    command += ["--", _python(), "-I", "-S", _INSIDE, json.dumps(settings)]
    return command, _environment(), files


def _parents(path: str) -> list[pathlib.Path]:
    """From the root's child down."""
    return list(pathlib.Path(path).parents)[-2::-1]


def _file(data: bytes) -> int:
    file = os.memfd_create("sandbox")
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    return file


_INSTALL = (
    "the sandbox needs bubblewrap, and there is none in this virtual environment or on the PATH: run scripts/setup.sh "
    "again where apt-get is, or install the package bubblewrap"
)


@functools.cache
def _problem() -> str:
    if platform.system() != "Linux" or platform.machine() not in seccomp.MACHINES:
        return f"the sandbox needs Linux on {' or '.join(seccomp.MACHINES)}, this is {platform.platform()}"
    if os.geteuid() and _kernel() < (5, 14):
        return f"the sandbox needs Linux 5.14, which counts processes by sandbox, this is {platform.release()}"
    if find_bubblewrap() is None:
        return _INSTALL
    command, environment, files = _command(Limits(), ())
    ask = json.dumps({"op": "read", "path": "none", "limit": 0, "size": 0}).encode()
    try:
        done = subprocess.run(
            command,
            input=inside.LENGTH.pack(len(ask)) + ask,
            capture_output=True,
            env=environment,
            pass_fds=files,
            timeout=Limits().start_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the sandbox did not start within {Limits().start_seconds} s"
    finally:
        for file in files:
            os.close(file)
    said = done.stderr.decode(errors="replace").strip()[:_LAST_WORDS]
    return "" if done.stdout and not done.returncode else f"the sandbox does not start: {said}; {_advice()}"


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _advice() -> str:
    """What mostly is the matter where bubblewrap may not make namespaces."""
    if os.geteuid() == 0:
        return "in a container it needs the capability SYS_ADMIN (docker run --privileged, or --cap-add SYS_ADMIN)"
    return (
        "it needs unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0), or a container with them"
    )
