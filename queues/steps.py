"""The learner's side: leases, and what becomes of them.

    lease -> applied (the step was taken or skipped) -> committed (a checkpoint holds it) -> forgotten

The learner's checkpoint is the only commit point.  What lies between two checkpoints is kept: a learner that went back
to a checkpoint opens a new history there, and gets the leases of every later step again, in the same composition and
order, with the ages that the tokens have in the new history.  Data is kept for the last two checkpoints, in case the
newest cannot be read.
"""

from collections import deque
from dataclasses import dataclass

from queues.leasing import build_lease
from queues.ledger import Ledger, State
from queues.outgoing import Outgoing
from queues.records import Ended, Step
from queues.registry import Peer
from queues.store import Settings, Store
from queues.tallies import Settled, Tallies, settle
from queues.trajectories import Group
from queues.versions import MAX_HISTORY, Histories
from stream_rl import messages as m
from stream_rl.types import Version


@dataclass(frozen=True, slots=True)
class OutstandingLease:
    message: m.Lease
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class TakenStep:
    """An applied step whose groups are still here."""

    step: Version
    outcome: str
    groups: list[Group]
    settled: Settled


class Steps:
    def __init__(
        self,
        settings: Settings,
        histories: Histories,
        ledger: Ledger,
        tallies: Tallies,
        store: Store,
        out: Outgoing,
    ) -> None:
        self._settings = settings
        self._histories, self._ledger, self._tallies, self._store, self._out = histories, ledger, tallies, store, out
        self.waiting: str | None = None
        """The learner that waits for the lease of the step `histories.last`."""
        self.lease: OutstandingLease | None = None
        self.applied: deque[TakenStep] = deque()
        """Steps in no checkpoint yet, oldest first."""
        self.committed: deque[TakenStep] = deque()
        """Steps that only the newest checkpoint holds."""
        self.checkpoint = 0
        """Step of the newest checkpoint."""
        self.again: deque[list[Group]] = deque()
        """Leases of dead histories, to be handed out again before anything else."""

    # -- what the learner says ---------------------------------------------------------------------------------

    def request(self, peer: Peer, event: m.LeaseRequest) -> None:
        step, last = event.step, self._histories.last
        if self._tallies.learner_done is not None and step == self._tallies.learner_done.final:
            self._out.refuse(peer.name, "run_ended", f"no lease for step {step}: the run has ended")
        elif not self._open_history(step) and step != last:
            self._out.refuse(peer.name, "wrong_step", f"the next step is {last}, a lease was asked for {step}")
        elif self.lease is not None:
            self._out.send(peer.name, self.lease.message)
        else:
            self.waiting = peer.name

    def apply(self, now: float, peer: Peer, event: m.Applied) -> tuple[m.Lease, Settled] | None:
        """The step's lease and what became of its tokens; None if nothing changed."""
        step = event.step
        if self.lease is None or step != self.lease.message.step:
            if step.history == self._histories.current and step.step < self._histories.last.step:
                self._out.send(peer.name, m.Done(what="Applied"))
                return None
            detail = f"step {step} is not leased; the next is {self._histories.last}"
            self._out.refuse(peer.name, "not_leased", detail)
            return None
        if event.outcome not in ("trained", "skipped"):
            self._out.refuse(peer.name, "bad_outcome", f"an outcome is trained or skipped, got {event.outcome!r}")
            return None
        lease, self.lease = self.lease, None
        settled = settle(lease.message, event.outcome)
        for group in lease.groups:
            self._store.move(group, State.APPLIED)
            tally = self._tallies.task(group.task)
            tally.applied += 1
            tally.longest_s = max(tally.longest_s, now - group.opened)
        self.applied.append(TakenStep(step, event.outcome, lease.groups, settled))
        self._tallies.applied(event, settled)
        self._histories.publish(Version(step.history, step.step + 1))
        members = [(t.group.id, t.member) for group in lease.groups for t in group.survivors()]
        groups, numbers = tuple(g for g, _ in members), tuple(n for _, n in members)
        self._out.record(Step(step.history, step.step, event.outcome, groups, numbers))
        for group_id, member in members:
            self._out.record(Ended(group_id, member, "applied", history=step.history, step=step.step))
        self._out.send(peer.name, m.Done(what="Applied"))
        return lease.message, settled

    def commit(self, peer: Peer, event: m.Committed) -> None:
        """A durable checkpoint holds every step below `event.step`."""
        step = event.step
        self._open_history(step)
        if step.history != self._histories.current or step.step > self._histories.last.step:
            detail = f"cannot commit {step}: the last version is {self._histories.last}"
            self._out.refuse(peer.name, "unknown_version", detail)
            return
        if step.step > self.checkpoint:
            self.checkpoint = step.step
            while self.committed:
                for group in self.committed.popleft().groups:
                    self._store.retire(group)
            while self.applied and self.applied[0].step.step < step.step:
                taken = self.applied.popleft()
                self.committed.append(taken)
                trajectories = self._store.set_committed(taken.groups, True)
                self._ledger.commit(trajectories, taken.settled.trained, taken.settled.masked)
        self._out.send(peer.name, m.Done(what="Committed"))

    def done(self, peer: Peer, event: m.LearnerDone) -> None:
        if event.final != self._histories.last:
            detail = f"the last version is {self._histories.last}, got {event.final}"
            self._out.refuse(peer.name, "unknown_version", detail)
            return
        self._tallies.learner_done = event
        self.waiting = None
        self._out.send(peer.name, m.Done(what="LearnerDone"))

    # -- histories ---------------------------------------------------------------------------------------------

    def _open_history(self, step: Version) -> bool:
        """True if `step` opens a new history: a restarted learner goes on from there."""
        last, oldest = self._histories.last, self.committed[0].step.step if self.committed else self.checkpoint
        if not (last.history < step.history <= MAX_HISTORY and oldest <= step.step <= last.step):
            return False
        self._histories.open(step.history, step.step)
        self._tallies.learner_done = None
        again = [self._take_back(taken) for taken in self._later_than(step.step)]
        if self.lease is not None:
            again.append(self.lease.groups)
            for group in self.lease.groups:
                self._store.move(group, State.READY)
            self.lease = None
        self.again.extendleft(reversed(again))
        self.checkpoint = min(self.checkpoint, step.step)
        self.waiting = None
        self._store.ready.refresh()
        return True

    def _later_than(self, step: int) -> list[TakenStep]:
        """Take the steps from `step` on out of the line, newest first; returned oldest first."""
        later: list[TakenStep] = []
        for line in (self.applied, self.committed):
            while line and line[-1].step.step >= step:
                taken = line.pop()
                if line is self.committed:
                    trajectories = self._store.set_committed(taken.groups, False)
                    self._ledger.uncommit(trajectories, taken.settled.trained, taken.settled.masked)
                self._tallies.taken_back(taken.settled, taken.outcome)
                later.append(taken)
        return later[::-1]

    def _take_back(self, taken: TakenStep) -> list[Group]:
        for group in taken.groups:
            self._store.move(group, State.READY)
            self._tallies.task(group.task).applied -= 1
            for t in group.survivors():
                step = taken.step
                self._out.record(Ended(group.id, t.member, "forked", history=step.history, step=step.step))
        return taken.groups

    # -- leases ------------------------------------------------------------------------------------------------

    def try_lease(self) -> None:
        """Lease to the learner that waits, if there is enough."""
        if self.waiting is None or self.lease is not None:
            return
        groups = self._next_again() or self._next_ready()
        if not groups:
            return
        for group in groups:
            self._store.ready.discard(group)
            self._store.move(group, State.LEASED)
        queue = self._settings.queue
        message = build_lease(self._histories.last, groups, self._histories, queue)
        self._tallies.short_leases += int(message.trainable.sum()) < queue.min_tokens
        self.lease = OutstandingLease(message, groups)
        self._out.send(self.waiting, message)
        self.waiting = None

    def _next_again(self) -> list[Group]:
        """The oldest lease of a dead history in which anything may still train."""
        while self.again:
            groups = self.again.popleft()
            if any(self._store.ready.count(group) for group in groups):
                return groups
            for group in groups:
                self._store.drop_group(group, "too_old")
        return []

    def _next_ready(self) -> list[Group]:
        ready, queue = self._store.ready, self._settings.queue
        ready.refresh()
        for group in ready.hopeless():
            self._store.drop_group(group, "too_old" if group.versions else "empty")
        if self._store.admission.by_batch:
            return list(ready)
        if ready.trainable_tokens < queue.min_tokens:
            return []
        return ready.choose(queue.min_tokens, queue.max_tokens)

    @property
    def groups_again(self) -> set[int]:
        return {group.id for groups in self.again for group in groups}
