"""Child processes of a run: started with a log and a pipe, watched, and ended without leaving anything behind."""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from stream_rl import runtime
from stream_rl.errors import StreamRLError

LOG_TAIL_LINES = 20


class ProcessDied(StreamRLError):
    """A process of the run ended by itself."""


class Child:
    """One process of ours, in a process group of its own: a Ctrl-C at the terminal reaches the supervisor alone, which
    then ends the children in order."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: pathlib.Path, ready: asyncio.StreamReader):
        self.name, self.log = name, log
        self._process, self._ready = process, ready
        self._stopping = False
        self._swept = False

    @classmethod
    async def start(cls, name: str, module: str, arguments: Sequence[str], log: pathlib.Path, threads: int) -> "Child":
        """Run `python -m module`; its output goes to `log`."""
        read, write = os.pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            runtime.PARENT: str(os.getpid()),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # SGLang would compile itself at every start
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, *arguments, "--ready-fd", str(write),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[write],
                start_new_session=True, env=environment,
            )  # fmt: skip
        os.close(write)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
        )
        return cls(name, process, log, reader)

    async def ready(self, timeout: float) -> dict[str, Any]:
        """What the process says when it is up.  Raises ProcessDied if it ends or stays silent instead."""
        try:
            async with asyncio.timeout(timeout):
                line = await self._ready.readline()
        except TimeoutError:
            raise ProcessDied(self._epitaph(f"was not up after {timeout:.0f} s")) from None
        if not line:
            code = await self._process.wait()
            raise ProcessDied(self._refusal(code) or self._epitaph(f"ended with status {code} while starting"))
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def watch(self) -> None:
        """Returns when the process has been stopped.  Raises ProcessDied if it ended by itself."""
        code = await self._process.wait()
        if not self._stopping:
            raise ProcessDied(self._epitaph(f"ended with status {code}"))

    async def wait(self) -> None:
        """Returns when the process has ended with 0.  Raises ProcessDied otherwise."""
        if code := await self._process.wait():
            raise ProcessDied(self._refusal(code) or self._epitaph(f"ended with status {code}"))

    async def stop(self, timeout: float) -> None:
        """SIGTERM, and after `timeout` seconds SIGKILL; then SIGKILL for whatever it left in its process group."""
        self._stopping = True
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._process.wait()
        if not self._swept:
            self._swept = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def _refusal(self, code: int) -> str:
        """The one line with which our processes refuse a recipe; "" if the process ended in another way."""
        last = next(reversed(self.log.read_text(errors="replace").splitlines()), "")
        return last if code == 1 and last.startswith(f"{self.name}: ") else ""

    def _epitaph(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        return f"{self.name} {what}; the end of {self.log}:\n{tail}"
