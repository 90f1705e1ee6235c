"""One run: the queue's core, and around it simulated engines, an actor and a learner."""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from queues.core import QueueCore, Settings, Tick
from scripts.simulation.actor import Actor
from scripts.simulation.clock import Clock
from scripts.simulation.engine import Engine
from scripts.simulation.learner import Learner
from scripts.simulation.lengths import Lengths
from scripts.simulation.policies import Policy
from scripts.simulation.setting import Setting
from stream_rl.types import Version

RUN = "simulated"
TICK_S = 1.0
NEVER_S = 1e9
"""Silence until a peer is lost: they have nothing to say while the learner works for long."""


@dataclass(frozen=True, slots=True)
class Books:
    """Counts so far, after an applied step."""

    generated_tokens: int
    dropped_tokens: int
    dropped: int
    """Trajectories, but those below."""
    hopeless: int
    """Trajectories dropped because every token of their group was too old to train."""
    limit: int
    """Groups that may be under way."""


class World:
    def __init__(self, setting: Setting, policy: Policy, lengths: Lengths) -> None:
        self.setting, self.policy, self.clock = setting, policy, Clock()
        settings = Settings(
            run=RUN, queue=policy.configure(setting), max_new_tokens=setting.most_tokens, silence_s=NEVER_S
        )
        self.core = QueueCore(settings)
        self.engines = [
            Engine(f"engine-{i}", RUN, setting, self.clock, partial(self._say, f"engine-{i}"))
            for i in range(setting.engines)
        ]
        for engine in self.engines:
            engine.flips_in_flight = policy.batch_lag is None
        self.actor = Actor(
            RUN,
            setting,
            self.clock,
            self.engines,
            lengths,
            partial(self._say, "actor-0"),
            self._may_open,
            self._too_old,
        )
        oldest = None if policy.stale == "train" else setting.max_staleness
        self.learner = Learner(
            setting, self.clock, partial(self._say, "learner-0"), self._publish, self._batch_is_whole, oldest
        )
        self.books: list[Books] = []
        """One for each applied step."""
        self._letters: deque[tuple[str, Any]] = deque()
        self._delivering = False

    def run(self) -> None:
        for engine in self.engines:
            engine.hello()
        self.actor.hello()
        self.learner.hello(RUN)
        self._tick()
        self.clock.run(until=lambda: len(self.learner.steps) >= self.setting.steps)
        self.core.check()

    def _tick(self) -> None:
        self._say("", Tick())
        self.clock.after(TICK_S, self._tick)

    def _say(self, sender: str, event: Any) -> None:
        """Hand an event to the queue and deliver what it answers, in order, before anything else happens."""
        self._letters.extend(self.core.handle(self.clock.now, sender, event))
        if self._delivering:
            return
        self._delivering = True
        while self._letters:
            recipient, message = self._letters.popleft()
            if recipient == "actor-0":
                self.actor.receive(message)
            elif recipient == "learner-0":
                self.learner.receive(message)
        self._delivering = False
        self._note()
        self.learner.request()

    def _note(self) -> None:
        if len(self.books) < len(self.learner.steps):
            ledger, hopeless = self.core.ledger, self.core.ledger.dropped["too_old"]
            books = Books(
                generated_tokens=sum(engine.generated for engine in self.engines),
                dropped_tokens=ledger.dropped_tokens.total(),
                dropped=ledger.dropped.total() - hopeless,
                hopeless=hopeless,
                limit=self.core.store.admission.limit,
            )
            self.books.append(books)

    # -- what the policy adds ----------------------------------------------------------------------------------

    def _publish(self, version: Version) -> None:
        for engine in self.engines:
            engine.publish(version)
        if self.policy.stale == "abort":
            self.actor.expire()
        self.actor.open()
        self.learner.request()

    def _too_old(self, first: int) -> bool:
        return self.policy.stale != "train" and self._live - first > self.setting.max_staleness

    @property
    def _live(self) -> int:
        return min(engine.live.step for engine in self.engines)

    def _may_open(self) -> bool:
        """Whether the actor may open the next group that it was admitted to."""
        if self.policy.batch_lag is None:
            return True
        batches, of_batch = divmod(len(self.actor.opened), self.setting.groups)
        return of_batch > 0 or (not self.actor.unfinished and self._live >= batches - self.policy.batch_lag)

    def _batch_is_whole(self) -> bool:
        if self.policy.batch_lag is None:
            return True
        wanted = (len(self.learner.steps) + 1) * self.setting.groups
        return len(self.actor.opened) >= wanted and (len(self.actor.opened) > wanted or not self.actor.unfinished)
