"""A correct actor, learner and publisher, at the level of their protocol with the queue."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from queue_peers import RUN, Engine, Peer, Request, Surroundings
from queue_truth import PROMPT, Key

from stream_rl import messages as m
from stream_rl.types import Version, make_rid, parse_rid


@dataclass(slots=True)
class Segment:
    """One that runs in an actor."""

    key: Key
    number: int
    base: int
    """Sampled tokens before it."""
    finish: str = ""
    prompted: bool = True
    """Its trajectory has a prompt."""
    spoken: bool = False
    """What comes behind it was said; the queue's answer is awaited."""
    after: int = -1
    """The message that opens its group."""
    engine: Engine | None = None
    parked: bool = False
    due: float = math.inf
    """When its reward is there."""
    num_sampled: int = 0

    @property
    def rid(self) -> str:
        return make_rid(RUN, *self.key, self.number)


class Actor(Peer):
    role = "actor"

    def __init__(self, world: Surroundings, name: str, incarnation: int) -> None:
        super().__init__(world, name, incarnation)
        self.answers: deque[tuple[str, str, int]] = deque()
        """What came over HTTP: (rid, finish or unreachable, tokens)."""
        self.running: dict[Key, Segment] = {}
        self.over: dict[Key, int] = {}
        """The newest segment of a trajectory that runs here no more."""
        self.admitted: dict[int, None] = {}
        self.opened: set[int] = set()
        self.members: dict[int, int] = {}
        """Trajectories of each group."""
        self.episodes: dict[Key, int] = {}
        """Of branches: the member that theirs began as."""
        self.engines: list[Engine] = []
        self.final: Version | None = None
        self.evaluated = False

    def heard(self, now: float, message: Any) -> None:
        match message:
            case m.Welcome() | m.Admit():
                groups = message.groups if isinstance(message, m.Admit) else message.admitted
                if isinstance(message, m.Welcome):
                    self.admitted.clear()
                    self.evaluated = self.evaluated or "last" in message.evaluated
                self.admitted |= {group: None for group in groups if group not in self.opened}
            case m.Engines():
                known = zip(message.names, message.incarnations, strict=True)
                self.engines = [e for e in (self.world.engine(*each) for each in known) if e is not None]
            case m.Resume():
                key, over = (message.group, message.member), self.over.get((message.group, message.member), -1)
                running = self.running.get(key)
                if message.segment > max(over, running.number if running else -1):
                    self._stop(key)
                    base, prompted = int(message.sampled.sum()), bool(len(message.prompt_ids))
                    self.running[key] = Segment(key, message.segment, base, message.finish, prompted)
                    self.episodes[key] = message.episode
                    self.members[message.group] = max(message.members, self.members.get(message.group, 0))
            case m.Appended():
                running = self.running.get((message.group, message.member))
                if running is not None and running.spoken and running.number + 1 == message.segment:
                    key = running.key
                    self.running[key] = Segment(key, message.segment, running.num_sampled)
            case m.Park():
                self._park((message.group, message.member), message.segment)
            case m.Cancel():
                self._stop((message.group, message.member))
                self.over[message.group, message.member] = 1 << 30
            case m.Drain():
                self.final = message.final
                self.admitted.clear()
                for key in list(self.running):
                    self._stop(key)

    def work(self, now: float) -> None:
        while self.answers:
            self._answer(now, *self.answers.popleft())
        choose = self.world.random.random
        while self.admitted and self.final is None and choose() < 0.5:
            self.open(next(iter(self.admitted)))
        for segment in list(self.running.values()):
            if segment.due <= now:
                self._go_on(now, segment)
            elif segment.engine is None and math.isinf(segment.due) and not segment.spoken:
                if self.acknowledged(segment.after):
                    self._begin(now, segment)
            elif segment.parked and segment.engine is not None and choose() < 0.3:
                segment.engine.abort(segment.rid)
        if self.final is not None and not self.evaluated:
            self.evaluated = True
            rewards = np.array([1.0], np.float32)
            version = self.final
            self.post(lambda n: m.Evaluated(sequence=n, label="last", version=version, rewards=rewards))
        for remembered in (self.over, self.members, self.episodes):
            while len(remembered) > 4096:
                remembered.pop(next(iter(remembered)))  # type: ignore[call-overload]

    def open(self, group: int) -> None:
        """Its members are asked for when the queue knows it."""
        self.admitted.pop(group, None)
        self.opened.add(group)
        fields: dict[str, Any] = {
            "group": group,
            "task": self.world.task_of(group),
            "members": self.world.members,
            "problem": b"p",
        }
        own = self.world.agents and group % 3 == 0
        prompt = np.array(() if own else PROMPT, np.int32)
        after = self.post(lambda n: m.OpenGroup(sequence=n, prompt_ids=prompt, **fields))
        self.members[group] = self.world.members
        for member in range(self.world.members):
            self.running[group, member] = Segment((group, member), 0, 0, prompted=not own, after=after)

    def _go_on(self, now: float, segment: Segment) -> None:
        """A turn is over, or the environment gives up before the queue has answered."""
        choice = self.world.random.random() if self.world.agents and not segment.spoken else 1.0
        if choice < 0.1:
            self._branch(*segment.key)
        if choice < 0.5:
            self._append(now, segment)
        else:
            self._close(segment)

    def _append(self, now: float, segment: Segment) -> None:
        lie = segment.num_sampled > segment.base and self.world.random.random() < 0.005
        if lie:
            self.world.truth.wronged(segment.key)
        gives_up = self.world.random.random() < 0.05
        segment.due, segment.spoken = now + 1.0 if gives_up else math.inf, True
        ids = np.array(self.world.new_tokens(self.world.random.randrange(1, 5)), np.int32)
        fields: dict[str, Any] = {"group": segment.key[0], "member": segment.key[1], "segment": segment.number}
        count = segment.num_sampled + lie
        self.post(lambda n: m.AppendTokens(sequence=n, num_sampled=count, token_ids=ids, **fields))

    def _branch(self, group: int, member: int) -> None:
        episode, branch = self.episodes.get((group, member), member), self.members[group]
        self.members[group] += 1
        self.episodes[group, branch] = episode
        ids = np.array(self.world.new_tokens(self.world.random.randrange(1, 4)), np.int32)
        after = self.post(
            lambda n: m.OpenBranch(sequence=n, group=group, member=branch, episode=episode, prompt_ids=ids)
        )
        self.running[group, branch] = Segment((group, branch), 0, 0, after=after)

    def _begin(self, now: float, segment: Segment) -> None:
        if not segment.prompted:
            self._append(now, segment)
            return
        budget = self.world.max_new - segment.base
        if segment.finish or budget == 0:
            self._reward(now, segment, segment.base)
            return
        if not self.engines:
            return
        engine = self.world.random.choice(self.engines)
        if not engine.alive:
            self._interrupted(segment, "engine_unreachable", -1)
            return
        segment.engine = engine
        if self.world.agents:
            goal = min(budget, int(self.world.random.lognormvariate(1.0, 0.9)))
            last = "stop" if goal < budget else "length"
        else:
            length = self.world.length_of(segment.key)
            last = "stop" if length < self.world.max_new else "length"
            goal = max(0, length - segment.base)
        engine.requests[segment.rid] = Request(segment.rid, segment.key, segment.number, goal, last, self.answers)

    def _answer(self, now: float, rid: str, finish: str, num_sampled: int) -> None:
        _, group, member, number = parse_rid(rid)
        segment = self.running.get((group, member))
        if segment is None or segment.number != number:
            return
        segment.engine = None
        if finish in ("abort", "unreachable"):
            self._interrupted(segment, "parked" if segment.parked else finish, num_sampled)
        else:
            self._reward(now, segment, segment.base + num_sampled)

    def _reward(self, now: float, segment: Segment, num_sampled: int) -> None:
        segment.due, segment.num_sampled = now + 4 * self.world.random.random() ** 2, num_sampled

    def _close(self, segment: Segment) -> None:
        self._end(segment.key, segment.number)
        choice = self.world.random.random()
        fields: dict[str, Any] = {"group": segment.key[0], "member": segment.key[1], "segment": segment.number}
        if choice < 0.02:
            fields |= {"status": "failed", "reason": "reward_error"}
        else:
            # of one in which nothing was asked, nobody would ever know better
            lie = choice > 0.995 and (segment.num_sampled > segment.base or not self.world.agents)
            if lie:
                self.world.truth.wronged(segment.key)
            reward = float(self.world.random.randrange(4))
            if self.world.agents:
                reward = float((segment.key[0] + self.episodes.get(segment.key, segment.key[1])) % 4)
            self.world.truth.closes[*segment.key, segment.number] = reward
            fields |= {"status": "done", "reward": reward, "num_sampled": segment.num_sampled + lie}
        self.post(lambda n: m.CloseTrajectory(sequence=n, **fields))

    def _park(self, key: Key, number: int) -> None:
        segment = self.running.get(key)
        if segment is None:
            if self.over.get(key, -1) < number:
                self._interrupted(Segment(key, number, 0), "parked", -1)
        elif segment.spoken:
            return  # the queue says what becomes of it
        elif segment.number == number and segment.engine is None and math.isinf(segment.due):
            self._interrupted(segment, "parked", 0)
        elif segment.number == number and segment.engine is not None:
            segment.parked = True
            segment.engine.abort(segment.rid)

    def _interrupted(self, segment: Segment, reason: str, num_sampled: int) -> None:
        self._end(segment.key, segment.number)
        fields = {"group": segment.key[0], "member": segment.key[1], "segment": segment.number}
        self.post(lambda n: m.Interrupted(sequence=n, **fields, reason=reason, num_sampled=num_sampled))

    def _stop(self, key: Key) -> None:
        """Its request ends too, if the engine hears of it."""
        segment = self.running.get(key)
        if segment is None:
            return
        self._end(key, segment.number)
        if segment.engine is not None and self.world.random.random() < 0.8:
            segment.engine.abort(segment.rid)

    def _end(self, key: Key, number: int) -> None:
        self.running.pop(key, None)
        self.over.pop(key, None)
        self.over[key] = number


# -- the learner -----------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """What outlives a learner: its checkpoints, and its log."""

    checkpoints: list[int] = field(default_factory=list)
    """Steps; the last two."""
    learned: dict[Key, int] = field(default_factory=dict)
    """The step of the surviving line that trained it, as the learner itself noted."""

    def go_back_to(self, step: int) -> None:
        self.learned = {key: at for key, at in self.learned.items() if at < step}


class Learner(Peer):
    role = "learner"

    def __init__(self, world: Surroundings, name: str, incarnation: int, disk: Disk, every: int) -> None:
        super().__init__(world, name, incarnation)
        self.disk, self.every = disk, every
        self.last = False
        """Take no further step."""
        self.done: m.LearnerDone | None = None
        self.over = False
        self.lease: m.Lease | None = None
        self.step: Version | None = None
        """The next to be taken."""

    def heard(self, now: float, message: Any) -> None:
        match message:
            case m.Welcome() if self.step is None:
                self._start(message.version)
            case m.Lease() if isinstance(self._request, m.LeaseRequest) and message.step == self.step:
                self.answered()
                self.lease = message
            case m.Done() if self._request is not None and message.what == type(self._request).__name__:
                self.answered()
                self._went_on(message.what)

    def _start(self, newest: Version) -> None:
        disk = self.disk
        if self.incarnation == 1:
            self.step = Version(0, 0)
            self.ask(m.LeaseRequest(step=self.step))
            return
        if len(disk.checkpoints) == 2 and self.world.random.random() < 0.2 and not self.last:
            disk.checkpoints.pop()  # the newest is damaged
        self.step = Version(newest.history + 1, disk.checkpoints[-1] if disk.checkpoints else 0)
        disk.go_back_to(self.step.step)
        # Either opens the history.
        say_so = disk.checkpoints and self.world.random.random() < 0.5
        self.ask(m.Committed(step=self.step) if say_so or self.last else m.LeaseRequest(step=self.step))

    def work(self, now: float) -> None:
        if self.lease is not None and self.world.random.random() < 0.3:
            lease, self.lease = self.lease, None
            assert self.step is not None
            for key in zip(lease.groups.tolist(), lease.members.tolist(), strict=True):
                assert key not in self.disk.learned, f"{key} was trained in step {self.disk.learned[key]}"
                self.disk.learned[key] = self.step.step
            outcome = "skipped" if self.world.random.random() < 0.1 else "trained"
            self.ask(m.Applied(step=self.step, outcome=outcome, metrics={}))
        if isinstance(self._request, m.LeaseRequest) and self.last and self._opened:
            self.answered()
            self._checkpoint()

    @property
    def _opened(self) -> bool:
        """The queue knows its history."""
        return self.step is not None and self.step.history == self.world.weights.history

    def _went_on(self, what: str) -> None:
        assert self.step is not None
        if what == "Applied":
            self.step = self.world.weights = Version(self.step.history, self.step.step + 1)
            if self.last or self.step.step % self.every == 0:
                self._checkpoint()
                return
        elif what == "LearnerDone":
            self.over = True
            return
        elif what == "Committed":
            self.world.weights = self.step
            if self.last:
                self.done = m.LearnerDone(final=self.step, weights_hash="h")
                self.ask(self.done)
                return
        self.ask(m.LeaseRequest(step=self.step))

    def _checkpoint(self) -> None:
        """It is on the disk before anybody hears of it."""
        assert self.step is not None
        if self.step.step not in self.disk.checkpoints:
            self.disk.checkpoints = [*self.disk.checkpoints, self.step.step][-2:]
        self.world.truth.forget_before(self.disk.checkpoints[0] if len(self.disk.checkpoints) == 2 else 0)
        self.ask(m.Committed(step=self.step))


class Publisher(Peer):
    role = "publisher"

    def work(self, now: float) -> None:
        final = self.world.final
        if final is not None and self.world.random.random() < 0.1:
            for engine in self.world.engines_at(final):
                verified = {"engine": engine, "weights_hash": "h", "expected": "h"}
                self.send(m.EngineVerified(version=final, **verified))
