"""A queue process under measurement: started as `stream-rl train` starts it, with peers of ours, and its books."""

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

import psutil

from scripts.bench.peers import Peers, connected
from scripts.bench.traffic import RUN
from scripts.processes import Child
from stream_rl import config

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process has used so far, or between two moments."""

    cpu_seconds: float
    """All its threads."""
    written_bytes: int
    """To the disk."""
    memory_bytes: int
    """That it alone holds: files that it has mapped, as the index of SQLite's log, are shared and do not count."""
    journal_bytes: int
    """In the journal's files."""

    def __sub__(self, before: Self) -> "Usage":
        return Usage(
            self.cpu_seconds - before.cpu_seconds,
            self.written_bytes - before.written_bytes,
            self.memory_bytes - before.memory_bytes,
            self.journal_bytes - before.journal_bytes,
        )


@dataclass(frozen=True, slots=True)
class RunningQueue:
    peers: Peers
    _process: psutil.Process
    _journal: pathlib.Path

    def usage(self) -> Usage:
        cpu = self._process.cpu_times()
        return Usage(
            cpu_seconds=cpu.user + cpu.system,
            written_bytes=self._process.io_counters().write_bytes,
            memory_bytes=self._process.memory_full_info().uss,
            journal_bytes=sum(file.stat().st_size for file in self._journal.parent.glob(f"{self._journal.name}*")),
        )


@contextlib.asynccontextmanager
async def running_queue(recipe: config.Recipe) -> AsyncIterator[RunningQueue]:
    """A queue process of `recipe`, everything of it in the run's folder, until the end of the block.

    Raises ProcessDied, in a group, with the end of its log.
    """
    directory = recipe.run_directory
    directory.mkdir(parents=True)
    config.dump(recipe, directory / "recipe.toml")
    journal = directory / "journal.db"
    words = (str(directory / "recipe.toml"), "--run-id", RUN, "--journal", str(journal))
    child = await Child.start("queue", "queues.process", words, directory / "queue.log", threads=1)
    try:
        address = (await child.ready(START_TIMEOUT_S))["address"]
        [process] = [p for p in psutil.Process().children() if str(journal) in p.cmdline()]
        async with asyncio.TaskGroup() as watching, connected(address, recipe) as peers:
            watch = watching.create_task(_watch(child))
            try:
                yield RunningQueue(peers, process, journal)
            except psutil.NoSuchProcess:
                await asyncio.wait([watch])  # which says how it ended
            watch.cancel()
    finally:
        await child.stop(STOP_TIMEOUT_S)


async def _watch(child: Child) -> None:
    """Raises ProcessDied when the process ends by itself: nobody would answer."""
    raise child.died(f"ended with status {await child.end()}")
