"""A simulated engine: continuous batching at a speed that falls with the number of requests, and chunks as ours.

A decode step of n requests takes `step_s + n * step_request_s`, for `slots` requests at most; the others wait.  Time
passes in rounds of `chunk_tokens` decode steps.  New weights are live within a round, between two of its steps.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scripts.simulation.clock import Clock
from scripts.simulation.lengths import Episode
from scripts.simulation.setting import Setting
from stream_rl import messages as m
from stream_rl.types import Finish, Int64Array, Version


@dataclass(slots=True, eq=False)
class Request:
    """One segment in an engine."""

    rid: str
    group: int
    member: int
    segment: int
    episode: Episode
    done: int
    """Tokens so far, over all segments."""
    base: int
    """Tokens of the segments before this one."""
    ended: Callable[["Request", Finish], None]
    """Told of the finish, as by the HTTP response."""
    first: int = -1
    """Step of the version that sampled the trajectory's first token."""
    gone: bool = False
    turn: int = 0
    """Waits for the environment that lie behind it."""
    stop: int = 0
    """Tokens at which it leaves its slot: for the environment, or for good."""

    @property
    def is_over(self) -> bool:
        """As a segment."""
        return self.done == (self.stop if self.episode.apart else self.episode.tokens)

    def go_on(self) -> None:
        waits = self.episode.waits
        while self.turn < len(waits) and waits[self.turn][0] <= self.done:
            self.turn += 1
        self.stop = waits[self.turn][0] if self.turn < len(waits) else self.episode.tokens


class Engine:
    def __init__(self, name: str, run: str, setting: Setting, clock: Clock, say: Callable[[object], None]) -> None:
        self.name = name
        self.live = Version(0, 0)
        self.flips_in_flight = True
        """False: new weights wait until nothing runs, as in systems that generate whole batches."""
        self.generated = 0
        self.requests: dict[str, Request] = {}
        self._run, self._setting, self._clock, self._say = run, setting, clock, say
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._busy = False
        self._began = 0.0
        self._versions: list[tuple[float, Version]] = []
        """(since when, version) within the round."""
        self._next: Version | None = None
        self._aborted: list[Request] = []
        self._sequence = 0
        most = setting.slots * setting.chunk_tokens
        self._tokens, self._logprobs = np.zeros(most, np.int32), np.zeros(most, np.float32)

    @property
    def load(self) -> int:
        return len(self.requests)

    def hello(self) -> None:
        self._say(m.Hello(run=self._run, role="engine", name=self.name, incarnation=1, pid=1, address=self.name))
        stats = m.EngineStats(engine=self.name, incarnation=1, version=self.live, counters={}, histograms={})
        self._say(stats)

    def submit(self, request: Request) -> None:
        self.requests[request.rid] = request
        self._enter(request)

    def abort(self, rid: str) -> None:
        """Its last row and its response follow, as after SGLang's abort."""
        if (request := self.requests.pop(rid, None)) is not None:
            request.gone = True
            if not self._aborted:
                self._clock.after(0.0, self._say_aborted)
            self._aborted.append(request)

    def publish(self, version: Version) -> None:
        if self._busy and self.flips_in_flight:
            self._versions.append((self._clock.now, version))
        elif self._busy:
            self._next = version
        else:
            self.live = version

    # -- rounds ------------------------------------------------------------------------------------------------

    def _enter(self, request: Request) -> None:
        if not request.gone:
            request.go_on()
            self._waiting.append(request)
            self._begin()

    def _begin(self) -> None:
        if self._busy:
            return
        self._running = [request for request in self._running if not request.gone]
        while self._waiting and len(self._running) < self._setting.slots:
            if not (request := self._waiting.popleft()).gone:
                self._running.append(request)
        if self._running:
            self._busy, self._began = True, self._clock.now
            self._versions = [(self._began, self.live)]
            self._clock.after(self._round_s, self._end)
        elif self._next is not None:
            self.live, self._next = self._next, None

    @property
    def _round_s(self) -> float:
        setting = self._setting
        return setting.chunk_tokens * (setting.step_s + len(self._running) * setting.step_request_s)

    def _end(self) -> None:
        """Consume the round: say its chunks, then let requests go that are through."""
        steps = self._setting.chunk_tokens
        elapsed = max(self._clock.now - self._began, 1e-9)
        marks = [(round(steps * (since - self._began) / elapsed), version) for since, version in self._versions]
        self.live = self._versions[-1][1]
        running = [request for request in self._running if not request.gone]
        leaving: list[Request] = []
        rids, finishes, starts, counts = [], [], [], []
        for request in running:
            count = min(steps, request.stop - request.done)
            rids.append(request.rid)
            starts.append(request.done - request.base)
            counts.append(count)
            if request.first < 0:
                request.first = marks[0][1].step
            request.done += count
            finishes.append(Finish.STOP if request.is_over else Finish.NONE)
            if request.done == request.stop:
                leaving.append(request)
        self._send(rids, finishes, starts, counts, _spans(counts, marks))
        self._busy = False
        if leaving:
            left = set(leaving)
            self._running = [request for request in running if request not in left]
        for request in leaving:
            if request.is_over:
                del self.requests[request.rid]
                request.ended(request, Finish.STOP)
            else:
                self._clock.after(request.episode.waits[request.turn][1], functools.partial(self._enter, request))
        self._begin()

    def _say_aborted(self) -> None:
        aborted, self._aborted = self._aborted, []
        starts = [request.done - request.base for request in aborted]
        rids, finishes = [request.rid for request in aborted], [Finish.ABORT] * len(aborted)
        self._send(rids, finishes, starts, [0] * len(aborted), np.zeros((0, 4), np.int64))
        for request in aborted:
            request.ended(request, Finish.ABORT)
        self._begin()

    def _send(
        self, rids: list[str], finishes: list[Finish], starts: list[int], counts: list[int], spans: Int64Array
    ) -> None:
        if not rids:
            return
        total = sum(counts)
        self.generated += total
        self._sequence += 1
        self._say(
            m.Chunks(
                run=self._run,
                engine=self.name,
                incarnation=1,
                sequence=self._sequence - 1,
                rids=rids,
                finishes=[str(finish) for finish in finishes],
                starts=np.array(starts, np.int64),
                counts=np.array(counts, np.int32),
                token_ids=self._tokens[:total],
                logprobs=self._logprobs[:total],
                spans=spans,
            )
        )


def _spans(counts: list[int], marks: list[tuple[int, Version]]) -> Int64Array:
    """Versions of every row's tokens: from mark i on, decode steps are of version i."""
    bounds = [*(step for step, _ in marks[1:]), 1 << 30]
    rows = []
    for row, count in enumerate(counts):
        begin = 0
        for (_, version), bound in zip(marks, bounds, strict=True):
            end = min(bound, count)
            if end > begin:
                rows.append((row, version.history, version.step, end - begin))
                begin = end
    return np.array(rows, np.int64).reshape(-1, 4)
