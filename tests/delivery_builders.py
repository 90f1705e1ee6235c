"""A publisher's decisions, and engines that converse, stage and commit with the real code, on a wire made of lists."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from weights_builders import (
    FIRST,
    RUN,
    Tensors,
    bits_of,
    make_chain,
    make_live,
    make_tensors,
    perturbed,
    same_bits,
)

from engines.sglang.plugin import PluginSettings
from engines.sglang.publisher_conversation import PublisherConversation
from engines.weights import fingerprint
from engines.weights.chain import Chain
from engines.weights.delivery import Delivery, Outgoing
from stream_rl.messages import (
    Alive,
    CommitOrder,
    EngineHello,
    HashOrder,
    HashReport,
    Live,
    Refused,
    Staged,
    UpdatePart,
)
from stream_rl.types import Version

ENGINES = 2


def plugin_settings(engine: str = "engine-0", incarnation: int = 1, **changes: Any) -> PluginSettings:
    fields: dict[str, Any] = {
        "http_address": "http://127.0.0.1:1",
        "queue_address": "",
        "publisher_address": "",
        "chunk_tokens": 4,
        "chunk_seconds": 0.2,
        "buffer_bytes": 1 << 20,
        "resend_seconds": 1.0,
        "launcher_pid": 0,
    }
    return PluginSettings(run=RUN, engine=engine, incarnation=incarnation, **(fields | changes))


class Engine:
    """One incarnation of an engine of one rank: its real conversation, without its threads and sockets."""

    def __init__(self, name: str, incarnation: int, tensors: Tensors, version: Version = FIRST) -> None:
        self.name, self.incarnation = name, incarnation
        self.peer = f"{name}/0@{incarnation}".encode()
        self.live, self.model = make_live(tensors, version)
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()
        self.received: list[Any] = []
        self.ordered: Version | None = None
        """What the scheduler was told to make live."""
        self.now = 0.0
        self.conversation = PublisherConversation(
            plugin_settings(name, incarnation), 0, 1, self.live, self._send, self._order
        )
        self.conversation.tick(self.now)

    def _send(self, message: Any) -> bool:
        self.outbox.append(message)
        return True

    def _order(self, target: Version) -> None:
        assert self.ordered is None, "one commit at a time"
        self.ordered = target

    @property
    def me(self) -> dict[str, Any]:
        return {"engine": self.name, "incarnation": self.incarnation, "rank": 0}

    def hello(self) -> EngineHello:
        weights_hash = fingerprint.text(self.live.fingerprint)
        return EngineHello(run=RUN, ranks=1, version=self.live.version, weights_hash=weights_hash, **self.me)

    def step(self) -> None:
        """Make live what was ordered, or else handle one message."""
        if self.ordered is not None:
            target, self.ordered = self.ordered, None
            self.live.commit(target, nullcontext)
            self.conversation.live(target, 0.25, "")
            self.conversation.tick(self.now)
        else:
            self.take()

    def take(self) -> None:
        """Handle one message, even while a commit is on its way through the scheduler."""
        if self.inbox:
            self.received.append(self.inbox.popleft())
            self.conversation.handle(self.received[-1], self.now)
            self.conversation.tick(self.now)

    def beat(self) -> None:
        """A second goes by."""
        self.now += 1.0
        self.conversation.tick(self.now)

    def greet(self) -> None:
        """The publisher did not know it."""
        self.now += 1.0
        self.conversation.handle(Refused(reason="unknown_engine", detail=""), self.now)
        self.conversation.tick(self.now)

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(message, kind) for message in self.received)


@dataclass
class World:
    """A publisher, its engines, and what is on the wire between them."""

    seed: int = 0
    verify_every: int = 0
    keep: int = 3
    part_bytes: int = 40
    silence_seconds: float = math.inf
    incarnation: int = 0
    chain: Chain = field(init=False)
    delivery: Delivery = field(init=False)
    engines: list[Engine] = field(init=False)
    line: list[Tensors] = field(init=False)
    stale: deque[tuple[bytes, Any]] = field(default_factory=deque)
    """Of incarnations that are gone."""
    reports: list[Any] = field(default_factory=list)
    under_way: dict[str, tuple[Version, int]] = field(default_factory=dict)
    """Target and attempt of the update that each engine was sent."""
    staged: set[str] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)
    now: float = 0.0
    newest: Version = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.line, self.newest = [make_tensors(self.seed)], FIRST
        self.chain = make_chain(self.line[0], self.part_bytes, self.keep)
        self.delivery = self.new_delivery()
        self.engines = [Engine(f"engine-{i}", 1, self.line[0]) for i in range(ENGINES)]

    def new_delivery(self) -> Delivery:
        return Delivery(RUN, self.incarnation, self.chain, self.verify_every, self.silence_seconds, lambda: self.now)

    def advance(self, share: float = 0.3) -> None:
        self.line.append(perturbed(self.line[-1], self.rng, share))
        self.publish(Version(self.newest.history, self.newest.step + 1))

    def fork(self, back: int) -> None:
        """The learner goes on from a checkpoint some steps ago."""
        self.line.append(self.line[max(0, len(self.line) - 1 - back)])
        self.publish(Version(self.newest.history + 1, max(0, self.newest.step - back)))

    def publish(self, version: Version) -> None:
        self.newest = version
        self.chain.advance(version, bits_of(self.line[-1]))
        self.route(self.delivery.advance(), None, "")

    def restart_publisher(self, heard: int = 0) -> None:
        """A new one that knows only the newest version.  Of what engines had sent, the old one takes some with it."""
        self.chain = make_chain(self.line[-1], self.part_bytes, self.keep, self.newest)
        self.incarnation += 1
        self.delivery = self.new_delivery()
        self.under_way.clear()
        self.staged.clear()
        for engine in self.engines:
            for _ in range(min(heard, len(engine.outbox))):
                engine.outbox.popleft()

    def route(self, outgoing: Outgoing, cause: Any, sender: str) -> None:
        """Put messages on the wire, and check that they are allowed to go out now."""
        batches: dict[str, list[UpdatePart]] = {}
        for peer, message in outgoing:
            if isinstance(message, Refused):
                self.refused.append(message)
            [engine] = [e for e in self.engines if e.peer == peer] or [None]
            if engine is None:
                continue  # of an incarnation that is gone; the router drops it
            if isinstance(message, UpdatePart):
                batches.setdefault(engine.name, []).append(message)
            elif isinstance(message, CommitOrder):
                assert self.under_way[engine.name][0] == message.target and engine.name in self.staged
            elif isinstance(message, HashOrder):
                assert engine.name not in self.under_way, "weights are recomputed while nothing is under way"
            engine.inbox.append(message)
        for name, parts in batches.items():
            ended = sender == name and (
                isinstance(cause, (EngineHello, Live, HashReport)) or (isinstance(cause, Staged) and cause.problem)
            )
            assert ended or name not in self.under_way, "no update starts while one is under way"
            assert [part.part for part in parts] == list(range(parts[0].parts)), "all parts of one update"
            assert len({(part.base, part.target, part.anchor, part.target_hash) for part in parts}) == 1
            assert parts[0].target_hash == self.chain.hashes[parts[0].target]
            self.under_way[name] = (parts[0].target, parts[0].attempt)
            self.staged.discard(name)

    def hear(self, peer: bytes, message: Any) -> None:
        """The publisher handles one message."""
        [name] = [e.name for e in self.engines if e.peer == peer] or [""]
        if under_way := self.under_way.get(name):
            if isinstance(message, Staged) and not message.problem and under_way[1] == message.attempt:
                self.staged.add(name)
            if isinstance(message, EngineHello) or (isinstance(message, Live) and under_way[0] == message.target):
                del self.under_way[name]
        out = self.delivery.handle(peer, message)
        self.route(out, message, name)
        self.reports += self.delivery.reports
        self.delivery.reports.clear()

    def publisher_step(self, i: int) -> None:
        if self.engines[i].outbox:
            self.hear(self.engines[i].peer, self.engines[i].outbox.popleft())

    def restart(self, i: int) -> None:
        old = self.engines[i]
        self.stale.extend((old.peer, message) for message in old.outbox)
        self.engines[i] = Engine(old.name, old.incarnation + 1, self.line[0])
        self.under_way.pop(old.name, None)

    def corrupt(self, i: int) -> None:
        """A bit flips in a part of a delta that is on its way."""
        inbox = self.engines[i].inbox
        for n, message in enumerate(inbox):
            if isinstance(message, UpdatePart) and not message.anchor and message.payload.size:
                payload = message.payload.copy()
                payload[-1] ^= 1
                inbox[n] = dataclasses.replace(message, payload=payload)
                return

    def flip(self, i: int) -> None:
        """A bit flips in a live parameter."""
        parameters = list(self.engines[i].model.parameters())
        chosen = parameters[int(self.rng.integers(len(parameters)))]
        fingerprint.bits_of(chosen.data).view(-1)[0] ^= 1

    def settle(self, which: Iterable[int] = range(ENGINES), limit: int = 3000) -> None:
        """Deliver everything there is, fairly, until a second goes by in which nobody has anything to say."""
        chosen = [self.engines[i] for i in which]
        for _ in range(limit):
            if not any(e.inbox or e.outbox or e.ordered for e in chosen):
                for engine in chosen:
                    engine.beat()
                if all([type(m) for m in e.outbox] == [Alive] for e in chosen):
                    for engine in chosen:
                        self.hear(engine.peer, engine.outbox.popleft())
                if not any(e.inbox or e.outbox for e in chosen):
                    return
            for engine in chosen:
                engine.step()
                self.publisher_step(self.engines.index(engine))
        raise AssertionError("publisher and engines never come to rest")

    def finish(self, which: Iterable[int] = range(ENGINES)) -> None:
        assert self.chain.version is not None
        self.route(self.delivery.finish(self.chain.version), None, "")
        self.settle(which)

    def assert_all_newest(self) -> None:
        for engine in self.engines:
            assert engine.live.version == self.newest
            assert same_bits(engine.model.live(), self.line[-1])

    def of(self, kind: type[Any], engine: int = 0) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind) and report.engine == f"engine-{engine}"]


class Ranks:
    """An engine of several ranks whose fingerprints add up to the model's."""

    def __init__(self, ranks: int, verify_every: int = 0) -> None:
        self.ranks, tensors = ranks, make_tensors(0)
        self.chain = make_chain(tensors, 1 << 20)
        self.next = perturbed(tensors, np.random.default_rng(0), 0.3)
        self.delivery = Delivery(RUN, 0, self.chain, verify_every, math.inf, lambda: 0.0)

    def share(self, version: Version, rank: int) -> str:
        """Random shares that add up to the version's fingerprint."""
        shares = [int(n) for n in np.random.default_rng(version.step).integers(0, 2**63, self.ranks)]
        shares[-1] = (int(self.chain.hashes[version], 16) - sum(shares[:-1])) % (1 << 64)
        return fingerprint.text(shares[rank])

    def tell(self, kind: type[Any], rank: int, **fields: Any) -> Outgoing:
        return self.delivery.handle(f"e/{rank}".encode(), kind(engine="e", incarnation=1, rank=rank, **fields))

    def hello(self, rank: int) -> Outgoing:
        return self.tell(
            EngineHello, rank, run=RUN, ranks=self.ranks, version=FIRST, weights_hash=self.share(FIRST, rank)
        )

    def staged(self, rank: int, problem: str = "", attempt: int = 1) -> Outgoing:
        return self.tell(Staged, rank, target=Version(0, 1), attempt=attempt, problem=problem)

    def live(self, rank: int, **change: Any) -> Outgoing:
        fields = {
            "weights_hash": self.share(Version(0, 1), rank),
            "stage_seconds": 1.0 + rank,
            "stall_seconds": 0.5,
        } | change
        return self.tell(Live, rank, target=Version(0, 1), **fields)

    def begin(self) -> Outgoing:
        for rank in range(self.ranks):
            assert self.hello(rank) == []
        self.chain.advance(Version(0, 1), bits_of(self.next))
        return self.delivery.advance()


ACTIONS = ["advance", "engine", "engine", "engine", "publisher", "publisher", "publisher"]


def play(world: World, data: st.DataObject, extra: list[str]) -> None:
    """A random run of everything that can happen, then a fair end."""
    for action in data.draw(st.lists(st.sampled_from([*ACTIONS, *extra]), max_size=80)):
        i = data.draw(st.integers(0, ENGINES - 1))
        world.now += 1.0
        match action:
            case "advance":
                world.advance(data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])))
            case "engine":
                for _ in range(data.draw(st.sampled_from([1, 1, 3, 20]))):
                    world.engines[i].step()
            case "publisher":
                world.publisher_step(i)
            case "restart":
                world.restart(i)
            case "restart_publisher":
                world.restart_publisher(data.draw(st.integers(0, 3)))
            case "fork":
                world.fork(data.draw(st.integers(0, 3)))
            case "take":  # a commit may be on its way
                world.engines[i].take()
            case "beat":
                world.engines[i].beat()
            case "greet":
                world.engines[i].greet()
            case "stale" if world.stale:
                world.hear(*world.stale.popleft())
            case "corrupt":
                world.corrupt(i)
            case "flip":
                world.flip(i)
            case "repeat" if world.engines[i].outbox and not isinstance(world.engines[i].outbox[-1], EngineHello):
                world.engines[i].outbox.append(world.engines[i].outbox[-1])
    world.settle()
    while world.stale:
        world.hear(*world.stale.popleft())
    world.settle()
