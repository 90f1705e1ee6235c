"""What a chunk costs the queue, by part: the calls of `queues.process`, made here one after another over the same
frames, and timed by the CPU time of this thread.

The whole process spends more: sockets, the event loop, acknowledgements, groups that open and close.
"""

import contextlib
import cProfile
import itertools
import pathlib
import pstats
import time
from collections.abc import Sequence
from typing import Any

from queues.core import JOURNAL, QueueCore
from queues.journal import Journal
from queues.store import Settings
from scripts.bench.peers import NAMES
from scripts.bench.traffic import RUN, Interval, close_member, members, num_rows, open_group
from stream_rl import config, wire
from stream_rl.messages import Hello

PARTS = ("unpack", "core", "journal")


class Direct:
    """A core and a journal without a process around them."""

    def __init__(self, recipe: config.Recipe, journal: Journal, commit_every: int) -> None:
        """commit_every: messages of one transaction."""
        settings = Settings(run=RUN, queue=recipe.queue, max_new_tokens=recipe.rollout.max_new_tokens)
        self._core, self._journal, self._commit_every = QueueCore(settings), journal, commit_every
        self._told = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """CPU, by part, for chunk messages only."""
        for role, name in NAMES.items():
            self._tell("", Hello(run=RUN, role=role, name=name, incarnation=1, pid=1))

    def take(self, intervals: Sequence[Interval]) -> None:
        frames = [[bytes(frame) for frame in wire.encode(interval.chunks)] for interval in intervals]
        for number, (interval, message) in enumerate(zip(intervals, frames, strict=True), 1):
            for group in interval.starting:
                self._tell(NAMES["actor"], open_group(self._told, group))
                self._told += 1
            self._chunks(message, commit=number % self._commit_every == 0 or number == len(intervals))
            for group, member in members(interval.ending):
                self._tell(NAMES["actor"], close_member(self._told, group, member))
                self._told += 1
        self._core.check()
        assert not self._core.tallies.refused, f"refused: {self._core.tallies.refused}"

    def _chunks(self, frames: list[bytes], commit: bool) -> None:
        times = [time.thread_time()]
        message = wire.decode(frames)
        times.append(time.thread_time())
        actions = self._core.handle(0.0, NAMES["engine"], message)
        times.append(time.thread_time())
        records = [record for recipient, record in actions if recipient == JOURNAL]
        self._journal.append(0.0, NAMES["engine"], type(message).__name__, frames, records)
        if commit:
            self._journal.commit()
            while not self._journal.is_tidy:
                self._journal.tidy()
        times.append(time.thread_time())
        for part, (began, ended) in zip(PARTS, itertools.pairwise(times), strict=True):
            self.seconds[part] += ended - began

    def _tell(self, sender: str, event: Any) -> None:
        """What is not a chunk, untimed."""
        actions = self._core.handle(0.0, sender, event)
        records = [record for recipient, record in actions if recipient == JOURNAL]
        if self._core.durable:
            self._journal.append(0.0, sender, type(event).__name__, wire.encode(event), records)


def measure(
    recipe: config.Recipe, intervals: Sequence[Interval], directory: pathlib.Path, commit_every: int
) -> dict[str, float]:
    """CPU microseconds a chunk, by part."""
    with _journal(recipe, directory / "cost.db") as journal:
        direct = Direct(recipe, journal, commit_every)
        direct.take(intervals)
    return {part: 1e6 * direct.seconds[part] / num_rows(intervals) for part in PARTS}


def profile(
    recipe: config.Recipe, intervals: Sequence[Interval], directory: pathlib.Path, commit_every: int, most: int = 8
) -> list[str]:
    """The functions that take the most CPU time of their own, with their share of all; cProfile makes Python's own look
    dearer than they are."""
    profiler = cProfile.Profile(time.thread_time)
    with _journal(recipe, directory / "profile.db") as journal:
        direct = Direct(recipe, journal, commit_every)
        profiler.runcall(direct.take, intervals)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = {f"{pathlib.Path(file).name}:{name}".removeprefix("~:"): times[2] for (file, _, name), times in stats.items()}
    total = sum(own.values())
    dearest = sorted(own, key=lambda name: own[name], reverse=True)[:most]
    return [f"{name} {own[name] / total:.0%}" for name in dearest]


def _journal(recipe: config.Recipe, path: pathlib.Path) -> contextlib.AbstractContextManager[Journal]:
    return Journal.open(path, RUN, fsync=recipe.queue.fsync)
