"""Bad peers of the queue: broken, hostile, or of another run.  What they say may be counted; it may change nothing."""

import random
from typing import Any

import numpy as np
from queue_peers import Link

from queues.core import QueueCore
from stream_rl import messages as m
from stream_rl.types import Version, make_rid

NAMES = ("engine-66", "actor-0", "learner-0", "engine-0", "journal", "", "x" * 65, "observer-1", "a.b")


class Strangers:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._links = {name: Link(name) for name in (*NAMES, "late")}

    def say(self, core: QueueCore) -> tuple[Link, Any]:
        """A connection, and what comes on it."""
        chance = self._chance
        what = chance.choice((self._hello, self._chunks, self._words))(core)
        name = what.name if isinstance(what, m.Hello) else chance.choice(("engine-66", "observer-1", *NAMES))
        return self._links[name], what

    def _number(self) -> int:
        return self._chance.choice((-1, 0, 1, 2, 7, 1 << 31, 1 << 62))

    def _version(self) -> Version:
        return Version(self._number(), self._number())

    def _hello(self, core: QueueCore) -> m.Hello:
        """Never one that may take an honest peer's place."""
        chance = self._chance
        name, role = chance.choice(NAMES), chance.choice(("engine", "observer", "observer", "boss"))
        honest = name in ("engine-0", "actor-0", "learner-0")
        if honest and name not in core.registry.peers:
            name = "late"
        incarnation = -1 if honest else chance.randrange(3)
        run = chance.choice(("another", "r", "r", "r"))
        return m.Hello(run=run, role=role, name=name, incarnation=incarnation, pid=0, address="?")

    def _chunks(self, core: QueueCore) -> m.Chunks:
        """As engine-66 or an old engine-0, about trajectories that are another's, gone, or were never there."""
        chance = self._chance
        taken = [rid for rid, t in core.store.assembly.by_rid.items() if t.engine or t.finish]
        rids = [make_rid("r", self._number(), 0, 0), "", "r/1", "x/0/0/0."]
        if taken:
            rids += [chance.choice(taken)]
        rid = chance.choice(rids)
        count = chance.choice((0, 1, 1, 5))
        peer = core.registry.peers.get("engine-66")
        fields: dict[str, Any] = {
            "rids": [rid],
            "finishes": [chance.choice(("", "stop", "abort", "?"))],
            "starts": np.array([self._number()], np.int64),
            "counts": np.array([count], np.int32),
            "token_ids": np.full(count, 3, np.int32),
            "logprobs": np.full(count, chance.choice((-1.0, float("nan"), 5.0)), np.float32),
            "spans": np.array([[0, *self._version(), max(count, 1)]], np.int64),
        }
        if chance.random() < 0.3:
            fields[chance.choice(("starts", "counts", "spans"))] = np.zeros((2, 2), np.int64)
        sequence = peer.next_sequence if peer is not None else 0
        me: dict[str, Any] = {
            "run": chance.choice(("r", "r", "s")),
            "engine": "engine-66",
            "incarnation": chance.randrange(3),
        }
        return m.Chunks(**me, sequence=sequence + chance.choice((0, 0, 0, 1, -1)), **fields)

    def _words(self, core: QueueCore) -> Any:
        number = self._number()
        at: dict[str, Any] = {"sequence": self._number(), "group": number, "member": self._number()}
        if self._chance.random() < 0.3:
            return self._stats(core)
        return self._chance.choice(
            (
                m.Alive(),
                m.Welcome(run="r", next_sequence=number),
                m.StatusRequest(why=True),
                m.DrainEngine(engine="actor-0"),
                m.LeaseRequest(step=self._version()),
                m.Applied(step=self._version(), outcome="?", metrics={}),
                m.Committed(step=self._version()),
                m.LearnerDone(final=self._version(), weights_hash=""),
                m.CloseTrajectory(**at, status="done"),
                m.Interrupted(**at, segment=self._number(), reason=""),
                m.OpenGroup(sequence=number, group=number, task="", members=number, prompt_ids=np.zeros(1, np.int32)),
            )
        )

    def _stats(self, core: QueueCore) -> m.EngineStats:
        """Of weights that nobody has."""
        version = Version(self._chance.choice((-1, 99, 1 << 40)), self._number())
        me: dict[str, Any] = {"engine": "engine-66", "incarnation": self._chance.randrange(3)}
        return m.EngineStats(**me, version=version, counters={"x": 1.0}, histograms={})
