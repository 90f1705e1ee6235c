"""Weight updates inside an engine: received in parts, checked, staged in the background, live between two steps.

Two threads share this.  The plugin's thread receives, decodes, checks and stages; the scheduler's thread only runs
`commit`.  At most one update is under way: the publisher sends the next after it heard `Live`.

Invariant: nothing is written to a live parameter before the whole update is here and fits the live version.  A rank
that holds all of the model also knows by then that it leads to the fingerprint that the publisher stated; of several
ranks only the publisher can add up what they say.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from engines.sglang import settling
from engines.sglang.load_map import Holders, LoadMap
from engines.sglang.writes import Writes, joined, placed
from engines.weights import fingerprint, parts
from engines.weights.codes import payload
from engines.weights.codes.payload import Code
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version


class Line(NamedTuple):
    """What the parts of one update have in common."""

    attempt: int
    base: Version
    target: Version
    anchor: bool
    parts: int
    target_hash: str


class Staged(NamedTuple):
    """A whole update, ready to be written."""

    line: Line
    writes: Writes
    sums: dict[Holders, int]
    """What the fingerprints will be."""
    commits: int
    """Made before it was begun: it applies to what was live then."""
    seconds: float


class LiveWeights:
    """The live version of one rank, and the update on its way to replace it."""

    def __init__(self, run: str, load_map: LoadMap, version: Version) -> None:
        self._run = run
        self._map = load_map
        self.version = version
        """Read by the scheduler's thread at every launch; flipped there by `commit`."""
        self._sums = load_map.live_sums()
        self._under_way: Line | None = None
        self._parts: dict[int, Writes] = {}
        """Those of `_under_way` that are here, each decoded when it came, so that the thread had time for other things
        in between."""
        self._started = 0.0
        self._staged: Staged | None = None
        self._replaced: Staged | None = None
        """What was staged before: its commit may be on its way from rank 0 although its publisher is gone."""
        self._live: Line | None = None
        """What was committed last."""
        self._commits = self._begun_after = 0
        """How many there were, and how many when `_under_way` began."""
        self.stage_seconds = 0.0
        """From the first part of the last committed update until it was staged."""
        self._writing: Writes | None = None
        """Of the last commit: on a GPU they may still be under way."""
        self._lock = threading.Lock()
        """Between staging and a commit that comes unforeseen, as on ranks that do not order it themselves."""
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        """On a GPU: around the last commit's writes; the plugin's stream waits for them before it reads them."""

    def prepare(self) -> None:
        """Compile what staging needs, which takes seconds on a GPU: before anybody waits for it."""
        settling.prepare(self._map.arenas)

    @property
    def device(self) -> torch.device:
        """Where the live weights are."""
        return self._map.device

    @property
    def weights_hash(self) -> str:
        """Incremental fingerprint of what this rank counts of the live weights."""
        rank = self._map.rank
        return fingerprint.text(sum(n for holders, n in self._sums.items() if holders[0] == rank) % (1 << 64))

    @property
    def replicas(self) -> dict[str, str]:
        """Those of what other ranks hold as well, by the ranks."""
        shared = {holders: n for holders, n in self._sums.items() if len(holders) > 1}
        return {",".join(map(str, holders)): fingerprint.text(n) for holders, n in sorted(shared.items())}

    @property
    def staged(self) -> tuple[Version, int] | None:
        """Target and attempt of the update that waits for its commit."""
        return None if self._staged is None else (self._staged.line.target, self._staged.line.attempt)

    @property
    def live(self) -> tuple[Version, int] | None:
        """Target and attempt of the last commit."""
        return None if self._live is None else (self._live.target, self._live.attempt)

    @property
    def attempt(self) -> int | None:
        """Of the update that came last, unless it was forgotten."""
        return None if self._under_way is None else self._under_way.attempt

    def forget_staged(self) -> None:
        """Who sent what is here is gone.  An ordered commit of it may still come."""
        with self._lock:
            self._parts.clear()
            self._under_way = None
            self._replace()

    def receive(self, part: UpdatePart) -> bool:
        """Take one part; the last makes the update `staged`.  False if it belongs to an older attempt.

        Raises CorruptPart if it is to be sent again, and WeightsError, saying why, if the update cannot be applied
        here; what was received of it is then forgotten.
        """
        parts.check(part)
        line = Line(part.attempt, part.base, part.target, part.anchor, part.parts, part.target_hash)
        if line == self._live or (self._staged is not None and line == self._staged.line):
            return True
        if self._under_way is not None and part.attempt < self._under_way.attempt:
            return False
        try:
            self._receive(part, line)
        except WeightsError:
            self._parts.clear()
            raise
        return True

    def _receive(self, part: UpdatePart, line: Line) -> None:
        if part.run != self._run:
            raise WeightsError(f"this engine belongs to run {self._run!r}, the update to run {part.run!r}")
        if part.target.history < self.version.history:
            raise WeightsError(
                f"version {part.target} is of a line of training that has ended, this engine holds {self.version}"
            )
        if line != self._under_way:
            self._parts.clear()
            self._under_way, self._started = line, time.perf_counter()
            with self._lock:
                self._begun_after = self._commits
                self._replace()  # the publisher gave that one up, or it would have waited
        self._check_base(line, self._begun_after)
        if part.part not in self._parts:
            self._wait_for_writes()
            self._parts[part.part] = placed(parts.runs(part, self._held(part)), self._map, line.anchor)
        if len(self._parts) == line.parts:
            staged = self._whole(line)
            with self._lock:
                self._check_base(line, staged.commits)
                self._staged = staged
            self._parts.clear()

    def _held(self, part: UpdatePart) -> parts.Held | None:
        """Old bits for a code that needs them, read from live memory."""
        small = part.names and payload.code_of(part.payload) is Code.SMALL
        return self._live_bits if small else None

    def _live_bits(self, name: str, start: int, count: int) -> torch.Tensor:
        shape = self._map.shapes.get(name)
        if shape is None or start + count > shape.elements:
            raise WeightsError(f"the update has elements {start} to {start + count} of {name}; this engine has {shape}")
        return self._map.read(name, start, count).cpu()

    def _whole(self, line: Line) -> Staged:
        """All parts are here."""
        writes = joined([self._parts[number] for number in range(line.parts)], self._map)
        if line.anchor and writes.covered != self._map.elements:
            raise WeightsError(
                f"the anchor of version {line.target} has {writes.covered} of the {self._map.elements} elements that "
                "this rank holds"
            )
        old = self._map.zeros() if line.anchor else self._sums
        sums = {holders: (old[holders] + gain) % (1 << 64) for holders, gain in writes.gained.items()}
        total = fingerprint.text(sum(sums.values()) % (1 << 64))
        if self._map.ranks == 1 and total != line.target_hash:
            raise WeightsError(
                f"version {line.target} would have fingerprint {total} here, the publisher states {line.target_hash}"
            )
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # staged means on the device, whatever stream reads it next
        return Staged(line, writes, sums, self._begun_after, time.perf_counter() - self._started)

    def _check_base(self, line: Line, commits: int) -> None:
        if not line.anchor and (line.base != self.version or commits != self._commits):
            raise WeightsError(
                f"the update to {line.target} needs version {line.base} as it was, this engine holds {self.version}"
            )

    def _replace(self) -> None:
        if self._staged is not None:
            self._replaced, self._staged = self._staged, None

    def _wait_for_writes(self) -> None:
        if self._events is not None:
            torch.cuda.current_stream().wait_event(self._events[1])

    def commit(
        self, target: Version, attempt: int, on_forward_stream: Callable[[], AbstractContextManager[object]]
    ) -> float:
        """Scheduler's thread, between two steps: write, then flip the version.  Returns the seconds it took.

        The writes are enqueued on the stream of the forward passes, behind the last launched one and before the next,
        so a pass computes with the weights of exactly one version.
        """
        start = time.perf_counter()
        with self._lock:
            staged = self._take(target, attempt)
            before, self._writing = self._writing, staged.writes
            with torch.no_grad(), on_forward_stream():
                self._write(staged.writes)
            self.version, self._sums, self._live = target, staged.sums, staged.line
            self._commits += 1
            self.stage_seconds = staged.seconds
        del before  # only now: the memory may be used again once nothing can be reading it
        return time.perf_counter() - start

    def _take(self, target: Version, attempt: int) -> Staged:
        for staged in (self._staged, self._replaced):
            if staged is not None and (staged.line.target, staged.line.attempt) == (target, attempt):
                self._check_base(staged.line, staged.commits)
                self._staged = self._replaced = None
                return staged
        raise WeightsError(f"asked to make {target} live (attempt {attempt}), staged is {self.staged or 'nothing'}")

    def _write(self, writes: Writes) -> None:
        if self.device.type != "cuda":
            writes.write()
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        writes.write()
        ended.record()
        self._events = began, ended

    def replaced(self, version: Version) -> None:
        """Scheduler's thread: all weights are those of `version` now, by no update of ours.  The fingerprint is that of
        what was there before until `recompute`."""
        with self._lock:
            self.version, self._live = version, None
            self._commits += 1

    def write_seconds(self) -> float:
        """What the last commit's writes took on a GPU, after waiting for their end; elsewhere the commit itself has
        waited."""
        if self._events is None:
            return 0.0
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3

    def recompute(self) -> bool:
        """Fingerprints from all live parameters.  False if a commit came in between, and they are of no version.

        Raises WeightsError if copies within the rank differ."""
        self._wait_for_writes()
        commits = self._commits
        sums = self._map.live_sums()
        with self._lock:
            if self._commits != commits:
                return False
            self._sums = sums
        return True
