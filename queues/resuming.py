"""Trajectories from one segment to the next.

After a segment that ended by itself, what the environment said comes behind it, and its actor may ask for the next.

Others have to move: their engine was lost or drained, their actor was lost, or their round is over.  A segment ends
before its trajectory's turn does in one of these ways:

    its actor says Interrupted     with a count: once the stream has brought as many tokens; without: at once
    its engine is lost or drained  lost: at once, with the tokens that are here; drained: its actor is told to stop it
    its actor is lost              at once, for the actor that takes over
    its round is over              its actor is told to stop it

From then on the trajectory rests.  It is resumed, as the next segment, as soon as growing is allowed: always in
streaming mode, between two leases in rounds mode.  Rows and words of the segments before it are void.  A turn that
ends while growing is not allowed rests in the same way, and is said to be appended when it is.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from queues.assembly import Assembly
from queues.ledger import State
from queues.outgoing import Outgoing
from queues.tallies import Tallies, count_name
from queues.trajectories import Group, Trajectory
from stream_rl import messages as m
from stream_rl.types import Finish, make_rid

ENDED = (Finish.STOP, Finish.LENGTH)
ENGINE_LOST = "engine_lost"


class Resuming:
    def __init__(
        self,
        run: str,
        max_new_tokens: int,
        groups: Mapping[int, Group],
        assembly: Assembly,
        tallies: Tallies,
        out: Outgoing,
    ) -> None:
        self._run, self._max_new_tokens = run, max_new_tokens
        self._groups, self._assembly, self._tallies, self._out = groups, assembly, tallies, out
        self.may_grow = True
        """False between the end of a round and the beginning of the next."""
        self._resting: dict[Trajectory, None] = {}
        self._losses = 0
        """Engines lost so far."""

    @property
    def resting(self) -> int:
        """Trajectories that wait for the next round."""
        return len(self._resting)

    # -- a turn ends -------------------------------------------------------------------------------------------

    def append(self, now: float, trajectory: Trajectory) -> int:
        """Its segment is whole: what waits comes behind it, and the next may be asked for.  The number of tokens."""
        ids, trajectory.appending = trajectory.appending, b""
        trajectory.append(ids)
        trajectory.finish = Finish.NONE
        self._next_segment(now, trajectory)
        trajectory.appended_before, trajectory.began = trajectory.segment, now
        if self.may_grow:
            self._out.send(trajectory.group.actor, _appended(trajectory))
        else:
            trajectory.resting = True
            self._resting[trajectory] = None
        return len(ids) // 4

    # -- a segment ends ----------------------------------------------------------------------------------------

    def interrupted(self, now: float, trajectory: Trajectory, reason: str, num_sampled: int) -> None:
        """Its segment ended before it did, after `num_sampled` tokens; -1 if nobody knows."""
        trajectory.interrupted = reason
        # With a count the engine is alive, and what it sampled is on its way; without, nothing may ever come.
        trajectory.num_sampled = trajectory.base + num_sampled if num_sampled >= 0 else trajectory.received
        if num_sampled >= 0 and not trajectory.parking:
            self._tallies.aborted += 1
        self.rest_if_whole(now, trajectory)

    def rest_if_whole(self, now: float, trajectory: Trajectory) -> None:
        """An interrupted segment is over when the stream has brought everything that it can.  It need not bring the
        finish: a request that is aborted before it was scheduled never has one."""
        broken = trajectory.lost > trajectory.received
        if trajectory.finish or broken or trajectory.received >= trajectory.num_sampled:
            self._rest(now, trajectory)
        else:
            self.rest_if_orphaned(now, trajectory)

    def rest_if_orphaned(self, now: float, trajectory: Trajectory) -> None:
        """Its tokens are known to be missing, none of them has come, and an engine was lost since its segment began:
        they may have been that engine's.  Better to go on from before them than to wait for ever."""
        said = trajectory.said_over or trajectory.interrupted
        if said and not (trajectory.engine or trajectory.finish) and trajectory.losses < self._losses:
            trajectory.interrupted = trajectory.interrupted or ENGINE_LOST
            self._rest(now, trajectory)

    def engine_lost(self, now: float, engine: str) -> None:
        """No more rows of its segments will come."""
        self._losses += 1
        for trajectory in self._growing():
            if trajectory.resting or trajectory.finish in ENDED:
                continue
            if trajectory.engine == engine:
                trajectory.interrupted = trajectory.interrupted or ENGINE_LOST
                self._rest(now, trajectory)
            else:
                self.rest_if_orphaned(now, trajectory)

    def actor_lost(self, now: float, groups: Iterable[Group], actor: str) -> None:
        """`actor` takes over what another one (or its own former incarnation) was growing."""
        for group in groups:
            group.actor = actor
            for trajectory in group.members:
                if trajectory.state is not State.IN_FLIGHT or trajectory.closed:
                    continue
                if not trajectory.resting:
                    trajectory.interrupted = "actor_lost"
                    self._rest(now, trajectory)
                elif not trajectory.interrupted:  # the new one would not know what was appended
                    trajectory.interrupted = "actor_lost"

    def park(self, engine: str | None = None) -> None:
        """Tell the actors to stop what grows: everywhere, or on one engine."""
        for trajectory in self._growing():
            if engine is None or trajectory.engine == engine:
                self._park(trajectory)

    def opened(self, trajectory: Trajectory) -> None:
        """Its actor may not have known that the round is over."""
        trajectory.losses = self._losses
        if not self.may_grow:
            self._park(trajectory)

    def _park(self, trajectory: Trajectory) -> None:
        over = trajectory.said_over or trajectory.interrupted or trajectory.finish or not len(trajectory.context)
        if over or trajectory.parking or trajectory.resting:
            return
        trajectory.parking = True
        self._out.send(trajectory.group.actor, _park_order(trajectory))

    # -- the next begins ---------------------------------------------------------------------------------------

    def grow(self, now: float, allowed: bool) -> None:
        """Growing is allowed from here on, or not."""
        if allowed == self.may_grow:
            return
        self.may_grow = allowed
        if not allowed:
            self.park()
            return
        for trajectory in list(self._resting):
            if trajectory.state is State.IN_FLIGHT and not trajectory.complete:
                if trajectory.interrupted:
                    self._resume(now, trajectory)
                else:
                    trajectory.resting, trajectory.seen, trajectory.began = False, now, now
                    self._out.send(trajectory.group.actor, _appended(trajectory))
        self._resting.clear()

    def remind(self, actor: str) -> None:
        """`actor` may have missed what it was told, because this process died before it was sent."""
        for group in self._groups.values():
            if group.actor == actor:
                for trajectory in group.members:
                    if trajectory.state is State.DROPPED and not trajectory.closed:
                        self._out.send(actor, cancel_order(trajectory, trajectory.reason))
        for trajectory in self._growing():
            if trajectory.group.actor != actor or trajectory.closed or trajectory.resting:
                continue
            if trajectory.segment and trajectory.received == trajectory.base:
                appended = trajectory.appended_before == trajectory.segment
                self._out.send(actor, _appended(trajectory) if appended else self._order(trajectory))
            if trajectory.parking:
                self._out.send(actor, _park_order(trajectory))

    def _rest(self, now: float, trajectory: Trajectory) -> None:
        trajectory.resting = True
        if self.may_grow:
            self._resume(now, trajectory)
        else:
            self._resting[trajectory] = None

    def _resume(self, now: float, trajectory: Trajectory) -> None:
        why = "parked" if trajectory.parking else trajectory.interrupted
        self._tallies.resumed[count_name(self._tallies.resumed, why)] += 1
        if trajectory.finish not in ENDED:
            full = trajectory.received >= self._max_new_tokens
            trajectory.finish = Finish.LENGTH if full else Finish.NONE
        self._next_segment(now, trajectory)
        self._out.send(trajectory.group.actor, self._order(trajectory))

    def _next_segment(self, now: float, trajectory: Trajectory) -> None:
        """Whatever was said of the one before is void."""
        del self._assembly.by_rid[trajectory.rid]
        trajectory.segment += 1
        trajectory.rid = make_rid(self._run, trajectory.group.id, trajectory.member, trajectory.segment)
        self._assembly.by_rid[trajectory.rid] = trajectory
        trajectory.base, trajectory.lost, trajectory.engine, trajectory.seen = trajectory.received, 0, "", now
        trajectory.parking = trajectory.resting = trajectory.closed = False
        trajectory.interrupted, trajectory.appending, trajectory.losses = "", b"", self._losses

    def _order(self, trajectory: Trajectory) -> m.Resume:
        group = trajectory.group
        return m.Resume(
            group=group.id,
            member=trajectory.member,
            segment=trajectory.segment,
            members=len(group.members),
            problem=group.problem,
            episode=trajectory.episode,
            forked=any(t.episode == trajectory.episode != t.member for t in group.members),
            finish=trajectory.finish,
            prompt_ids=trajectory.context,
            token_ids=np.frombuffer(bytes(trajectory.ids), np.int32),
            sampled=trajectory.sampled_flags(),
            logprobs=np.frombuffer(bytes(trajectory.logprobs), np.float32),
        )

    def _growing(self) -> list[Trajectory]:
        """Trajectories in flight that are not complete."""
        return [
            trajectory
            for group in self._groups.values()
            if group.state is State.IN_FLIGHT
            for trajectory in group.members
            if trajectory.state is State.IN_FLIGHT and not trajectory.complete
        ]


def cancel_order(trajectory: Trajectory, reason: str) -> m.Cancel:
    return m.Cancel(group=trajectory.group.id, member=trajectory.member, reason=reason)


def _appended(trajectory: Trajectory) -> m.Appended:
    return m.Appended(group=trajectory.group.id, member=trajectory.member, segment=trajectory.segment)


def _park_order(trajectory: Trajectory) -> m.Park:
    return m.Park(group=trajectory.group.id, member=trajectory.member, segment=trajectory.segment)
