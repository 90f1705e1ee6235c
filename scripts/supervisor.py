"""Keeps the processes of a run alive: one that ends by itself, or is declared lost, is started again.

    start ─▶ up ─▶ ended or lost ─▶ its process group swept ─▶ start, as the next incarnation ...

A process that has never been up is not started again: what is wrong with a recipe stays wrong.
"""

import asyncio
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scripts.processes import Child, ProcessDied
from stream_rl import config, runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One process of the run, whichever incarnation of it."""

    name: str
    """In the log's name and in what is said of it: learner."""
    module: str
    arguments: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    """Programs whose addresses it is told: --queue ADDRESS."""
    keeps_address: bool = False
    """Others hold its address: from the second start on it binds to the one that it had."""
    peer: str = ""
    """Its name in the queue's registry: learner-0."""
    threads: int = 1
    devices: tuple[int, ...] = ()
    """GPUs that it sees; empty: all."""


@dataclass(frozen=True, slots=True)
class Restart:
    name: str
    incarnation: int
    """The one that was started."""
    reason: str
    """How the one before it ended: learner ended with status -9."""
    number: int
    """Of the restarts within the window, this one included."""


class Allowance:
    """So many restarts in any window of so many seconds."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most, self._window_s = most, window_s
        self._taken: deque[float] = deque()

    def take(self, now: float) -> int:
        """The number of this restart within the window; 0 if it is one too many."""
        while self._taken and now - self._taken[0] >= self._window_s:
            self._taken.popleft()
        if len(self._taken) >= self._most:
            return 0
        self._taken.append(now)
        return len(self._taken)


class Kept:
    """One program's process, over its incarnations."""

    def __init__(
        self,
        program: Program,
        arguments: Sequence[str],
        log: pathlib.Path,
        supervise: config.Supervise,
        start_timeout_s: float,
        say: Callable[[Restart], None],
        before: int,
    ) -> None:
        """before: its incarnations in the run's former lives."""
        self.program, self.incarnation, self.address = program, before, ""
        self._before = before
        self._arguments, self._log = arguments, log
        self._supervise, self._start_timeout_s, self._say = supervise, start_timeout_s, say
        self._allowance = Allowance(supervise.max_restarts, supervise.restart_window_s)
        self._child: Child | None = None
        self._up = asyncio.Event()
        self._verdict = ""

    @property
    def restarts(self) -> int:
        """How many times it was started again."""
        return max(0, self.incarnation - self._before - 1)

    async def keep(self) -> None:
        """Consumes: nothing.  Waits for: the end of the process.  Produces: its next incarnation.  Unblocked by: the
        process, or `lost`.  Raises ProcessDied when it may not or need not be started again."""
        died: ProcessDied | None = None
        while True:
            restart = self._restart(died) if died else None
            child = await self._start()
            if restart:
                self._say(restart)
            died = await self._live(child)

    async def up(self) -> int:
        """Wait until the process is up; its incarnation."""
        await self._up.wait()
        return self.incarnation

    def lost(self, incarnation: int, why: str) -> None:
        """Kill this incarnation because it only looks alive.  One that is still starting has its time for that, and
        one that has been replaced is meant no more."""
        if incarnation == self.incarnation and self._up.is_set() and self._child:
            self._verdict = why
            self._child.kill()

    async def stop(self, timeout: float) -> None:
        """End it for good, once `keep` has been cancelled."""
        if self._child:
            await self._child.stop(timeout)

    async def _start(self) -> Child:
        words = [*self._arguments, *self.program.arguments, "--incarnation", str(self.incarnation + 1)]
        if self.program.keeps_address and self.address:
            words += ["--bind", self.address]
        program = self.program
        child = await Child.start(program.name, program.module, words, self._log, program.threads, program.devices)
        self._child, self._verdict = child, ""
        self.incarnation += 1
        return child

    async def _live(self, child: Child) -> ProcessDied:
        """One incarnation from its start to its end: how it ended.  Nothing of it is left.  Raises ProcessDied if it
        is the first and never came up, or if it said that another would end in the same way."""
        try:
            fields = await child.ready(self._start_timeout_s)
            self.address = fields.get("address", "")
            self._up.set()
            code = await child.end()
            if code == runtime.NOT_AGAIN:
                raise child.refusal(code)
            died = child.died(self._verdict or f"ended with status {code}")
        except ProcessDied as failure:
            if self.incarnation == self._before + 1 or failure.code == runtime.NOT_AGAIN:
                raise
            died = failure
        finally:
            self._up.clear()
        child.kill()
        await child.end()
        return died

    def _restart(self, died: ProcessDied) -> Restart:
        """The restart that follows; noted in the log.  Raises ProcessDied if there have been too many."""
        number, limit = self._allowance.take(time.monotonic()), self._supervise
        if not number:
            if limit.max_restarts == 0:
                raise died
            assert self._child is not None
            what = died.what.removeprefix(f"{self.program.name} ")
            raise self._child.died(
                f"{what}, after {limit.max_restarts} restarts within {limit.restart_window_s:.0f} s "
                "(supervise.max_restarts)"
            )
        incarnation = self.incarnation + 1
        with self._log.open("a") as log:
            log.write(f"---- {died.what}; incarnation {incarnation} ----\n")
        return Restart(self.program.name, incarnation, died.what, number)


class Processes:
    """All processes of a run.  Each is kept alive by a task of the caller's group until it is released."""

    def __init__(
        self,
        arguments: Sequence[str],
        logs: pathlib.Path,
        supervise: config.Supervise,
        start_timeout_s: float,
        say: Callable[[Restart], None],
    ) -> None:
        """`arguments` come first in every command line; `say` hears of every restart."""
        self._arguments, self._logs = arguments, logs
        self._supervise, self._start_timeout_s, self._say = supervise, start_timeout_s, say
        self._kept: dict[str, Kept] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._passing: list[Child] = []
        self._before: Mapping[str, int] = {}

    def follow(self, incarnations: Mapping[str, int]) -> None:
        """Start the processes of these peers as later incarnations than they had, since the queue knows those."""
        self._before = dict(incarnations)

    async def start(self, group: asyncio.TaskGroup, programs: Iterable[Program]) -> None:
        """Start these at the same time, and wait until each has been up.  One that fails ends the group."""
        kept = [self._keep(group, program) for program in programs]
        for process in kept:
            await process.up()

    async def run_to_end(self, program: Program) -> None:
        """Run a process that does one thing and ends.  Raises ProcessDied if it fails."""
        log = self._logs / f"{program.name}.log"
        child = await Child.start(
            program.name, program.module, [*self._words(program), *program.arguments], log, program.threads
        )
        self._passing.append(child)
        await child.succeed()
        child.kill()

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def lost(self, peer: str, incarnation: int, why: str) -> None:
        """The queue has declared this peer lost: kill it, so that it is started again."""
        for kept in self._kept.values():
            if kept.program.peer == peer:
                kept.lost(incarnation, why)

    def release(self, *, but: Sequence[str] = ()) -> None:
        """Keep no process alive any more but those named: whatever happens to the others is no news."""
        for name, task in self._keeping.items():
            if name not in but:
                task.cancel()

    @property
    def restarts(self) -> dict[str, int]:
        """How many times each process was started again, if it was."""
        return {name: kept.restarts for name, kept in self._kept.items() if kept.restarts}

    async def stop(self) -> None:
        """End what has been released: those that ask first, those that answer last."""
        timeout = self._supervise.stop_timeout_s
        asking: list[Child | Kept] = [k for k in self._kept.values() if not k.program.keeps_address]
        answering: list[Child | Kept] = [k for k in self._kept.values() if k.program.keeps_address]
        for ending in ([*self._passing, *asking], answering):
            async with asyncio.TaskGroup() as group:
                for process in ending:
                    group.create_task(process.stop(timeout))

    def _keep(self, group: asyncio.TaskGroup, program: Program) -> Kept:
        log = self._logs / f"{program.name}.log"
        before = self._before.get(program.peer, 0)
        kept = Kept(program, self._words(program), log, self._supervise, self._start_timeout_s, self._say, before)
        self._kept[program.name] = kept
        self._keeping[program.name] = group.create_task(kept.keep(), name=f"keep {program.name}")
        return kept

    def _words(self, program: Program) -> list[str]:
        links = [word for link in program.links for word in (f"--{link}", self._kept[link].address)]
        return [*self._arguments, *links]
