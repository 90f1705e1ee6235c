"""What must hold of a queue, by a model that sees what peers really did and what the queue durably said.

`Truth` knows every token that was sampled, in which surviving step each trajectory trained, and which leases have to
come again.  It reads nothing from the core.
"""

from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from queues.core import QueueCore
from queues.ledger import State
from queues.records import Ended, Step
from queues.registry import Peer
from stream_rl import messages as m
from stream_rl.types import Version

Key = tuple[int, int]
"""(group, member)"""
PROMPT = (1, 2)
HONEST = {
    "too_old", "empty", "too_few_members", "equal_rewards", "deadline", "reward_error", "request_timeout", "run_end",
    "group_over",
}  # fmt: skip
"""Reasons to drop a trajectory of which nobody said anything wrong."""


def logprobs_of(ids: np.ndarray) -> np.ndarray:
    """Every token has its own, so that one in the wrong place is seen."""
    return (ids % 97).astype(np.float32) * np.float32(-0.01)


@dataclass(slots=True)
class Line:
    """One trajectory as it really is: what its newest segment has sampled, after what the segments before left."""

    task: str
    episode: int
    prompt: list[int]
    segment: int = 0
    ids: list[int] = field(default_factory=list)
    versions: list[tuple[int, int] | None] = field(default_factory=list)
    """None: an actor appended the token."""
    pending: list[int] = field(default_factory=list)
    """Said to come behind the segment; whether it does is the queue's to decide."""
    wronged: bool = False
    """Somebody sent bad rows for it, or closed it with a wrong length: it may be dropped for that."""

    def append(self) -> None:
        """The queue has taken what was pending."""
        assert self.pending, "something was appended that nobody said"
        if self.prompt or self.ids:
            self.ids += self.pending
            self.versions += [None] * len(self.pending)
        else:
            self.prompt = self.pending
        self.pending = []
        self.segment += 1

    def logprobs(self) -> list[float]:
        known = logprobs_of(np.array(self.ids, np.int32)).tolist()
        return [0.0 if version is None else known[i] for i, version in enumerate(self.versions)]


class Truth:
    def __init__(self, bounds: dict[str, int], max_tokens: int) -> None:
        """bounds: greatest age of a trained token by task, -1 for none."""
        self.bounds, self.max_tokens = bounds, max_tokens
        self.lines: dict[Key, Line] = {}
        self.closes: dict[tuple[int, int, int], float] = {}
        """Reward that was said of (group, member, segment)."""
        self.members: dict[int, int] = {}
        """Trajectories of each group that was opened."""
        self.tasks: dict[int, str] = {}
        self.open: dict[Key, None] = {}
        """Trajectories of which nothing has become yet."""
        self.ended: dict[Key, str] = {}
        """What became of a trajectory: a step's number or the reason of its drop, as the journal tells."""
        self.dropped: Counter[str] = Counter()
        self.applied: dict[Key, int] = {}
        """The step of the surviving line that holds it."""
        self.steps: dict[int, list[Key]] = {}
        """Composition of each step of the surviving line."""
        self.next = Version(0, 0)
        self.forks: dict[int, int] = {}
        self.lease: tuple[Version, list[Key]] | None = None
        self.again: deque[list[Key]] = deque()
        """Leases of dead histories that have not come again."""
        self.num_steps = 0
        """Also those of dead histories."""

    # -- what happened -----------------------------------------------------------------------------------------

    def sampled(self, key: Key, segment: int, ids: Sequence[int], version: Version) -> None:
        line = self.lines.get(key)
        if line is not None and line.segment == segment:
            line.ids += ids
            line.versions += [(version.history, version.step)] * len(ids)

    def wronged(self, key: Key) -> None:
        if key in self.lines:
            self.lines[key].wronged = True

    def committed(self, event: Any) -> None:
        """The event is in the journal, and it was not refused."""
        match event:
            case m.OpenGroup():
                assert event.group not in self.members, f"group {event.group} was opened twice"
                self.members[event.group] = 0
                for member in range(event.members):
                    self._opened(event.group, Line(event.task, member, event.prompt_ids.tolist()))
            case m.OpenBranch():
                assert event.member == self.members[event.group]
                task = self.tasks[event.group]
                self._opened(event.group, Line(task, event.episode, event.prompt_ids.tolist()))
            case m.AppendTokens():
                line = self.lines.get((event.group, event.member))
                if line is not None and line.segment == event.segment:
                    line.pending = event.token_ids.tolist()
            case m.LeaseRequest() | m.Committed() if event.step.history > self.next.history:
                self._fork(event.step)

    def said(self, message: Any) -> None:
        """The queue has said this, and it is durable."""
        match message:
            case m.Lease():
                self._leased(message)
            case m.Resume():
                self._resumed(message)
            case m.Appended():
                line = self.lines[message.group, message.member]
                assert message.segment - line.segment in (0, 1)
                if message.segment > line.segment:
                    line.append()
            case Step():
                self._stepped(message)
            case Ended(outcome="dropped"):
                self._dropped((message.group, message.member), message.reason)
            case Ended(outcome="applied"):
                assert self.ended[message.group, message.member] == str(message.step)
            case Ended(outcome="forked"):
                del self.ended[message.group, message.member]
                self.open[message.group, message.member] = None

    def forget_before(self, step: int) -> None:
        """No checkpoint that can be gone back to lies before this step."""
        for old in [number for number in self.steps if number < step]:
            for key in self.steps.pop(old):
                self._close_of(key, self.lines.pop(key), forget=True)

    # -- what must hold ----------------------------------------------------------------------------------------

    def _opened(self, group: int, line: Line) -> None:
        key = group, self.members[group]
        self.members[group] += 1
        self.tasks[group] = line.task
        self.lines[key] = line
        self.open[key] = None

    def _close_of(self, key: Key, line: Line, forget: bool = False) -> float:
        """The reward that was said of it, perhaps before it was heard that an append had begun the next segment."""
        segment = line.segment if (*key, line.segment) in self.closes else line.segment - 1
        reward = self.closes[*key, segment]
        if forget:
            for number in (line.segment, line.segment - 1):
                self.closes.pop((*key, number), None)
        return reward

    def _fork(self, step: Version) -> None:
        assert step.step <= self.next.step
        again = [self.steps.pop(number) for number in range(step.step, self.next.step)]
        for key in (key for keys in again for key in keys):
            del self.applied[key]
        if self.lease is not None:
            again.append(self.lease[1])
        self.again.extendleft(reversed(again))
        self.lease = None
        self.forks = {h: min(fork, step.step) for h, fork in (self.forks | {self.next.history: self.next.step}).items()}
        self.next = step

    def _resumed(self, order: m.Resume) -> None:
        line = self.lines[order.group, order.member]
        ids = order.token_ids.tolist()
        if order.segment == line.segment + 2:  # one of them for what was appended, between two rounds
            line.append()
        assert ids == line.ids[: len(ids)], "a resume from other tokens than were sampled"
        assert order.sampled.tolist() == [version is not None for version in line.versions[: len(ids)]]
        assert order.logprobs.tolist() == line.logprobs()[: len(ids)]
        assert order.segment - line.segment in (0, 1)
        assert order.prompt_ids.tolist() == line.prompt
        assert order.episode == line.episode
        if order.segment > line.segment:
            line.segment, line.pending = order.segment, []
            del line.ids[len(ids) :], line.versions[len(ids) :]

    def _leased(self, lease: m.Lease) -> None:
        keys = list(zip(lease.groups.tolist(), lease.members.tolist(), strict=True))
        if self.lease is not None and self.lease[0] == lease.step:
            assert keys == self.lease[1], "a repeated request got another lease"
            return
        assert lease.step == self.next, f"expected a lease of step {self.next}, got {lease.step}"
        assert self.lease is None, "two leases at once"
        while self.again:
            expected = self.again.popleft()
            if expected == keys:
                break
            lost = [self.ended.get(key) for key in expected]
            assert set(lost) <= {"too_old", "run_end"}, f"expected {expected} again, got {keys}: {lost}"
        self.lease = lease.step, keys
        self._check(lease, keys)

    def _check(self, lease: m.Lease, keys: list[Key]) -> None:
        groups = Counter(group for group, _ in keys)
        assert len(lease.token_ids) <= self.max_tokens or len(groups) == 1
        assert lease.trainable.any()
        for group, count in groups.items():
            whole = sum((group, n) not in self.ended for n in range(self.members[group]))
            assert count == whole, f"{count} of {whole} survivors of group {group} are leased"
        at = sampled = 0
        columns = lease.lengths.tolist(), lease.rewards.tolist(), lease.episodes.tolist()
        for key, length, reward, episode in zip(keys, *columns, strict=True):
            assert key not in self.applied, f"{key} is leased again, step {self.applied[key]} holds it"
            line = self.lines[key]
            if line.pending and length == len(line.prompt) + len(line.ids) + len(line.pending):
                line.append()  # and closed, before its actor was told
            assert line.prompt
            assert episode == line.episode
            own = slice(at + len(line.prompt), at + length)
            assert lease.token_ids[at : own.start].tolist() == line.prompt
            assert lease.token_ids[own].tolist() == line.ids, f"{key} is leased with other tokens than were sampled"
            assert lease.logprobs[own].tolist() == line.logprobs()
            versions = list(zip(lease.histories[own].tolist(), lease.steps[own].tolist(), strict=True))
            assert versions == [version or (0, 0) for version in line.versions]
            ages, bound = self._ages(line), self.bounds[line.task]
            assert lease.ages[own].tolist() == [age or 0 for age in ages]
            assert all(age is None or age >= 0 for age in ages)
            trains = [age is not None and (bound < 0 or age <= bound) for age in ages]
            assert lease.trainable[own].tolist() == trains
            assert lease.sampled[own].tolist() == [age is not None for age in ages]
            assert reward == self._close_of(key, line)
            sampled += sum(age is not None for age in ages)
            at += length
        assert at == len(lease.token_ids)
        assert int(lease.sampled.sum()) == sampled

    def _ages(self, line: Line) -> list[int | None]:
        """None for what was appended."""
        step, forks = self.next.step, self.forks
        return [None if v is None else step - min(v[1], forks.get(v[0], v[1])) for v in line.versions]

    def _stepped(self, record: Step) -> None:
        assert (record.history, record.step) == self.next, f"expected step {self.next}, got {record}"
        assert self.lease is not None
        keys = list(zip(record.groups, record.members, strict=True))
        assert keys == self.lease[1]
        for key in keys:
            assert key not in self.applied
            assert key not in self.ended
            self.applied[key] = record.step
            self.ended[key] = str(record.step)
            del self.open[key]
        self.steps[record.step] = keys
        self.lease, self.next = None, Version(record.history, record.step + 1)
        self.num_steps += 1

    def _dropped(self, key: Key, reason: str) -> None:
        assert key not in self.ended, f"{key} ended as {self.ended[key]}, now it is dropped: {reason}"
        line = self.lines.pop(key)
        assert reason in HONEST or line.wronged, f"{key} is dropped by {reason}, and nobody did wrong"
        bound = self.bounds[line.task]
        if reason == "too_old":
            assert all(age is None or age > bound >= 0 for age in self._ages(line)), f"{key} is not too old"
        for segment in (line.segment, line.segment - 1):
            self.closes.pop((*key, segment), None)
        self.ended[key] = reason
        self.dropped[reason] += 1
        del self.open[key]

    def check_accounts(self, core: QueueCore) -> None:
        """Every trajectory of every group is somewhere.  Needs a core whose last event is durable."""
        for group, member in self.open:
            state = core.store.groups[group].members[member].state
            assert state in (State.IN_FLIGHT, State.READY, State.LEASED), f"{group}/{member} is lost: {state}"
        assert core.ledger.admitted == len(self.open) + len(self.ended) == sum(self.members.values())
        assert self.dropped == core.ledger.dropped


# -- the whole state -------------------------------------------------------------------------------------------

NOT_DURABLE = {"refused", "last_refusal", "now", "started", "actions", "durable"}
"""What events that are not in the journal may change."""


def portrait(thing: Any, seen: dict[int, int] | None = None) -> Any:
    """The whole state in plain values, to compare; observers aside, who come and go without the journal."""
    seen = {} if seen is None else seen
    if isinstance(thing, float):
        return repr(thing)  # nan is the same as nan here
    if thing is None or isinstance(thing, (bool, int, str, bytes)):
        return thing
    if isinstance(thing, (bytearray, array, np.ndarray)):
        return bytes(thing)
    if isinstance(thing, tuple):
        return tuple(portrait(value, seen) for value in thing)
    if isinstance(thing, (set, frozenset)):
        return sorted(portrait(value, seen) for value in thing)
    if id(thing) in seen:
        return "seen", seen[id(thing)]
    seen[id(thing)] = len(seen)
    if isinstance(thing, dict):
        pairs = ((k, v) for k, v in thing.items() if not (isinstance(v, Peer) and v.role == "observer"))
        return [(portrait(k, seen), portrait(v, seen)) for k, v in pairs]
    if isinstance(thing, (list, deque)):
        return [portrait(value, seen) for value in thing]
    names = getattr(type(thing), "__slots__", None) or vars(thing)
    return [type(thing).__name__, [(n, portrait(getattr(thing, n), seen)) for n in names if n not in NOT_DURABLE]]
