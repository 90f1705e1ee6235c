"""Simple, correct peers of the queue at the level of its protocol: what they keep until it is acknowledged, what they
say again, and what is lost when they are killed.

They take turns under a virtual clock.  Between an engine and an actor there is HTTP, which loses nothing but with a
process; between a peer and the queue there is a `Link`, on which anything may happen (see `queue_world`).
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from queue_truth import Key, Truth, logprobs_of

from stream_rl import messages as m
from stream_rl.types import Version

RUN = "r"
RETRY_S = 2.0
ALIVE_S = 1.0


class Surroundings(Protocol):
    """What peers know of the world."""

    random: random.Random
    truth: Truth
    max_new: int
    members: int
    agents: bool
    """Trajectories have many turns, and episodes many trajectories."""
    weights: Version
    """What the publisher has to bring to the engines."""

    @property
    def final(self) -> Version | None:
        """The learner's last, once it is done."""

    def engine(self, name: str, incarnation: int) -> "Engine | None": ...
    def engines_at(self, version: Version) -> list[str]: ...
    def end(self, peer: "Peer") -> None: ...
    def new_tokens(self, count: int) -> range: ...
    def length_of(self, key: Key) -> int: ...
    def task_of(self, group: int) -> str: ...


@dataclass(eq=False, slots=True)
class Link:
    """The connection of one incarnation of a peer to the queue."""

    name: str
    up: deque[Any] = field(default_factory=deque)
    down: deque[Any] = field(default_factory=deque)


class Peer:
    role = ""

    def __init__(self, world: Surroundings, name: str, incarnation: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.alive = True
        self.link = Link(name)
        self.stalled_until = -math.inf
        self.welcome: m.Welcome | None = None
        """None while it is not registered."""
        self._greeted = self._lived = -math.inf
        self._kept: deque[Any] = deque()
        """Numbered messages that are not acknowledged."""
        self._next = 0
        self._sent_again = (-1, -math.inf)
        self._stuck = -1
        self._request: Any = None
        self._asked = -math.inf

    def turn(self, now: float) -> None:
        """Hear everything, then do something."""
        down = self.link.down
        while down and self.alive:
            self._hear(now, down.popleft())
        if not self.alive:
            return
        if self.welcome is None:
            if now - self._greeted >= RETRY_S:
                self._greeted = now
                self.link.up.append(self._hello())
            return
        self.work(now)
        if self._request is not None and now - self._asked >= RETRY_S:
            self._asked = now
            self.send(self._request)
        if now - self._lived >= ALIVE_S:
            self._lived = now
            self.send(self.sign_of_life())
            if self._kept and self._first == self._stuck:
                self.send(self._kept[-1])  # the queue asks for all of them if it misses one before
            self._stuck = self._first

    def reconnect(self) -> None:
        """Everything on its way is lost."""
        self.link.up.clear()
        self.link.down.clear()
        self.welcome, self._greeted = None, -math.inf

    # -- for those who inherit ---------------------------------------------------------------------------------

    def work(self, now: float) -> None:
        """Something of its own."""

    def heard(self, now: float, message: Any) -> None:
        """What is not of the session."""

    def killed(self) -> None:
        """Others notice."""

    def sign_of_life(self) -> Any:
        return m.Alive()

    def send(self, message: Any) -> None:
        if self.welcome is not None:
            self.link.up.append(message)

    def post(self, make: Callable[[int], Any]) -> int:
        """Number a message, and keep it."""
        self._kept.append(make(self._next))
        self._next += 1
        self.send(self._kept[-1])
        return self._next - 1

    def ask(self, request: Any) -> None:
        """Say it until `answered`."""
        self._request, self._asked = request, -math.inf

    def answered(self) -> None:
        self._request = None

    def acknowledged(self, sequence: int) -> bool:
        return self._first > sequence

    # -- its session with the queue ----------------------------------------------------------------------------

    def _hello(self) -> m.Hello:
        return m.Hello(run=RUN, role=self.role, name=self.name, incarnation=self.incarnation, pid=1, address="a")

    @property
    def _first(self) -> int:
        return self._next - len(self._kept)

    def _hear(self, now: float, message: Any) -> None:
        match message:
            case m.Ack():
                self._settle(message.next_sequence)
                if message.resend and (self._sent_again[0] != self._first or now - self._sent_again[1] >= RETRY_S):
                    self._send_all_again(now)
            case m.Welcome():
                assert message.next_sequence >= self._first, f"{self.name}: acknowledged messages are gone"
                self._settle(message.next_sequence)
                self.welcome, self._asked = message, -math.inf
                self._send_all_again(now)
                self.heard(now, message)
            case m.Refused(reason="not_registered"):
                self.welcome = None
            case m.Refused(reason="fenced" | "other_run"):
                self.world.end(self)
            case _:
                self.heard(now, message)

    def _settle(self, next_sequence: int) -> None:
        assert next_sequence <= self._next, f"{self.name}: the queue has messages that nobody sent"
        while self._first < next_sequence:
            self._kept.popleft()

    def _send_all_again(self, now: float) -> None:
        self._sent_again = (self._first, now)
        for message in self._kept:
            self.send(message)


# -- engines ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Request:
    """One segment in an engine."""

    rid: str
    key: Key
    segment: int
    goal: int
    """Tokens that it will have."""
    last: str
    """Its finish then."""
    answers: deque[tuple[str, str, int]]
    """Of its actor: where the answer goes."""
    ids: list[int] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    finish: str = ""
    streamed: int = 0


class Engine(Peer):
    role = "engine"

    def __init__(self, world: Surroundings, name: str, incarnation: int) -> None:
        super().__init__(world, name, incarnation)
        self.version = Version(0, 0)
        self.requests: dict[str, Request] = {}

    def sign_of_life(self) -> m.EngineStats:
        me: dict[str, Any] = {"engine": self.name, "incarnation": self.incarnation}
        return m.EngineStats(**me, version=self.version, counters={"wall_seconds": 1.0}, histograms={})

    def work(self, now: float) -> None:
        choose = self.world.random.random
        if self.version != self.world.weights and choose() < 0.2:
            self.version = self.world.weights
        if choose() < 0.7:
            self.generate(self.world.random.randrange(1, 7))
        if len(self._kept) < 8 and choose() < 0.6:
            self.flush()

    def generate(self, most: int) -> None:
        """All its requests grow."""
        for request in list(self.requests.values()):
            if request.finish:
                continue
            count = min(most, request.goal - len(request.ids))
            ids = self.world.new_tokens(count)
            request.ids += ids
            request.versions += [self.version] * count
            self.world.truth.sampled(request.key, request.segment, ids, self.version)
            if len(request.ids) == request.goal:
                self._finish(request, request.last)

    def _finish(self, request: Request, finish: str) -> None:
        request.finish = finish
        request.answers.append((request.rid, finish, len(request.ids)))

    def abort(self, rid: str) -> None:
        request = self.requests.get(rid)
        if request is None or request.finish:
            return
        self._finish(request, "abort")
        if not request.ids and self.world.random.random() < 0.5:
            del self.requests[rid]  # it was never scheduled: no row tells of its end

    def flush(self) -> None:
        """Everything that is new, and a little of what is not, as one message."""
        rows = [r for r in self.requests.values() if r.finish or len(r.ids) > r.streamed]
        if not rows:
            return
        overlap = self.world.random.choice((0, 0, 0, 1, 3))
        starts = [max(0, r.streamed - overlap) for r in rows]
        ids = np.array([i for r, s in zip(rows, starts, strict=True) for i in r.ids[s:]], np.int32)
        self._post(rows, starts, ids, logprobs_of(ids))
        for request in rows:
            request.streamed = len(request.ids)
            if request.finish:
                del self.requests[request.rid]

    def _post(self, rows: list[Request], starts: list[int], ids: np.ndarray, logprobs: np.ndarray) -> None:
        spans: list[tuple[int, int, int, int]] = []
        for row, (request, start) in enumerate(zip(rows, starts, strict=True)):
            spans += ((row, *version, count) for version, count in runs(request.versions[start:]))
        fields = {
            "rids": [r.rid for r in rows],
            "finishes": [r.finish for r in rows],
            "starts": np.array(starts, np.int64),
            "counts": np.array([len(r.ids) - s for r, s in zip(rows, starts, strict=True)], np.int32),
            "token_ids": ids,
            "logprobs": logprobs,
            "spans": np.array(spans, np.int64).reshape(-1, 4),
        }
        self.post(self._numbered(fields))

    def _numbered(self, fields: dict[str, Any]) -> Callable[[int], m.Chunks]:
        me: dict[str, Any] = {"run": RUN, "engine": self.name, "incarnation": self.incarnation}
        return lambda sequence: m.Chunks(**me, sequence=sequence, **fields)

    def tamper(self) -> None:
        """A bad row for one of its own requests: it may cost this trajectory and nothing else."""
        if not self.requests:
            return
        request = self.world.random.choice(list(self.requests.values()))
        kind = self.world.random.randrange(5)
        fields = {
            "rids": [request.rid],
            "finishes": ["bored" if kind == 0 else ""],
            "starts": np.array([request.streamed + (100 if kind == 1 else 0)], np.int64),
            "counts": np.array([1], np.int32),
            "token_ids": np.array([-1 if kind == 2 else 5], np.int32),
            "logprobs": np.array([math.nan if kind == 3 else -1.0], np.float32),
            "spans": np.array([[0, 99 if kind == 4 else 0, 0, 1]], np.int64),
        }
        self.world.truth.wronged(request.key)
        self.post(self._numbered(fields))

    def killed(self) -> None:
        for request in self.requests.values():
            if not request.finish:
                request.answers.append((request.rid, "unreachable", -1))
        self.requests.clear()


def runs(versions: list[Version]) -> Iterator[tuple[Version, int]]:
    """Neighbours that are the same, and how many."""
    count = 0
    for i, version in enumerate(versions):
        count += 1
        if i + 1 == len(versions) or versions[i + 1] != version:
            yield version, count
            count = 0
