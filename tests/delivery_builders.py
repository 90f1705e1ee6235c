"""A publisher's decisions, and engines that converse, stage and commit with the real code, on a wire made of lists."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from engine_builders import Engine, Rank, bits_of
from hypothesis import strategies as st
from update_builders import anchor_parts, make_chain, publish
from weights_builders import FIRST, RUN, Tensors, make_tensors, perturbed

from engines.weights.chain import Chain
from engines.weights.delivery import MAX_FAILURES, Delivery, Outgoing
from stream_rl import config, wire
from stream_rl.errors import WireError
from stream_rl.messages import Alive, CommitOrder, EngineHello, HashOrder, Live, PartTaken, Refused, UpdatePart
from stream_rl.types import Version

ENGINES = 2
RETRY_SECONDS = 2.0


@dataclass
class UnderWay:
    """What an engine was sent and said, as far as the publisher has heard."""

    target: Version
    attempt: int
    parts: int
    sent: dict[bytes, set[int]]
    taken: dict[bytes, set[int]]
    live: set[bytes] = field(default_factory=set)
    corrupt: int = 0

    def is_staged(self) -> bool:
        return all(len(taken) == self.parts for taken in self.taken.values())


@dataclass
class World:
    """A publisher, its engines, and what is on the wire between them."""

    seed: int = 0
    verify_every: int = 0
    keep: int = 3
    part_bytes: int = 40
    silence_seconds: float = math.inf
    ranks: int = 1
    parts_ahead: int = 3
    incarnation: int = 0
    chain: Chain = field(init=False)
    delivery: Delivery = field(init=False)
    engines: list[Engine] = field(init=False)
    line: list[Tensors] = field(init=False)
    stale: deque[tuple[bytes, Any]] = field(default_factory=deque)
    """Of incarnations that are gone."""
    reports: list[Any] = field(default_factory=list)
    under_way: dict[str, UnderWay] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    busy: bool = False
    """The thread in which updates are prepared has other things to do."""
    now: float = 0.0
    newest: Version = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.line, self.newest = [make_tensors(self.seed)], FIRST
        self.chain = make_chain(self.line[0], self.part_bytes, self.keep)
        self.delivery = self.new_delivery()
        self.engines = [Engine(f"engine-{i}", 1, self.line[0], ranks=self.ranks) for i in range(ENGINES)]

    def new_delivery(self) -> Delivery:
        weights = config.Weights(
            part_bytes=self.part_bytes, parts_ahead=self.parts_ahead, verify_every=self.verify_every
        )
        clock = lambda: self.now  # noqa: E731
        return Delivery(RUN, self.incarnation, self.chain, weights, RETRY_SECONDS, self.silence_seconds, clock)

    # -- the publisher -----------------------------------------------------------------------------------------

    def advance(self, share: float = 0.3) -> None:
        self.line.append(perturbed(self.line[-1], self.rng, share))
        self.newest = Version(self.newest.history, self.newest.step + 1)
        publish(self.chain, self.line[-2], self.line[-1], self.newest, part_bytes=self.part_bytes)
        self.tell()

    def fork(self, back: int) -> None:
        """The learner goes on from a checkpoint some steps ago."""
        self.line.append(self.line[max(0, len(self.line) - 1 - back)])
        self.newest = Version(self.newest.history + 1, max(0, self.newest.step - back))
        self.chain.advance(anchor_parts(self.line[-1], self.newest, self.part_bytes))
        self.tell()

    def tell(self) -> None:
        """The chain has a new version."""
        self.route(self.delivery.advance())
        self.work()

    def work(self) -> None:
        """Prepare what is wanted, if there is time for it."""
        while self.delivery.wanted and not self.busy:
            self.chain.prepare(self.delivery.wanted.pop())
            self.route(self.delivery.advance())

    def remind(self) -> bool:
        """Time passes in which nothing arrives.  True if the publisher still waits for somebody."""
        self.now += RETRY_SECONDS
        outgoing = self.delivery.remind()
        self.route(outgoing)
        return bool(outgoing)

    def restart_publisher(self, heard: int = 0) -> None:
        """A new one that knows only the newest version.  Of what engines had sent, the old one takes some with it."""
        self.chain = make_chain(self.line[-1], self.part_bytes, self.keep, self.newest)
        self.incarnation += 1
        self.delivery = self.new_delivery()
        self.under_way.clear()
        for rank in self.all_ranks():
            for _ in range(min(heard, len(rank.outbox))):
                rank.outbox.popleft()

    def hear(self, peer: bytes, message: Any) -> None:
        """The publisher handles one message."""
        [name] = [e.name for e in self.engines if any(r.peer == peer for r in e.ranks)] or [""]
        if (update := self.under_way.get(name)) is not None and self._ends(update, peer, message):
            del self.under_way[name]
        out = self.delivery.handle(peer, message)
        self.route(out)
        self.reports += self.delivery.reports
        self.delivery.reports.clear()
        self.work()

    def _ends(self, update: UnderWay, peer: bytes, message: Any) -> bool:
        """Nothing is under way after this message."""
        match message:
            case EngineHello():
                return True
            case PartTaken() if message.attempt == update.attempt:
                update.corrupt += message.corrupt
                if not message.problem and not message.corrupt and message.part in update.sent[peer]:
                    update.taken[peer].add(message.part)
                return bool(message.problem) or update.corrupt > update.parts * MAX_FAILURES
            case Live() if (message.target, message.attempt) == (update.target, update.attempt):
                update.live.add(peer)
                return len(update.live) == len(update.sent)
        return False

    def publisher_step(self, i: int, rank: int = 0) -> None:
        sender = self.engines[i].ranks[rank]
        if sender.outbox:
            self.hear(sender.peer, sender.outbox.popleft())

    def route(self, outgoing: Outgoing) -> None:
        """Put messages on the wire, and check that they are allowed to go out now."""
        for peer, message in outgoing:
            if isinstance(message, Refused):
                self.refused.append(message)
            [found] = [(e, r) for e in self.engines for r in e.ranks if r.peer == peer] or [None]
            if found is None:  # of an incarnation that is gone
                self.delivery.unreachable(peer)
                continue
            engine, rank = found
            if isinstance(message, UpdatePart):
                self._check_part(engine, rank, message)
            elif isinstance(message, CommitOrder):
                update = self.under_way[engine.name]
                assert (update.target, update.attempt) == (message.target, message.attempt) and update.is_staged()
            elif isinstance(message, HashOrder):
                assert engine.name not in self.under_way, "weights are recomputed while nothing is under way"
            rank.inbox.append(message)

    def _check_part(self, engine: Engine, rank: Rank, part: UpdatePart) -> None:
        assert part.target_hash == self.chain.hashes[part.target]
        update = self.under_way.get(engine.name)
        if update is None or part.attempt != update.attempt:
            assert update is None, "one update at a time"
            peers = [each.peer for each in engine.ranks]
            sent, taken = ({peer: set[int]() for peer in peers} for _ in range(2))
            update = self.under_way[engine.name] = UnderWay(part.target, part.attempt, part.parts, sent, taken)
        update.sent[rank.peer].add(part.part)
        assert (part.target, part.parts) == (update.target, update.parts)
        assert len(update.sent[rank.peer] - update.taken[rank.peer]) <= self.parts_ahead, (
            "no more than it has credit for"
        )

    # -- what befalls them ---------------------------------------------------------------------------------------

    def restart(self, i: int) -> None:
        old = self.engines[i]
        self.stale.extend((rank.peer, message) for rank in old.ranks for message in rank.outbox)
        self.engines[i] = Engine(old.name, old.incarnation + 1, self.line[0], ranks=self.ranks)
        self.under_way.pop(old.name, None)

    def flip(self, i: int, rank: int = 0) -> None:
        """A bit flips in a live parameter."""
        parameters = list(self.engines[i].ranks[rank].model.parameters())
        bits_of(parameters[int(self.rng.integers(len(parameters)))]).view(-1)[0] ^= 1

    def befall(self, fault: str, wire_: deque[Any]) -> None:
        """A fault meets one of the messages on a wire.

        Corruption only meets parts of updates, since everything else is short and left to TCP's checksum."""
        if not wire_:
            return
        n = int(self.rng.integers(len(wire_)))
        match fault:
            case "lose":
                del wire_[n]
            case "repeat":
                wire_.insert(int(self.rng.integers(n + 1, len(wire_) + 1)), wire_[n])
            case "reorder":
                message = wire_[n]
                del wire_[n]
                wire_.insert(int(self.rng.integers(len(wire_) + 1)), message)
            case "corrupt" if isinstance(wire_[n], UpdatePart):
                self.corrupt(wire_, n)

    def corrupt(self, wire_: deque[Any], n: int) -> None:
        """Some bits flip in a part, wherever; what cannot be read then is dropped, as the transport does."""
        frames = [bytearray(frame) for frame in wire.encode(wire_[n])]
        frame = frames[int(self.rng.integers(len(frames)))] or frames[0]
        frame[int(self.rng.integers(len(frame)))] ^= int(self.rng.integers(1, 256))
        try:
            wire_[n] = wire.decode([bytes(each) for each in frames])
        except WireError:
            del wire_[n]

    # -- the end ---------------------------------------------------------------------------------------------------

    def all_ranks(self, which: Iterable[int] = range(ENGINES)) -> list[Rank]:
        return [rank for i in which for rank in self.engines[i].ranks]

    def settle(self, which: Iterable[int] = range(ENGINES), limit: int = 4000) -> None:
        """Deliver everything there is, fairly, until time passes and nobody has anything to say."""
        chosen, self.busy = list(which), False
        self.work()
        for _ in range(limit):
            if all(self.engines[i].is_at_rest() for i in chosen) and self._all_said(chosen):
                return
            for i in chosen:
                for rank in range(self.ranks):
                    self.engines[i].step(rank)
                    self.publisher_step(i, rank)
        raise AssertionError("publisher and engines never come to rest")

    def _all_said(self, chosen: list[int]) -> bool:
        ranks = self.all_ranks(chosen)
        for rank in ranks:
            rank.beat()
        if all([type(message) for message in rank.outbox] == [Alive] for rank in ranks):
            for rank in ranks:
                self.hear(rank.peer, rank.outbox.popleft())
        # who is left out on purpose would be reminded too
        waits = len(chosen) == ENGINES and self.remind()
        return not waits and all(self.engines[i].is_at_rest() for i in chosen)

    def finish(self, which: Iterable[int] = range(ENGINES)) -> None:
        assert self.chain.version is not None
        self.route(self.delivery.finish(self.chain.version))
        self.settle(which)

    def assert_all_newest(self) -> None:
        for rank in self.all_ranks():
            assert rank.live.version == self.newest
            assert rank.holds(self.line[-1])

    def of(self, kind: type[Any], engine: int = 0) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind) and report.engine == f"engine-{engine}"]


ACTIONS = ["advance", "engine", "engine", "engine", "publisher", "publisher", "publisher", "busy", "remind"]
FAULTS = ["lose", "repeat", "reorder", "corrupt"]


def play(world: World, data: st.DataObject, extra: list[str]) -> None:
    """A random run of everything that can happen, then a fair end."""
    for action in data.draw(st.lists(st.sampled_from([*ACTIONS, *extra]), max_size=80)):
        i, rank = data.draw(st.integers(0, ENGINES - 1)), data.draw(st.integers(0, world.ranks - 1))
        engine = world.engines[i]
        world.now += 1.0
        match action:
            case "advance":
                world.advance(data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])))
            case "engine":
                for _ in range(data.draw(st.sampled_from([1, 1, 3, 20]))):
                    engine.step(rank)
            case "publisher":
                for _ in range(data.draw(st.sampled_from([1, 1, 3, 20]))):
                    world.publisher_step(i, rank)
            case "busy":
                world.busy = not world.busy
            case "remind":
                world.remind()
            case "restart":
                world.restart(i)
            case "restart_publisher":
                world.restart_publisher(data.draw(st.integers(0, 3)))
            case "fork":
                world.fork(data.draw(st.integers(0, 3)))
            case "take":  # a commit may be on its way
                engine.ranks[rank].take()
            case "beat":
                engine.ranks[rank].beat()
            case "greet":
                engine.ranks[rank].greet()
            case "stale" if world.stale:
                world.hear(*world.stale.popleft())
            case "flip":
                world.flip(i, rank)
            case "lose" | "repeat" | "reorder" | "corrupt":
                way = engine.ranks[rank].outbox if data.draw(st.booleans()) else engine.ranks[rank].inbox
                world.befall(action, way)
    world.settle()
    while world.stale:
        world.hear(*world.stale.popleft())
    world.settle()
