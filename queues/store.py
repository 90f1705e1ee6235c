"""Groups and their trajectories from the first chunk to the last commit.

    open -> in flight -> ready -> leased -> applied -> committed
                 \\________\\_________________\\-> dropped (by reason)

A member is complete when its stream finished, its actor closed it, and both agree on the number of tokens, in
whatever order these arrive.  A group is ready when every member is complete or dropped; it goes on without the
dropped ones while two are left to compare.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from queues.admission import Admission
from queues.assembly import Assembly
from queues.leasing import Ready
from queues.ledger import LIVE, Ledger, State
from queues.tallies import Settled, Tallies, count_name
from queues.trajectories import Group, Trajectory
from queues.versions import Histories
from stream_rl.config import Queue
from stream_rl.messages import Chunks, CloseTrajectory, OpenGroup
from stream_rl.types import Finish, Status, Version, make_rid

MAX_MEMBERS = 4096
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    run: str
    queue: Queue
    max_new_tokens: int
    keep_retired: int = 4096
    """Groups remembered after their end, so that late rows and closes are told from unknown ones."""


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """A step that was taken and is in no checkpoint yet."""

    step: Version
    groups: list[Group]
    settled: Settled


class Store:
    def __init__(self, settings: Settings, histories: Histories, ledger: Ledger, tallies: Tallies) -> None:
        self._settings = settings
        self._histories = histories
        self._ledger = ledger
        self._tallies = tallies
        self.groups: dict[int, Group] = {}
        self.group_counts: dict[State, int] = dict.fromkeys(State, 0)
        self.assembly = Assembly(settings.run, settings.max_new_tokens, histories, ledger, tallies)
        self.ready = Ready(histories, settings.queue.max_token_age)
        self.admission = Admission(settings.queue)
        self.applied: deque[AppliedStep] = deque()
        self._retired: deque[int] = deque()
        self._forgotten: Counter[tuple[str, str]] = Counter()
        """(state or drop reason, trajectories or tokens) of retired groups that are remembered no more."""

    @property
    def outstanding(self) -> int:
        """Groups under way: in flight, ready or leased."""
        return sum(self.group_counts[state] for state in (State.IN_FLIGHT, State.READY, State.LEASED))

    # -- growing -----------------------------------------------------------------------------------------------

    def opening_problem(self, event: OpenGroup) -> tuple[str, str] | None:
        """(reason, detail) why the group cannot be opened, or None."""
        if event.group in self.groups or not 0 <= event.group < 1 << 63:
            return "bad_group", f"group {event.group} exists, or is no non-negative 63-bit number"
        if not 1 <= event.members <= MAX_MEMBERS:
            return "bad_members", f"a group has 1 to {MAX_MEMBERS} members, got {event.members}"
        prompt = event.prompt_ids
        if prompt.ndim != 1 or not prompt.size or int(prompt.min()) < 0:
            return "bad_prompt", f"a prompt is a row of token ids, got {prompt.size} of shape {prompt.shape}"
        return None

    def open(self, event: OpenGroup, actor: str) -> None:
        group = Group(event.group, actor, event.task, event.prompt_ids, pending=event.members)
        for member in range(event.members):
            trajectory = Trajectory(group, member, make_rid(self._settings.run, event.group, member, 0))
            group.members.append(trajectory)
            self.assembly.by_rid[trajectory.rid] = trajectory
        self.groups[group.id] = group
        self.group_counts[State.IN_FLIGHT] += 1
        self._ledger.admit(event.members)

    def chunks(self, event: Chunks) -> tuple[bool, bool]:
        """Take a chunk message.  (whether any trajectory may have settled, whether to ask for a resend)"""
        touched, resend = self.assembly.take(event)
        for trajectory in touched:
            self._settle(trajectory)
        return bool(touched), resend

    def closing_problem(self, event: CloseTrajectory, actor: str) -> tuple[str, str] | None:
        """(reason, detail) why the close cannot be taken, or None."""
        group = self.groups.get(event.group)
        if group is None:
            return "unknown_group", f"no group {event.group} is open"
        if group.actor != actor:
            return "not_its_actor", f"group {event.group} is of {group.actor}"
        if not 0 <= event.member < len(group.members):
            return "unknown_member", f"group {event.group} has {len(group.members)} members, got {event.member}"
        if event.status not in set(Status):
            return "bad_status", f"a status is one of {[s.value for s in Status]}, got {event.status!r}"
        if group.members[event.member].closed:
            return "already_closed", f"trajectory {event.group}/{event.member} was closed before"
        return None

    def close(self, event: CloseTrajectory) -> None:
        trajectory = self.groups[event.group].members[event.member]
        failed = event.status == Status.FAILED
        trajectory.closed, trajectory.failed = True, failed
        if trajectory.state is State.DROPPED:
            # The abort that a cancelling actor causes may overtake its close.
            if failed and trajectory.reason == INTERRUPTED != event.reason and not trajectory.cancelled:
                self._tallies.aborted -= 1
                self._tallies.cancel(trajectory, event.reason)
            return
        if failed:
            self._drop_member(trajectory, event.reason)
            return
        if not np.isfinite(np.float32(event.reward)):  # as the learner will see it
            self._drop_member(trajectory, "bad_reward")
            return
        self._tallies.finished(event)
        trajectory.reward, trajectory.num_sampled = event.reward, event.num_sampled
        self._settle(trajectory)

    def _settle(self, trajectory: Trajectory) -> None:
        """Complete or drop a trajectory if what has arrived decides it."""
        if trajectory.state is not State.IN_FLIGHT or trajectory.complete:
            return
        if trajectory.finish == Finish.ABORT:
            self._tallies.aborted += 1
            self._drop_member(trajectory, INTERRUPTED)
        elif trajectory.closed:
            if trajectory.finish and trajectory.received == trajectory.num_sampled:
                trajectory.complete = True
                self._member_settled(trajectory.group)
            elif trajectory.finish or trajectory.received > trajectory.num_sampled:
                self._drop_member(trajectory, "count_mismatch")
            elif trajectory.lost > trajectory.received:
                self._drop_member(trajectory, "broken_stream")

    def _member_settled(self, group: Group) -> None:
        group.pending -= 1
        if group.pending:
            return
        survivors = list(group.survivors())
        if len(survivors) < min(2, len(group.members)):
            self.drop_group(group, "too_few_members")
            return
        group.summarise()
        self._move(group, State.READY)
        self.admission.completed(self.ready.add(group))

    # -- dropping ----------------------------------------------------------------------------------------------

    def drop_group(self, group: Group, reason: str, cancel: bool = False) -> list[Trajectory]:
        """Drop every survivor.  With `cancel`, those that still grow count as cancelled and are returned."""
        growing = [t for t in group.survivors() if not t.finish and not t.closed] if cancel else []
        for trajectory in growing:
            self._tallies.cancel(trajectory, reason)
        for trajectory in group.survivors():
            self._drop(trajectory, reason)
        if group.state is State.READY:
            self.ready.remove(group)
        group.pending = 0
        self._set_state(group, State.DROPPED)
        self._retire(group)
        return growing

    def _drop_member(self, trajectory: Trajectory, reason: str) -> None:
        self._drop(trajectory, reason)
        self._member_settled(trajectory.group)

    def _drop(self, trajectory: Trajectory, reason: str) -> None:
        trajectory.reason = count_name(self._ledger.dropped, reason)
        self._ledger.drop(trajectory.state, trajectory.received, trajectory.reason)
        trajectory.state = State.DROPPED
        trajectory.release()

    # -- training ----------------------------------------------------------------------------------------------

    def drop_hopeless(self) -> None:
        """Drop the ready groups in which no token may train at the step being awaited."""
        self.ready.refresh()
        for group in self.ready.hopeless():
            self.drop_group(group, "too_old" if group.versions else "empty")

    def lease(self) -> list[Group]:
        """Choose the groups of the next lease and mark them leased."""
        queue = self._settings.queue
        groups = self.ready.choose(queue.min_tokens, queue.max_tokens)
        for group in groups:
            self.ready.remove(group)
            self._move(group, State.LEASED)
        return groups

    def put_back(self, groups: list[Group]) -> None:
        """The lease will never be applied: its groups are first in line again."""
        for group in groups:
            self._move(group, State.READY)
        self.ready.put_back(groups)

    def apply(self, step: Version, groups: list[Group], settled: Settled) -> None:
        for group in groups:
            self._move(group, State.APPLIED)
            for trajectory in group.survivors():
                trajectory.release()
        self.applied.append(AppliedStep(step, groups, settled))

    def commit(self, step: Version) -> None:
        """A durable checkpoint holds every step below `step`."""
        while self.applied and self.applied[0].step < step:
            done = self.applied.popleft()
            trajectories = 0
            for group in done.groups:
                for trajectory in group.survivors():
                    trajectory.state = State.COMMITTED
                    trajectories += 1
                self._set_state(group, State.COMMITTED)
                self._retire(group)
            self._ledger.commit(trajectories, done.settled.trained, done.settled.masked)

    def fork(self, step: int) -> None:
        """A new history starts at `step`: what the old one applied from there on trained weights that are gone."""
        while self.applied and self.applied[-1].step.step >= step:
            for group in self.applied.pop().groups:
                self.drop_group(group, "dead_history")

    # -- states ------------------------------------------------------------------------------------------------

    def _move(self, group: Group, target: State) -> None:
        for trajectory in group.survivors():
            self._ledger.move(trajectory.state, target, trajectory.received)
            trajectory.state = target
        self._set_state(group, target)

    def _set_state(self, group: Group, target: State) -> None:
        self.group_counts[group.state] -= 1
        self.group_counts[target] += 1
        group.state = target

    def _retire(self, group: Group) -> None:
        self._retired.append(group.id)
        if len(self._retired) > self._settings.keep_retired:
            old = self.groups.pop(self._retired.popleft())
            for trajectory in old.members:
                del self.assembly.by_rid[trajectory.rid]
                self._count(self._forgotten, trajectory)

    # -- proof -------------------------------------------------------------------------------------------------

    @staticmethod
    def _count(counts: Counter[tuple[str, str]], trajectory: Trajectory) -> None:
        where = f"dropped {trajectory.reason}" if trajectory.state is State.DROPPED else trajectory.state.value
        counts[where, "trajectories"] += 1
        counts[where, "tokens"] += trajectory.received

    def recount(self) -> None:
        """Count everything again, slowly.  Raises AssertionError, naming both sides, where the books are wrong."""
        counts = Counter(self._forgotten)
        groups: Counter[State] = Counter()
        for group in self.groups.values():
            groups[group.state] += 1
            pending = sum(t.state is State.IN_FLIGHT and not t.complete for t in group.members)
            assert pending == group.pending, f"group {group.id}: {pending} members pending, it says {group.pending}"
            for trajectory in group.members:
                self._count(counts, trajectory)
                if trajectory.state in (State.IN_FLIGHT, State.READY, State.LEASED):
                    held = {len(trajectory.ids) // 4, len(trajectory.logprobs) // 4}
                    held |= {sum(count for _, _, count in trajectory.spans), trajectory.received}
                    assert len(held) == 1, f"trajectory {trajectory.label}: columns of {held} tokens"
        ledger = self._ledger
        books: Counter[tuple[str, str]] = Counter()
        for state in (*LIVE, State.COMMITTED):
            books[state.value, "trajectories"] = ledger.trajectories[state]
        for state, tokens in ledger.tokens.items():
            books[state.value, "tokens"] = tokens
        books[State.COMMITTED.value, "tokens"] = ledger.trained + sum(ledger.masked.values())
        for reason, number in ledger.dropped.items():
            books[f"dropped {reason}", "trajectories"] = number
            books[f"dropped {reason}", "tokens"] = ledger.dropped_tokens[reason]
        assert +books == +counts, f"books {+books} != counted {+counts}"
        for state in (State.IN_FLIGHT, State.READY, State.LEASED, State.APPLIED):
            assert groups[state] == self.group_counts[state], f"{state} groups: {groups} != {self.group_counts}"
        assert {g.id for g in self.ready} == {g.id for g in self.groups.values() if g.state is State.READY}
