"""Small builders for the queue's tests: rows, chunk messages, and a run whose every event is followed by a recount."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from queues.core import QueueCore
from queues.store import Settings
from stream_rl import messages as m
from stream_rl.config import Queue
from stream_rl.types import Version, make_rid

RUN = "r"


@dataclass
class Row:
    rid: str
    start: int
    tokens: Sequence[int]
    versions: Sequence[tuple[int, int]] = ()
    """One a token; all (0, 0) when left out."""
    finish: str = ""
    logprobs: Sequence[float] = ()


def rid(group: int, member: int = 0, segment: int = 0) -> str:
    return make_rid(RUN, group, member, segment)


def spans_of(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    spans: list[tuple[int, int, int, int]] = []
    for i, row in enumerate(rows):
        for history, step in row.versions or [(0, 0)] * len(row.tokens):
            if spans and spans[-1][:3] == (i, history, step):
                spans[-1] = (i, history, step, spans[-1][3] + 1)
            else:
                spans.append((i, history, step, 1))
    return spans


def make_chunks(rows: Sequence[Row], sequence: int = 0, **changes: Any) -> m.Chunks:
    fields: dict[str, Any] = {
        "run": RUN,
        "engine": "engine-0",
        "incarnation": 1,
        "sequence": sequence,
        "rids": [row.rid for row in rows],
        "finishes": [row.finish for row in rows],
        "starts": np.array([row.start for row in rows], np.int64),
        "counts": np.array([len(row.tokens) for row in rows], np.int32),
        "token_ids": np.array([t for row in rows for t in row.tokens], np.int32),
        "logprobs": np.array([x for row in rows for x in (row.logprobs or [-0.5] * len(row.tokens))], np.float32),
        "spans": np.array(spans_of(rows), np.int64).reshape(-1, 4),
    }
    return m.Chunks(**(fields | changes))


def make_core(max_new_tokens: int = 16, keep_retired: int = 4096, **queue: Any) -> QueueCore:
    defaults: dict[str, Any] = {
        "min_tokens": 8,
        "max_tokens": 64,
        "first_groups": 2,
        "in_flight": "fixed",
        "max_token_age": 2,
    }
    settings = Settings(
        run=RUN, queue=Queue(**(defaults | queue)), max_new_tokens=max_new_tokens, keep_retired=keep_retired
    )
    return QueueCore(settings)


@dataclass
class Run:
    """A core with one engine, one actor, one learner and one observer; every event is followed by a recount."""

    core: QueueCore = field(default_factory=make_core)
    joined: bool = True
    now: float = 100.0
    sequence: int = 0
    """Of the next chunk message of engine-0."""
    told: int = 0
    """Sequenced messages of actor-0."""
    log: list[tuple[float, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.joined:
            for role in ("engine", "actor", "learner", "publisher", "observer"):
                self.hello(role)

    def say(self, sender: str, event: Any) -> list[tuple[str, Any]]:
        self.now += 0.25
        self.log.append((self.now, sender, event))
        actions = self.core.handle(self.now, sender, event)
        self.core.recount()
        assert self.core.awaits()
        return actions

    def hello(self, role: str, number: int = 0, incarnation: int = 1, run: str = RUN) -> list[tuple[str, Any]]:
        name = f"{role}-{number}"
        return self.say(name, m.Hello(run=run, role=role, name=name, incarnation=incarnation, pid=7))

    def open(self, group: int, members: int = 2, prompt: Sequence[int] = (1, 2, 3)) -> list[tuple[str, Any]]:
        ids = np.array(prompt, np.int32)
        return self.tell(m.OpenGroup, group=group, task="t", members=members, prompt_ids=ids, problem=b"p")

    def tell(self, kind: type[Any], **fields: Any) -> list[tuple[str, Any]]:
        """The next sequenced message of actor-0."""
        self.told += 1
        return self.say("actor-0", kind(sequence=self.told - 1, **fields))

    def chunks(self, *rows: Row, **changes: Any) -> list[tuple[str, Any]]:
        event = make_chunks(rows, **({"sequence": self.sequence} | changes))
        self.sequence = max(self.sequence, event.sequence + 1)
        return self.say("engine-0", event)

    def close(
        self, group: int, member: int, num_sampled: int, reward: float = 1.0, segment: int = 0
    ) -> list[tuple[str, Any]]:
        fields = {"group": group, "member": member, "segment": segment, "num_sampled": num_sampled}
        return self.tell(m.CloseTrajectory, status="done", reward=reward, **fields)

    def fail(self, group: int, member: int, reason: str = "reward_error", segment: int = 0) -> list[tuple[str, Any]]:
        fields = {"group": group, "member": member, "segment": segment, "reason": reason}
        return self.tell(m.CloseTrajectory, status="failed", **fields)

    def interrupt(self, group: int, member: int, num_sampled: int = -1, segment: int = 0) -> list[tuple[str, Any]]:
        fields = {"group": group, "member": member, "segment": segment, "num_sampled": num_sampled}
        return self.tell(m.Interrupted, reason="interrupted", **fields)

    def append(
        self, group: int, member: int, num_sampled: int, tokens: Sequence[int], segment: int = 0
    ) -> list[tuple[str, Any]]:
        fields = {"group": group, "member": member, "segment": segment, "num_sampled": num_sampled}
        return self.tell(m.AppendTokens, token_ids=np.array(tokens, np.int32), **fields)

    def branch(self, group: int, member: int, episode: int, prompt: Sequence[int] = (8, 9)) -> list[tuple[str, Any]]:
        ids = np.array(prompt, np.int32)
        return self.tell(m.OpenBranch, group=group, member=member, episode=episode, prompt_ids=ids)

    def grow(self, group: int, lengths: Sequence[int], version: tuple[int, int] = (0, 0)) -> list[tuple[str, Any]]:
        """Open a group and bring all its members to their end."""
        self.open(group, len(lengths))
        actions = []
        for member, length in enumerate(lengths):
            row = Row(rid(group, member), 0, range(10, 10 + length), [version] * length, "stop")
            actions += self.chunks(row) + self.close(group, member, length, float(member))
        return actions

    def request(self, step: int, history: int = 0) -> list[tuple[str, Any]]:
        return self.say("learner-0", m.LeaseRequest(step=Version(history, step)))

    def apply(self, step: int, history: int = 0, outcome: str = "trained") -> list[tuple[str, Any]]:
        metrics = {"busy_seconds": 1.0, "wall_seconds": 2.0, "loss": 0.5}
        return self.say("learner-0", m.Applied(step=Version(history, step), outcome=outcome, metrics=metrics))

    def commit(self, step: int, history: int = 0) -> list[tuple[str, Any]]:
        return self.say("learner-0", m.Committed(step=Version(history, step)))

    def shutdown(self) -> list[tuple[str, Any]]:
        return self.say("observer-0", m.Shutdown(reason="test"))

    @property
    def refused(self) -> dict[str, int]:
        return dict(self.core.tallies.refused)


def of_type(actions: Sequence[tuple[str, Any]], kind: type[Any]) -> list[Any]:
    return [message for _, message in actions if isinstance(message, kind)]
