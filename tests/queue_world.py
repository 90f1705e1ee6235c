"""A whole run around the queue's core under a virtual clock, in which anything may be killed at any instant.

`World` lets the peers take turns, loses, repeats and reorders what is on the way, kills and stalls processes, and
starts them again.  After every event both conservation laws and liveness are checked, and `Truth` compares what the
queue says with what really happened.  Everything follows from the seed.
"""

import dataclasses
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from queue_actors import Actor, Disk, Learner, Publisher
from queue_builders import RUN
from queue_peers import Engine, Link, Peer
from queue_shell import Shell
from queue_strangers import Strangers
from queue_truth import Key, Truth

from queues.core import Gone, QueueCore, Settings, Tick
from queues.ledger import State
from queues.trajectories import Group
from stream_rl import messages as m
from stream_rl.config import Queue
from stream_rl.types import Version

SILENCE_S = 30.0
PATIENCE_S = 6 * SILENCE_S
"""Longest that anything may take when nothing goes wrong any more; three times as long while things do."""
RETIRED = 8
"""Groups remembered after their end."""
TASKS = ("t", "u")
DROPPABLE = m.Ack | m.Done | m.Lease
"""What the queue says again when it is asked again.  The rest of what it says is lost only with its connection."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    seed: int
    queue: dict[str, Any] = field(default_factory=dict)
    engines: int = 2
    actors: int = 1
    members: int = 3
    max_new: int = 24
    agents: bool = False
    """Trajectories have many turns, and episodes many trajectories."""
    checkpoint_every: int = 4
    faults: float = 1.0
    """Multiplies how often anything goes wrong."""
    strangers: bool = False
    """Bad peers take part."""

    def core_settings(self) -> Settings:
        defaults: dict[str, Any] = {
            "min_tokens": 30,
            "max_tokens": 90,
            "first_groups": 3,
            "max_token_age": 8,
            "in_flight": "fixed",
        }
        queue = Queue(**(defaults | self.queue))
        return Settings(run=RUN, queue=queue, max_new_tokens=self.max_new, silence_s=SILENCE_S, keep_retired=RETIRED)


class World:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.random = random.Random(setting.seed)
        self.max_new, self.members, self.agents = setting.max_new, setting.members, setting.agents
        self.now = 1000.0
        self.weights = Version(0, 0)
        settings = setting.core_settings()
        queue = settings.queue
        bounds = {task: queue.max_token_age_of.get(task, queue.max_token_age) for task in TASKS}
        by_batch = queue.mode in ("synchronous", "one_step_off")
        self.truth = Truth(bounds, sys.maxsize if by_batch else queue.max_tokens)
        self.shell = Shell(QueueCore(settings), self.truth)
        self.disk = Disk()
        self.peers: dict[str, Peer] = {}
        self.incarnations: dict[tuple[str, int], Peer] = {}
        self.dead: dict[str, float] = {}
        """When each is started again."""
        self.lengths: dict[Key, int] = {}
        self.tokens = 0
        """Made by all engines: no two are the same."""
        self.ending = False
        self.progress = (0, self.now)
        """Steps, and when the last was applied."""
        self.strangers = Strangers(self.random)
        for number in range(setting.engines):
            self.start(f"engine-{number}")
        for number in range(setting.actors):
            self.start(f"actor-{number}")
        self.start("learner-0")
        self.start("publisher-0")
        self._ticked = self.now

    @property
    def core(self) -> QueueCore:
        return self.shell.core

    @property
    def learner(self) -> Learner:
        learner = self.peers["learner-0"]
        assert isinstance(learner, Learner)
        return learner

    @property
    def final(self) -> Version | None:
        return self.learner.done.final if self.learner.done else None

    # -- what peers know of it ---------------------------------------------------------------------------------

    def engine(self, name: str, incarnation: int) -> Engine | None:
        peer = self.incarnations.get((name, incarnation))
        return peer if isinstance(peer, Engine) else None

    def engines_at(self, version: Version) -> list[str]:
        return [name for name, peer in self.peers.items() if isinstance(peer, Engine) and peer.version == version]

    def new_tokens(self, count: int) -> range:
        self.tokens += count
        return range(self.tokens - count, self.tokens)

    def length_of(self, key: Key) -> int:
        """Long tails: most answers are short, some fill their budget."""
        if key not in self.lengths:
            self.lengths[key] = min(self.max_new, int(self.random.lognormvariate(1.8, 0.9)))
            if len(self.lengths) > 4096:
                del self.lengths[next(iter(self.lengths))]
        return self.lengths[key]

    @staticmethod
    def task_of(group: int) -> str:
        return TASKS[group % len(TASKS)]

    def end(self, peer: Peer) -> None:
        """Its process ends; it is started again in a while."""
        if peer.alive:
            peer.alive = False
            peer.killed()
            self.dead[peer.name] = self.now + 6.0 * self.random.random() ** 2

    # -- what happens ------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        former = self.peers.get(name)
        incarnation = former.incarnation + 1 if former is not None else 1
        if former is not None and former.alive:
            self.end(former)
        peer: Peer
        match name.split("-")[0]:
            case "engine":
                peer = Engine(self, name, incarnation)
            case "actor":
                peer = Actor(self, name, incarnation)
            case "learner":
                peer = Learner(self, name, incarnation, self.disk, self.setting.checkpoint_every)
                peer.last = self.ending
            case _:
                peer = Publisher(self, name, incarnation)
        self.peers[name] = self.incarnations[name, incarnation] = peer
        self.incarnations.pop((name, incarnation - 8), None)
        self.dead.pop(name, None)

    def turn(self, peer: Peer) -> None:
        if peer.alive and peer.stalled_until <= self.now:
            peer.turn(self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.now - self._ticked >= 1.0:
            self._ticked = self.now
            self.shell.take(self.now, None, Tick())
            if self.random.random() < 0.05 * self.setting.faults:
                engine = self.peers["engine-0"]
                assert isinstance(engine, Engine)
                engine.tamper()
            for name in [name for name, due in self.dead.items() if due <= self.now]:
                self.start(name)

    def deliver(self, link: Link, place: int = 0) -> None:
        """The queue takes a message; `place` other than 0: one that has overtaken others."""
        if place:
            link.up.rotate(-place)
        event = link.up.popleft()
        if place:
            link.up.rotate(place)
        self.shell.take(self.now, link, event)

    def commit(self) -> None:
        chance = self.random.random
        for link, message in self.shell.commit():
            if link.name not in self.peers:
                continue
            if isinstance(message, DROPPABLE):
                if chance() < 0.01 * self.setting.faults:
                    continue
                if chance() < 0.01 * self.setting.faults:
                    link.down.append(message)
            link.down.append(message)
        if self.truth.next.history > self.weights.history:  # what a learner goes back to, its engines get
            self.weights = self.truth.next

    def crash_queue(self, durable: int) -> None:
        self.now += self.random.choice((0.5, 0.5, 0.5, 3.0, 3.0, 3.0, 2 * SILENCE_S))
        self._ticked = -math.inf  # the last tick may be lost
        self.shell.crash(self.now, durable, compare=self.random.random() < 0.1)
        for peer in self.peers.values():
            if self.random.random() < 0.7:
                peer.link.up.clear()
            if self.random.random() < 0.7:
                peer.link.down.clear()

    def fault(self) -> None:
        """Something goes wrong with somebody."""
        kinds = ("crash", "end", "end", "end", "reconnect", "stall", "drain")
        peer = self.random.choice(list(self.peers.values()))
        match self.random.choice(kinds):
            case "crash":
                self.crash_queue(durable=self.random.randint(0, len(self.shell.held)))
            case "end":
                self.end(peer)
            case "reconnect":
                peer.reconnect()
            case "stall":
                peer.stalled_until = self.now + self.random.choice((3.0, 12.0, SILENCE_S + 8))
            case "drain" if isinstance(peer, Engine) and len(self.dead) + 1 < self.setting.engines:
                self.drain(peer)

    def drain(self, engine: Engine) -> None:
        """Somebody has everything moved off an engine, which is replaced after a while."""
        link = Link("drainer")
        self.shell.take(self.now, link, hello("drainer"))
        self.shell.take(self.now, link, m.DrainEngine(engine=engine.name))
        self.shell.take(self.now, None, Gone("drainer"))
        self.dead[engine.name] = self.now + 10.0

    def step(self) -> None:
        """A moment of the world: somebody takes a turn, the queue hears somebody, something may go wrong."""
        setting, chance = self.setting, self.random.random
        self.pass_time(0.06 * chance())
        peers = list(self.peers.values())
        self.turn(self.random.choice(peers))
        self.hear(self.random.choice(peers).link)
        if setting.strangers and chance() < 0.1:
            self.shell.take(self.now, *self.strangers.say(self.core))
        if chance() < 0.02 * setting.faults and self.shell.has_orders():
            self.crash_queue(durable=len(self.shell.held))  # the worst moment: it is decided, and nobody has heard
        if chance() < 0.5:
            self.commit()
            if len(self.shell.journal) > 400:
                self.shell.save()
        if chance() < 0.004 * setting.faults:
            self.fault()

    def hear(self, link: Link) -> None:
        """The queue takes what has come on a connection, unless it is lost; some of it twice, or too early."""
        up, faults = link.up, self.setting.faults
        for _ in range(min(len(up), 4)):
            luck = self.random.random() / faults if faults else 1.0
            if luck < 0.005:
                up.popleft()
            else:
                if luck < 0.01:
                    up.append(up[0])
                self.deliver(link, self.random.randrange(len(up)) if luck > 0.99 else 0)
            if not up:
                break

    def check_progress(self) -> None:
        """Steps keep coming, and so do the tokens of every trajectory."""
        if self.truth.num_steps != self.progress[0]:
            self.progress = self.truth.num_steps, self.now
        stuck = self.now - self.progress[1]
        assert stuck < 3 * PATIENCE_S, f"no step for {stuck:.0f} s: {self.core.why()}"
        for t in (t for group in self.groups_in_flight() for t in group.members):
            still = t.state is State.IN_FLIGHT and not t.complete and self.now - t.seen > 3 * PATIENCE_S
            assert not still, f"{t.label} stands still: {self.core.why()}"

    def run(self, events: int, recount_every: int = 500) -> None:
        """So many events of the core, then the end of the run.  What fails, fails again with the same seed."""
        due = recount_every
        try:
            while self.shell.events < events:
                self.step()
                if self.shell.events >= due:
                    due += recount_every
                    self.commit()
                    self.check()
                    self.check_progress()
            self.finish()
        except Exception as error:
            error.add_note(f"World({self.setting}).run({events}), event {self.shell.events}, {self.now:.2f} s")
            raise

    def finish(self) -> None:
        """For a while nothing goes wrong, and all that was growing comes to an end.  Then the run comes to its own, at
        first through troubles again."""
        troubled = self.setting
        calm = self.setting = dataclasses.replace(troubled, faults=0.0, strangers=False)
        growing = self.growing()
        self.until(lambda: not growing & self.growing(), "something grows for ever")
        self.setting = troubled
        self.ending = self.learner.last = True
        for _ in range(self.random.randrange(1000)):
            self.step()
        self.setting = calm
        self.until(lambda: self.core.finished, "the run does not end")
        stop = Link("stop")
        self.shell.take(self.now, stop, hello("stop"))
        self.shell.take(self.now, stop, m.Shutdown(reason="done"))
        self.commit()
        self.check()
        assert self.disk.learned == self.truth.applied, "the learner's log and the journal differ"
        leased = self.truth.lease[1] if self.truth.lease else []  # asked for, and then no longer wanted
        assert self.truth.open.keys() == set(leased), "not everything has come to an end"

    def until(self, reached: Callable[[], bool], otherwise: str) -> None:
        end = self.now + PATIENCE_S
        while not reached():
            self.step()
            assert self.now < end, f"{otherwise}: {self.core.why()}"

    def growing(self) -> set[int]:
        """Groups that are admitted or in flight."""
        return {group.id for group in self.groups_in_flight()}.union(*self.core.admitted.values())

    def groups_in_flight(self) -> list[Group]:
        return [group for group in self.core.store.groups.values() if group.state is State.IN_FLIGHT]

    # -- what must hold ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """The slow proofs.  Everything that was handled is committed."""
        core = self.core
        core.recount()
        self.truth.check_accounts(core)
        self.check_memory()
        if not core.drained:
            assert core.next_group == len(self.truth.members) + sum(len(groups) for groups in core.admitted.values())
        deadline = core.settings.queue.group_deadline_s or math.inf
        late = [g.id for g in self.groups_in_flight() if self._ticked - g.opened > deadline]
        assert not late, f"groups {late} are past their deadline"

    def check_memory(self) -> None:
        """What is kept is bounded by what is under way, what can be asked for again, and the declared bounds."""
        core, store, every = self.core, self.core.store, self.setting.checkpoint_every
        steps = core.steps
        since = core.histories.last.step - steps.checkpoint
        assert len(steps.applied) <= since
        assert len(steps.committed) + len(steps.applied) <= 4 * every + since
        assert sum(len(groups) for groups in steps.again) <= store.outstanding
        held = store.outstanding + sum(len(taken.groups) for taken in (*steps.applied, *steps.committed))
        assert len(store.groups) <= held + RETIRED
        assert len(store.assembly.by_rid) == sum(len(group.members) for group in store.groups.values())
        assert store.resuming.resting <= len(store.assembly.by_rid)
        assert len(core.registry.peers) <= len(self.peers) + 16


def hello(name: str) -> m.Hello:
    return m.Hello(run=RUN, role="observer", name=name, incarnation=1, pid=1)


if __name__ == "__main__":
    world = World(Setting(**json.loads(sys.argv[1])))
    world.run(int(sys.argv[2]))
    print(json.dumps([world.shell.events, world.truth.num_steps]))
