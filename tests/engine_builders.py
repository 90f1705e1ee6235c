"""An engine as its publisher meets it: each rank's conversation and weights are the real ones, its scheduler commits on
all ranks in one turn, and its sockets are lists."""

from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from weights_builders import FIRST, RUN, Model, Shard, Tensors, make_live, make_shards

from engines.sglang.plugin import PluginSettings
from engines.sglang.publisher_conversation import PublisherConversation
from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from stream_rl.errors import WeightsError
from stream_rl.messages import EngineHello, Refused
from stream_rl.types import Version

STALL_SECONDS = 0.25
FORWARD_COUNT = 7


def plugin_settings(engine: str = "engine-0", incarnation: int = 1, **changes: Any) -> PluginSettings:
    fields: dict[str, Any] = {
        "http_address": "http://127.0.0.1:1",
        "queue_address": "",
        "publisher_address": "",
        "chunk_tokens": 4,
        "chunk_seconds": 0.2,
        "buffer_bytes": 1 << 20,
        "resend_seconds": 1.0,
        "max_kv_age": 8,
        "launcher_pid": 0,
    }
    return PluginSettings(run=RUN, engine=engine, incarnation=incarnation, **(fields | changes))


class Rank:
    """One rank's real conversation and weights, without its threads and sockets."""

    def __init__(self, engine: "Engine", rank: int, ranks: int, live: LiveWeights, model: Model) -> None:
        self.rank, self.ranks, self.live, self.model = rank, ranks, live, model
        self.me: dict[str, Any] = {"engine": engine.name, "incarnation": engine.incarnation, "rank": rank}
        self.peer = f"{engine.name}/{rank}@{engine.incarnation}".encode()
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()
        self.received: list[Any] = []
        self.posted: deque[tuple[Version, int, float, int, str]] = deque()
        """What the scheduler has done, and the plugin's thread has not yet seen."""
        self.now = 0.0
        self.conversation = PublisherConversation(
            plugin_settings(engine.name, engine.incarnation), rank, ranks, live, self._send, engine.order
        )
        self.conversation.tick(self.now)

    def _send(self, message: Any) -> bool:
        self.outbox.append(message)
        return True

    def hello(self) -> EngineHello:
        weights_hash, replicas = self.live.weights_hash, self.live.replicas
        fields = {"version": self.live.version, "weights_hash": weights_hash, "replicas": replicas}
        return EngineHello(run=RUN, ranks=self.ranks, **fields, **self.me)

    def step(self) -> None:
        """See what the scheduler has done, or else handle one message."""
        if self.posted:
            self.conversation.live(*self.posted.popleft())
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

    def is_at_rest(self) -> bool:
        return not (self.inbox or self.outbox or self.posted)

    def holds(self, tensors: Tensors) -> bool:
        """Its parameters are bit for bit those of a model that has just loaded these."""
        dtype = tensors["embed"].dtype
        fresh = Model(dtype) if self.ranks == 1 else Shard(self.rank, self.ranks, dtype)
        fresh.load_weights(tensors.items())
        live = dict(self.model.named_parameters())
        return all(torch.equal(bits_of(parameter), bits_of(live[name])) for name, parameter in fresh.named_parameters())


class Engine:
    """One incarnation of an engine: its ranks, and the scheduler that commits on all of them in one turn."""

    def __init__(self, name: str, incarnation: int, tensors: Tensors, version: Version = FIRST, ranks: int = 1) -> None:
        self.name, self.incarnation = name, incarnation
        self.ordered: tuple[Version, int] | None = None
        """What the scheduler was told to make live."""
        held = [make_live(tensors, version)] if ranks == 1 else make_shards(tensors, ranks, version)
        self.ranks = [Rank(self, i, ranks, live, model) for i, (live, model) in enumerate(held)]
        self.first = self.ranks[0]

    def order(self, target: Version, attempt: int) -> None:
        assert self.ordered is None, "one commit at a time"
        self.ordered = target, attempt

    def step(self, rank: int = 0) -> None:
        """The scheduler makes live what was ordered, or else a rank does what it has to."""
        if self.ordered is None:
            self.ranks[rank].step()
            return
        order, self.ordered = self.ordered, None
        for each in self.ranks:
            problem = ""
            try:
                each.live.commit(*order, nullcontext)
            except WeightsError as error:
                problem = str(error)
            each.posted.append((*order, STALL_SECONDS, FORWARD_COUNT, problem))

    def is_at_rest(self) -> bool:
        return self.ordered is None and all(rank.is_at_rest() for rank in self.ranks)


def bits_of(parameter: torch.Tensor) -> torch.Tensor:
    return fingerprint.bits_of(parameter.data)
