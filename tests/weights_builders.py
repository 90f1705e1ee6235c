"""Small builders for the weights' tests: a torch model that fuses and ties as SGLang's do, tensors of any bits, and a
publisher with simulated engines that stage and commit with the real code."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engines.sglang.load_map import LoadMap, TensorShape, trace
from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from engines.weights.chain import Chain
from engines.weights.delivery import Delivery, Outgoing
from stream_rl.errors import WeightsError
from stream_rl.messages import (
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

RUN = "r"
FIRST = Version(0, 0)
VOCABULARY, HIDDEN, INNER, QUERY, KEY = 6, 4, 5, 4, 2
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (VOCABULARY, HIDDEN),
    "q": (QUERY, HIDDEN),
    "k": (KEY, HIDDEN),
    "v": (KEY, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "norm": (HIDDEN,),
    "scale": (),
}
FUSED = {
    "q": ("qkv", 0),
    "k": ("qkv", QUERY),
    "v": ("qkv", QUERY + KEY),
    "gate": ("gate_up", 0),
    "up": ("gate_up", INNER),
}
Tensors = dict[str, torch.Tensor]
Bits = dict[str, tuple[torch.dtype, torch.Tensor]]


def special_bits(dtype: torch.dtype) -> list[int]:
    """Zeros, the smallest and largest denormal, infinities, quiet and signalling NaNs with payloads; of both signs."""
    width, mantissa = {torch.float32: (32, 23), torch.bfloat16: (16, 7), torch.float16: (16, 10)}[dtype]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    positive = [
        0,
        1,
        (1 << mantissa) - 1,
        1 << mantissa,
        infinity - 1,
        infinity,
        infinity | 1,
        infinity | 1 << (mantissa - 1),
    ]
    positive.append(infinity | ((1 << mantissa) - 1))
    return [bits | sign << (width - 1) for bits in positive for sign in (0, 1)]


def random_bits(rng: np.random.Generator, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """Flat integers: any bit pattern, the special ones often."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    raw = rng.integers(0, 1 << (8 * dtype.itemsize), elements, dtype=np.uint64).astype(unsigned)
    special = rng.choice(np.array(special_bits(dtype), unsigned), elements)
    mixed = np.where(rng.random(elements) < 0.5, special, raw).astype(unsigned)
    return torch.from_numpy(mixed.view(np.dtype(f"i{dtype.itemsize}")))


def make_tensors(
    seed: int, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: random_bits(rng, dtype, int(np.prod(shape, dtype=np.int64))).view(dtype).reshape(shape)
        for name, shape in shapes.items()
    }


def perturbed(tensors: Tensors, rng: np.random.Generator, share: float) -> Tensors:
    """New bits for about `share` of the elements, in new tensors."""
    new = {}
    for name, tensor in tensors.items():
        old = fingerprint.bits_of(tensor).reshape(-1)
        chosen = torch.from_numpy(rng.random(old.numel()) < share)
        bits = torch.where(chosen, random_bits(rng, tensor.dtype, old.numel()), old)
        new[name] = bits.view(tensor.dtype).reshape(tensor.shape)
    return new


def bits_of(tensors: Tensors) -> Bits:
    """As the publisher holds them."""
    return {name: (t.dtype, fingerprint.bits_of(t).reshape(-1).clone()) for name, t in tensors.items()}


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(fingerprint.bits_of(a[name]), fingerprint.bits_of(b[name]))
        for name in a
    )


def hash_of(tensors: Tensors) -> str:
    return fingerprint.text(fingerprint.model_sum(tensors.items()))


class Model(torch.nn.Module):
    """Fuses q, k, v and gate, up; its head is its embedding."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        made = {"qkv": (QUERY + 2 * KEY, HIDDEN), "gate_up": (2 * INNER, HIDDEN)}
        made |= {name: shape for name, shape in SHAPES.items() if name not in FUSED}
        for name, shape in made.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.head = self.embed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.load_one(name, tensor)

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        target, start = FUSED.get(name, (name, 0))
        parameter = getattr(self, target).data
        if name in FUSED:
            parameter = parameter.narrow(0, start, tensor.shape[0])
        parameter.copy_(tensor)

    def live(self) -> Tensors:
        """A copy of what is live, in checkpoint names, read without any map."""
        found = {}
        for name, shape in SHAPES.items():
            target, start = FUSED.get(name, (name, 0))
            parameter = getattr(self, target).data
            found[name] = (parameter.narrow(0, start, shape[0]) if name in FUSED else parameter).clone()
        return found


def tensor_shapes(dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorShape]:
    return {name: TensorShape(shape, dtype) for name, shape in SHAPES.items()}


def map_of(model: Model, dtype: torch.dtype = torch.bfloat16) -> LoadMap:
    return trace(model.named_parameters(), model.load_weights, tensor_shapes(dtype))


def make_live(tensors: Tensors, version: Version = FIRST) -> tuple[LiveWeights, Model]:
    """A model that holds `tensors` as `version`."""
    dtype = tensors["embed"].dtype
    model = Model(dtype)
    model.load_weights(tensors.items())
    return LiveWeights(RUN, map_of(model, dtype), version), model


def make_chain(tensors: Tensors, part_bytes: int = 40, keep: int = 8, version: Version = FIRST) -> Chain:
    chain = Chain(RUN, part_bytes, keep)
    chain.advance(version, bits_of(tensors))
    return chain


def take(live: LiveWeights, parts: Iterable[UpdatePart]) -> Version | None:
    """Receive parts in this order; what the last of them gave."""
    staged = None
    for part in parts:
        staged = live.receive(part)
    return staged


def commit(live: LiveWeights, target: Version) -> None:
    live.commit(target, nullcontext)


# -- a publisher and its engines ----------------------------------------------------------------------------------

ENGINES = 2


class Engine:
    """One incarnation of an engine of one rank: the plugin's answers, without its threads and sockets."""

    def __init__(self, name: str, incarnation: int, tensors: Tensors) -> None:
        self.name, self.incarnation = name, incarnation
        self.peer = f"{name}/0@{incarnation}".encode()
        self.live, self.model = make_live(tensors)
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque([self.hello()])
        self.received: list[Any] = []
        self.hash_asked = False

    @property
    def me(self) -> dict[str, Any]:
        return {"engine": self.name, "incarnation": self.incarnation, "rank": 0}

    def hello(self) -> EngineHello:
        weights_hash = fingerprint.text(self.live.fingerprint)
        return EngineHello(run=RUN, ranks=1, version=self.live.version, weights_hash=weights_hash, **self.me)

    def step(self) -> None:
        """Handle one message."""
        if not self.inbox:
            return
        message = self.inbox.popleft()
        self.received.append(message)
        match message:
            case UpdatePart():
                try:
                    staged, problem = self.live.receive(message), ""
                except WeightsError as error:
                    staged, problem = message.target, str(error)
                if staged is not None:
                    self.outbox.append(Staged(target=staged, attempt=message.attempt, problem=problem, **self.me))
            case CommitOrder() if self.live.staged == message.target:
                self.live.commit(message.target, nullcontext)
                weights_hash = fingerprint.text(self.live.fingerprint)
                self.outbox.append(
                    Live(
                        target=message.target,
                        weights_hash=weights_hash,
                        stage_seconds=0.5,
                        stall_seconds=0.25,
                        **self.me,
                    )
                )
            case HashOrder():
                self.hash_asked = True
        if self.hash_asked and self.live.staged is None:
            self.hash_asked = False
            weights_hash = fingerprint.text(self.live.recompute())
            self.outbox.append(HashReport(version=self.live.version, weights_hash=weights_hash, **self.me))

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(message, kind) for message in self.received)


@dataclass
class World:
    """A publisher, its engines, and what is on the wire between them."""

    seed: int = 0
    verify_every: int = 0
    keep: int = 3
    part_bytes: int = 40
    chain: Chain = field(init=False)
    delivery: Delivery = field(init=False)
    engines: list[Engine] = field(init=False)
    line: list[Tensors] = field(init=False)
    stale: deque[tuple[bytes, Any]] = field(default_factory=deque)
    """Of incarnations that are gone."""
    reports: list[Any] = field(default_factory=list)
    under_way: dict[str, tuple[Version, bool]] = field(default_factory=dict)
    staged: set[str] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.line = [make_tensors(self.seed)]
        self.chain = make_chain(self.line[0], self.part_bytes, self.keep)
        self.delivery = Delivery(RUN, self.chain, self.verify_every, lambda: self.now)
        self.engines = [Engine(f"engine-{i}", 1, self.line[0]) for i in range(ENGINES)]

    @property
    def newest(self) -> Version:
        return Version(0, len(self.line) - 1)

    def advance(self, share: float = 0.3) -> None:
        self.line.append(perturbed(self.line[-1], self.rng, share))
        self.chain.advance(self.newest, bits_of(self.line[-1]))
        self.route(self.delivery.advance(), None, "")

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
            self.under_way[name] = (parts[0].target, parts[0].anchor)
            self.staged.discard(name)

    def hear(self, peer: bytes, message: Any) -> None:
        """The publisher handles one message."""
        name, current = message.engine, any(e.peer == peer for e in self.engines)
        if current:
            if (
                isinstance(message, Staged)
                and not message.problem
                and self.under_way.get(name, (None,))[0] == message.target
            ):
                self.staged.add(name)
            under_way = self.under_way.get(name)
            if isinstance(message, EngineHello) or (
                isinstance(message, Live) and under_way and under_way[0] == message.target
            ):
                self.under_way.pop(name, None)
        out = self.delivery.handle(peer, message)
        self.route(out, message, name if current else "")
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
        """Deliver everything there is, fairly."""
        chosen = list(which)
        for _ in range(limit):
            if not any(self.engines[i].inbox or self.engines[i].outbox for i in chosen):
                return
            for i in chosen:
                self.engines[i].step()
                self.publisher_step(i)
        raise AssertionError("publisher and engines never come to rest")

    def finish(self) -> None:
        self.delivery.final = self.chain.version
        self.route(self.delivery.advance(), None, "")
        self.settle()

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
        self.delivery = Delivery(RUN, self.chain, verify_every, lambda: 0.0)

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
