"""Child processes of a run: started with a log and a pipe, watched, and ended without leaving anything behind."""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from stream_rl import runtime
from stream_rl.errors import StreamRLError

LOG_TAIL_LINES = 20


class ProcessDied(StreamRLError):
    """A process of the run ended by itself or never came up.  `what` is the short of it, `detail` has the log's end or
    the process's own last word."""

    def __init__(self, what: str, detail: str, code: int | None = None) -> None:
        super().__init__(what, detail, code)
        self.what = what
        self.detail = detail
        self.code = code
        """Its exit status, if it refused."""

    def __str__(self) -> str:
        return self.detail


class Child:
    """One process of ours, in a process group of its own: a Ctrl-C at the terminal reaches the supervisor alone, which
    then ends the children in order."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: pathlib.Path, ready: asyncio.StreamReader):
        self.name, self.log = name, log
        self._process, self._ready = process, ready
        self._swept = False

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: pathlib.Path,
        threads: int,
        devices: Sequence[int] = (),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> "Child":
        """Run `python -m module`; its output is appended to `log`.  Cancelled, it leaves no process behind.

        devices: GPUs that it sees; all if there are none.  variables: of its environment, beside ours.
        """
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            runtime.PARENT: str(os.getpid()),
            **variables,
        }
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # SGLang would compile itself at every start
        read, write = os.pipe()
        try:
            reader = asyncio.StreamReader()
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
            )
            with log.open("ab") as output:
                # the last thing awaited: asyncio itself ends a process whose start is cancelled
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", module, *arguments, "--ready-fd", str(write),
                    stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[write],
                    start_new_session=True, env=environment,
                )  # fmt: skip
        finally:
            os.close(write)
        return cls(name, process, log, reader)

    async def ready(self, timeout: float) -> dict[str, Any]:
        """What the process says when it is up.  Raises ProcessDied if it ends or stays silent instead."""
        try:
            async with asyncio.timeout(timeout):
                line = await self._ready.readline()
        except TimeoutError:
            raise self.died(f"was not up after {timeout:.0f} s") from None
        if not line:
            code = await self._process.wait()
            raise self.refusal(code, " while starting")
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def end(self) -> int:
        """Wait for the end; the exit status."""
        return await self._process.wait()

    async def succeed(self) -> None:
        """Wait for the end.  Raises ProcessDied if the status is not 0."""
        if code := await self._process.wait():
            raise self.refusal(code)

    def kill(self) -> None:
        """SIGKILL for the process, unless it has ended, and for whatever is in its process group."""
        if self._swept:
            return
        self._swept = True  # once it is reaped, its number may become somebody else's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self, timeout: float) -> None:
        """SIGTERM, and SIGKILL after `timeout` seconds and for whatever it left behind."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._process.wait()
        self.kill()
        await self._process.wait()

    def died(self, what: str) -> ProcessDied:
        """The error that says so, with the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        return ProcessDied(f"{self.name} {what}", f"{self.name} {what}; the end of {self.log}:\n{tail}")

    def refusal(self, code: int, when: str = "") -> ProcessDied:
        """The error of an end with this status: the one line with which our processes refuse, or the log's end."""
        what = f"ended with status {code}{when}"
        last = next(reversed(self.log.read_text(errors="replace").splitlines()), "")
        if code in (1, runtime.NOT_AGAIN) and last.startswith(f"{self.name}: "):
            return ProcessDied(f"{self.name} {what}", last, code)
        return self.died(what)
