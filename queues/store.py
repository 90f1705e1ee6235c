"""Groups and their trajectories from the first chunk to the day that nobody can ask for them again.

    open -> in flight -> ready -> leased -> applied -> committed -> forgotten
                 \\________\\_________________\\-> dropped (by reason)

A member is complete when its stream finished, its actor closed it, and both agree on the number of tokens, in
whatever order these arrive.  A group is ready when every member is complete or dropped, branches included; it goes on
without the dropped ones while two episodes are left to compare.  Each trajectory stands for itself: what is wrong with
one is no reason to drop the other branches of its episode, and an episode that fails is failed by its actor in each.
How a member goes on after a turn, or the loss of its engine, is in `queues.resuming`.
"""

import dataclasses
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from queues import problems
from queues.admission import Admission
from queues.assembly import Assembly
from queues.leasing import Ready
from queues.ledger import LIVE, Ledger, State
from queues.outgoing import Outgoing
from queues.records import Ended
from queues.resuming import Resuming, cancel_order
from queues.tallies import Tallies, count_name
from queues.trajectories import Group, Trajectory
from queues.versions import Histories
from stream_rl import messages as m
from stream_rl.config import Queue, Recipe
from stream_rl.types import Finish, Int32Array, Status, make_rid

OF_THE_PROCESS = ("lease_timeout_s", "commit_seconds", "fsync", "snapshot_bytes", "keep_journal")
"""Keys of [queue] that decide nothing in here."""
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    run: str
    queue: Queue
    max_new_tokens: int
    silence_s: float = 30.0
    """A peer without a sign of life for this long is lost."""
    keep_retired: int = 4096
    """Groups remembered after their end, so that late rows and closes are told from unknown ones."""

    @classmethod
    def of(cls, recipe: Recipe, run: str) -> "Settings":
        """Those of a run.  What only the queue's process reads is as it is by default: a journal is bound to its
        settings, and a run may go on under another deadline or disk."""
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Queue) if f.name in OF_THE_PROCESS}
        return cls(
            run=run,
            queue=dataclasses.replace(recipe.queue, **defaults),
            max_new_tokens=recipe.rollout.max_new_tokens,
            silence_s=recipe.supervise.silence_timeout_s,
        )


class Store:
    def __init__(
        self, settings: Settings, histories: Histories, ledger: Ledger, tallies: Tallies, out: Outgoing
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._tallies = tallies
        self._out = out
        self.groups: dict[int, Group] = {}
        self.group_counts: dict[State, int] = dict.fromkeys(State, 0)
        self.assembly = Assembly(settings.run, settings.max_new_tokens, histories, ledger, tallies, self.groups)
        self.resuming = Resuming(settings.run, settings.max_new_tokens, self.groups, self.assembly, tallies, out)
        self.ready = Ready(histories, settings.queue)
        self.admission = Admission(settings.queue)
        self._retired: deque[int] = deque()
        self._forgotten: Counter[tuple[str, str]] = Counter()
        """(state or drop reason, trajectories or tokens) of retired groups that are remembered no more."""

    @property
    def outstanding(self) -> int:
        """Groups under way: in flight, ready or leased."""
        return sum(self.group_counts[state] for state in (State.IN_FLIGHT, State.READY, State.LEASED))

    # -- growing -----------------------------------------------------------------------------------------------

    def open(self, now: float, event: m.OpenGroup, actor: str) -> None:
        group = Group(event.group, actor, event.task, event.prompt_ids, event.problem, now)
        self.groups[group.id] = group
        self.group_counts[State.IN_FLIGHT] += 1
        self._tallies.task(event.task).opened += 1
        for member in range(event.members):
            self.resuming.opened(self._begin(now, group, member, None))

    def branch(self, now: float, event: m.OpenBranch) -> None:
        """One that comes after its group was settled is dropped."""
        group = self.groups[event.group]
        trajectory = self._begin(now, group, event.episode, event.prompt_ids)
        self._tallies.branches += 1
        if group.state is State.IN_FLIGHT:
            self.resuming.opened(trajectory)
        else:
            group.pending -= 1
            self._out.send(group.actor, cancel_order(trajectory, "group_over"))
            self._drop(trajectory, "group_over")

    def _begin(self, now: float, group: Group, episode: int, prompt: Int32Array | None) -> Trajectory:
        member = len(group.members)
        rid = make_rid(self._settings.run, group.id, member, 0)
        trajectory = Trajectory(group, member, rid, episode, prompt, began=now, seen=now)
        group.members.append(trajectory)
        group.pending += 1
        self.assembly.by_rid[rid] = trajectory
        self._ledger.admit(1)
        return trajectory

    def chunks(self, now: float, event: m.Chunks) -> tuple[bool, bool]:
        """Take a chunk message.  (whether any trajectory may have settled, whether to ask for a resend)"""
        touched, resend = self.assembly.take(now, event)
        for trajectory in touched:
            self._settle(now, trajectory)
        return bool(touched), resend

    def hear(self, now: float, event: problems.OfTrajectory) -> None:
        """What an actor says of its trajectory, and `problems.of_trajectory` has nothing against."""
        if isinstance(event, m.OpenBranch):
            self.branch(now, event)
            return
        trajectory = self.groups[event.group].members[event.member]
        match event:
            case m.CloseTrajectory():
                self._close(now, trajectory, event)
            case m.AppendTokens():
                self._append(now, trajectory, event)
            case m.Interrupted():
                if trajectory.state is State.IN_FLIGHT and not trajectory.resting:
                    self.resuming.interrupted(now, trajectory, event.reason or INTERRUPTED, event.num_sampled)

    def _append(self, now: float, trajectory: Trajectory, event: m.AppendTokens) -> None:
        # One that has to be resumed hears so instead: the segment was not whole.
        if trajectory.state is State.IN_FLIGHT and not trajectory.interrupted:
            trajectory.appending, trajectory.spoke = event.token_ids.tobytes(), now
            trajectory.num_sampled = event.num_sampled
            self._settle(now, trajectory)

    def _close(self, now: float, trajectory: Trajectory, event: m.CloseTrajectory) -> None:
        failed = event.status == Status.FAILED
        trajectory.closed, trajectory.failed, trajectory.appending = True, failed, b""
        if trajectory.state is State.DROPPED:
            # The abort that a cancelling actor causes may overtake its close.
            if failed and trajectory.reason == INTERRUPTED != event.reason and not trajectory.cancelled:
                self._tallies.aborted -= 1
                self._tallies.cancel(trajectory, event.reason)
            return
        if failed:
            if trajectory.finish == Finish.ABORT:
                self._tallies.cancel(trajectory, event.reason)
            self._drop_member(now, trajectory, event.reason)
            return
        if not np.isfinite(np.float32(event.reward)):  # as the learner will see it
            self._drop_member(now, trajectory, "bad_reward")
            return
        trajectory.reward, trajectory.reward_parts = event.reward, event.reward_parts
        trajectory.num_sampled = event.num_sampled
        self._settle(now, trajectory)

    def overdue(self, now: float, deadline_s: float) -> None:
        """Let groups that have grown for too long go on without their unfinished members."""
        late = [g for g in self.groups.values() if g.state is State.IN_FLIGHT and now - g.opened > deadline_s]
        for group in late:
            for trajectory in [t for t in group.survivors() if not t.complete]:
                if trajectory.state is State.IN_FLIGHT:
                    self._cancel(trajectory, "deadline")
                    self._drop_member(now, trajectory, "deadline")

    def _settle(self, now: float, trajectory: Trajectory) -> None:
        """Complete, continue, drop or resume a trajectory if what has arrived decides it."""
        if trajectory.state is not State.IN_FLIGHT or trajectory.complete:
            return
        if trajectory.said_over:
            # If its actor has nothing from this segment, nothing was asked in it.
            ended = bool(trajectory.finish) or trajectory.num_sampled == trajectory.base
            if trajectory.finish == Finish.ABORT:
                self._tallies.aborted += 1
                self._break(now, trajectory, INTERRUPTED)
            elif ended and trajectory.received == trajectory.num_sampled:
                self._go_on(now, trajectory)
            elif ended or trajectory.received > trajectory.num_sampled:
                self._break(now, trajectory, "count_mismatch")
            elif trajectory.lost > trajectory.received:
                self._break(now, trajectory, "broken_stream")
            else:
                self.resuming.rest_if_orphaned(now, trajectory)
        elif trajectory.interrupted and not trajectory.resting:
            self.resuming.rest_if_whole(now, trajectory)

    def _break(self, now: float, trajectory: Trajectory, reason: str) -> None:
        """Its stream is not what its actor said it was."""
        if trajectory.appending:  # nothing runs, but its actor waits
            self._out.send(trajectory.group.actor, cancel_order(trajectory, reason))
        self._drop_member(now, trajectory, reason)

    def _go_on(self, now: float, trajectory: Trajectory) -> None:
        """Its segment is whole."""
        turned = trajectory.received > trajectory.turned_at
        trajectory.turns += turned
        trajectory.turned_at = trajectory.received
        self._tallies.turns += turned
        ran, waited = trajectory.seen - trajectory.began, max(0.0, trajectory.spoke - trajectory.seen)
        if turned:  # nothing ran before a prompt that the member brought itself
            self.admission.turn(ran, waited if trajectory.appending else 0.0)
        if trajectory.appending:
            self._tallies.appended_tokens += self.resuming.append(now, trajectory)
        elif not len(trajectory.context):
            self._drop_member(now, trajectory, "no_prompt")
        else:
            trajectory.complete = True
            self._tallies.finished(trajectory)
            self._member_settled(now, trajectory.group)

    def _member_settled(self, now: float, group: Group) -> None:
        group.pending -= 1
        if group.pending:
            return
        survivors = {trajectory.episode for trajectory in group.survivors()}
        if len(survivors) < min(2, sum(t.episode == t.member for t in group.members)):
            self.drop_group(group, "too_few_members")
            return
        group.summarise()
        if self._settings.queue.filter == "equal_rewards" and group.reward_range == 0:
            self.drop_group(group, "equal_rewards")
            return
        self.move(group, State.READY)
        self.ready.add(group)
        # Masked tokens included: what the mask takes must not ask for more groups, which would be older still.
        self.admission.completed(sum(group.versions.values()))

    # -- dropping ----------------------------------------------------------------------------------------------

    def drop_group(self, group: Group, reason: str, cancel: bool = False) -> None:
        """Drop every survivor.  With `cancel`, the generation of those that still grow is stopped."""
        for trajectory in list(group.survivors()):
            if cancel:
                self._cancel(trajectory, reason)
            self._drop(trajectory, reason)
        if group.state is State.READY:
            self.ready.discard(group)
        group.pending = 0
        self._set_state(group, State.DROPPED)
        self._tallies.task(group.task).dropped += 1
        self.retire(group)

    def _cancel(self, trajectory: Trajectory, reason: str) -> None:
        if not trajectory.closed and not trajectory.complete and trajectory.state is State.IN_FLIGHT:
            if not trajectory.finish:
                self._tallies.cancel(trajectory, reason)
            self._out.send(trajectory.group.actor, cancel_order(trajectory, reason))

    def _drop_member(self, now: float, trajectory: Trajectory, reason: str) -> None:
        self._drop(trajectory, reason)
        self._member_settled(now, trajectory.group)

    def _drop(self, trajectory: Trajectory, reason: str) -> None:
        trajectory.reason = count_name(self._ledger.dropped, reason)
        self._ledger.drop(trajectory.state, trajectory.received, trajectory.reason)
        trajectory.state = State.DROPPED
        trajectory.release()
        self._out.record(Ended(trajectory.group.id, trajectory.member, "dropped", trajectory.reason))

    # -- states ------------------------------------------------------------------------------------------------

    def move(self, group: Group, target: State) -> None:
        """All survivors go on together; not for dropping or committing."""
        for trajectory in group.survivors():
            self._ledger.move(trajectory.state, target, trajectory.received)
            trajectory.state = target
        self._set_state(group, target)

    def set_committed(self, groups: list[Group], committed: bool) -> int:
        """Mark applied groups as committed, or back; the number of their trajectories.  The ledger is the caller's."""
        state, trajectories = State.COMMITTED if committed else State.APPLIED, 0
        for group in groups:
            for trajectory in group.survivors():
                trajectory.state = state
                trajectories += 1
            self._set_state(group, state)
        return trajectories

    def _set_state(self, group: Group, target: State) -> None:
        self.group_counts[group.state] -= 1
        self.group_counts[target] += 1
        group.state = target

    def retire(self, group: Group) -> None:
        """Let its data go; remember it for a while."""
        group.release()
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

    def recount(self, again: set[int]) -> None:
        """Count everything again, slowly.  Raises AssertionError, naming both sides, where the books are wrong.

        again: groups that wait to be leased again.
        """
        counts = Counter(self._forgotten)
        groups: Counter[State] = Counter()
        for group in self.groups.values():
            groups[group.state] += 1
            pending = sum(t.state is State.IN_FLIGHT and not t.complete for t in group.members)
            assert pending == group.pending, f"group {group.id}: {pending} members pending, it says {group.pending}"
            for trajectory in group.members:
                self._count(counts, trajectory)
                assert self.assembly.by_rid.get(trajectory.rid) is trajectory, f"{trajectory.rid} leads elsewhere"
                if trajectory.state in (State.IN_FLIGHT, State.READY, State.LEASED, State.APPLIED):
                    flags = trajectory.sampled_flags()
                    held = {len(trajectory.ids) // 4, len(trajectory.logprobs) // 4, len(flags)}
                    assert len(held) == 1, f"trajectory {trajectory.label}: columns of {held} tokens"
                    assert trajectory.base <= trajectory.received == int(flags.sum()), trajectory.label
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
        assert {g.id for g in self.ready} | again == {g.id for g in self.groups.values() if g.state is State.READY}
        assert not again & {g.id for g in self.ready}
