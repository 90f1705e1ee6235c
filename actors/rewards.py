"""Rewards, in processes of their own and with a deadline.

User code may hang, crash or print; none of that may reach the actor's event loop.  Each worker is a subprocess that
loads the task once and scores one completion at a time (`actors.reward_worker` has the protocol).  A worker that
misses its deadline, dies or answers nonsense is killed, and a fresh one takes its place when the next score needs it.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from stream_rl import runtime
from stream_rl.errors import ConfigError, StreamRLError, TaskError, WireError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt

MAX_REPLY_BYTES = 1 << 20
EXIT_WAIT_S = 5.0
"""Longest wait for a killed worker to be gone; only a process stuck in the kernel takes longer."""


@dataclass(frozen=True, slots=True)
class Score:
    reward: float
    parts: dict[str, float]
    """The task's other figures, by name."""


class RewardFailure(StreamRLError):
    """This one completion has no score.  `reason` is countable: reward_raised, reward_timeout, reward_not_finite or
    reward_died."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class RewardPool:
    """`async with RewardPool(...) as pool: await pool.score(prompt, completion)`.

    Entering starts every worker, and raises ConfigError or TaskError if the task cannot be loaded in one.  Leaving,
    however that happens, leaves no process behind.
    """

    def __init__(
        self, use: str, options: Mapping[str, Any], *, processes: int, timeout_s: float, start_timeout_s: float = 60.0
    ) -> None:
        if processes < 1:
            raise ConfigError(f"rollout.reward_processes must be at least 1, got {processes}")
        if timeout_s <= 0:
            raise ConfigError(f"rollout.reward_timeout_s must be positive, got {timeout_s}")
        opening = {"use": use, "options": dict(options)}
        self._workers = [_Worker(opening, timeout_s, start_timeout_s) for _ in range(processes)]
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        try:
            # All of them to their end, also after a failure: none may be half started when we close.
            outcomes = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
            for outcome in outcomes:
                if outcome is not None:
                    raise outcome
        except BaseException:
            await self._close()
            raise
        for worker in self._workers:
            self._free.put_nowait(worker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def score(self, prompt: Prompt, completion: str) -> Score:
        """The task's reward; the deadline runs from when a worker has the completion, not while it waits for one.

        Raises RewardFailure if this completion has none, TaskError if the prompt's data cannot travel.
        """
        try:
            request = pack({"text": prompt.text, "data": dict(prompt.data), "completion": completion})
        except WireError as error:
            raise TaskError(f"Prompt.data of {prompt.text[:80]!r} cannot go to the reward process: {error}") from error
        worker = await self._free.get()
        try:
            return await worker.score(request)
        finally:
            self._free.put_nowait(worker)

    async def _close(self) -> None:
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*(worker.gone() for worker in self._workers))


class _Worker:
    """A reward process, or the place of one that was killed."""

    def __init__(self, opening: dict[str, Any], timeout_s: float, start_timeout_s: float) -> None:
        self._opening = pack(opening)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """Start the process and load the task in it.  Raises ConfigError or TaskError if that fails."""
        # The same search path as ours, so that the task's module is found there if it is found here.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "actors.reward_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, runtime.PARENT: str(os.getpid())},
        )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                reply = await self._ask(self._opening)
        except TimeoutError:
            self.kill()
            raise TaskError(f"the task did not load in a reward process within {self._start_timeout_s} s") from None
        except (EOFError, ConnectionError, WireError) as error:
            self.kill()
            raise TaskError(f"a reward process ended while it loaded the task, its stderr says why: {error}") from error
        except BaseException:
            self.kill()
            raise
        if "error" in reply:
            self.kill()
            raise (ConfigError if reply["kind"] == "ConfigError" else TaskError)(reply["error"])

    async def score(self, request: bytes) -> Score:
        if self._process is None:
            try:
                await self.start()
            except (ConfigError, TaskError) as error:
                raise RewardFailure("reward_died", f"and could not be started again: {error}") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._ask(request)
            if "failure" in reply:
                raise RewardFailure(reply["failure"], reply["detail"])
            return Score(float(reply["reward"]), {name: float(value) for name, value in reply["parts"].items()})
        except RewardFailure:
            raise
        except TimeoutError:
            self.kill()
            raise RewardFailure("reward_timeout", f"no reward within {self._timeout_s} s") from None
        except (EOFError, ConnectionError, WireError) as error:
            self.kill()
            raise RewardFailure("reward_died", f"the reward process ended: {error}") from error
        except BaseException:
            self.kill()  # cancelled between a question and its answer: the next one would read this one's
            raise

    async def _ask(self, request: bytes) -> dict[str, Any]:
        assert self._process is not None
        into, out = self._process.stdin, self._process.stdout
        assert into is not None and out is not None
        into.write(len(request).to_bytes(4, "big") + request)
        await into.drain()
        length = int.from_bytes(await out.readexactly(4), "big")
        if length > MAX_REPLY_BYTES:
            raise WireError("reply_too_long", f"a reward process announced {length} bytes, at most {MAX_REPLY_BYTES}")
        reply = unpack(await out.readexactly(length))
        assert isinstance(reply, dict)
        return reply

    def kill(self) -> None:
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        # gone() only needs those whose end was not seen yet; without this a task that always hangs grows the list
        self._killed = [p for p in self._killed if p.returncode is None]
        self._killed.append(self._process)
        self._process = None

    async def gone(self) -> None:
        """Wait until every process that this worker ever had has ended."""
        for process in self._killed:
            try:
                async with asyncio.timeout(EXIT_WAIT_S):
                    await process.wait()
            except TimeoutError as error:
                raise TaskError(f"reward process {process.pid} does not die; end it by hand") from error
        self._killed.clear()
