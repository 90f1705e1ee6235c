"""The trajectory queue as one deterministic state machine: (time, sender, event) in, actions out.

No clock, socket, file or chance: the same events give the same actions, live, simulated or replayed.

Every event either changes the state or is refused and counted.  After each, whatever has become possible is done at
once (lease, admit, drain), so that a state always awaits an input that `awaits` can name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from queues.leasing import build_lease
from queues.ledger import Ledger, State
from queues.registry import Peer, Registry
from queues.store import Settings, Store
from queues.summary import progress, step_record, summary
from queues.tallies import Tallies, settle, stats_problem
from queues.trajectories import Group
from queues.versions import MAX_HISTORY, Histories
from queues.waits import awaits
from stream_rl import messages as m
from stream_rl.metrics import flatten
from stream_rl.types import Version

MAX_DETAIL = 400
"""Characters: details quote what peers sent."""
REPLY = ""
"""Recipient: whoever sent the event; for those who have no name here."""

Action = tuple[str, Any]
"""(recipient's name, message)"""


@dataclass(frozen=True, slots=True)
class Tick:
    """The shell's timer, about once a second."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The shell could not reach the peer `name`; an observer is forgotten, others are awaited."""

    name: str


@dataclass(frozen=True, slots=True)
class OutstandingLease:
    message: m.Lease
    groups: list[Group]


class QueueCore:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.started: float | None = None
        self.histories = Histories()
        self.ledger = Ledger()
        self.tallies = Tallies()
        self.registry = Registry(settings.run)
        self.store = Store(settings, self.histories, self.ledger, self.tallies)
        self.credits: dict[str, int] = {}
        """Groups that each actor may still open."""
        self.waiting: str | None = None
        """The learner that waits for the lease of the step `histories.last`."""
        self.lease: OutstandingLease | None = None
        self.drained = False
        self.closed = False
        """Shut down: nothing is admitted, leased or evaluated any more."""
        self._out: list[Action] = []
        self._handlers: dict[type[Any], tuple[str, Callable[[Peer, Any], None]]] = {
            m.Chunks: ("engine", self._chunks),
            m.EngineStats: ("engine", self._engine_stats),
            m.OpenGroup: ("actor", self._open_group),
            m.CloseTrajectory: ("actor", self._close_trajectory),
            m.ActorStats: ("actor", self._actor_stats),
            m.Evaluated: ("actor", self._evaluated),
            m.LeaseRequest: ("learner", self._lease_request),
            m.Applied: ("learner", self._applied),
            m.Committed: ("learner", self._committed),
            m.LearnerDone: ("learner", self._learner_done),
            m.VersionReport: ("publisher", lambda _, report: self.tallies.version_report(report)),
            m.EngineVerified: ("publisher", lambda _, verified: self.tallies.engine_verified(verified)),
            m.StatusRequest: ("", lambda peer, _: self._send(peer.name, self.status())),
            m.Shutdown: ("", self._shutdown),
        }

    def handle(self, now: float, sender: str, event: Any) -> list[Action]:
        """One event by the peer registered as `sender` ("" if it is not registered); what to send to whom, in order.

        `now` never goes back; only differences of it are used.
        """
        if self.started is None:
            self.started = now
        self.now = now
        self._out = []
        if isinstance(event, m.Hello):
            self._hello(event)
        elif isinstance(event, Tick):
            self._observe(self.status())
        elif isinstance(event, Gone):
            self.registry.forget(event.name)
        else:
            self._dispatch(sender, event)
        return self._out

    def check(self) -> None:
        """Raises AssertionError, naming both sides, if a conservation law is broken."""
        violations = self.ledger.violations()
        assert not violations, "; ".join(violations)

    def recount(self) -> None:
        """`check`, and every count against a slow count of what is really there."""
        self.check()
        self.store.recount()

    @property
    def finished(self) -> bool:
        """The learner is done, the last evaluation is in, and every engine's weights were hashed in full at the end."""
        return self.tallies.learner_done is not None and "last" in self.tallies.evaluated and not self.unverified()

    def unverified(self) -> list[str]:
        """Engines whose live weights were not hashed in full at the final version yet."""
        done, verified = self.tallies.learner_done, self.tallies.verified
        engines = [peer.name for peer in self.registry.of_role("engine")]
        return [name for name in engines if done and (name not in verified or verified[name].version != done.final)]

    def summary(self) -> dict[str, object]:
        return summary(self)

    def status(self) -> m.Status:
        """Summary and progress by dotted name."""
        fields, texts = flatten(summary(self) | progress(self))
        return m.Status(fields={k: float(v) for k, v in fields.items()}, texts=texts, finished=self.finished)

    def awaits(self, most: int = 1 << 30) -> list[str]:
        """The inputs that can take this state further, in words.  Never empty: liveness."""
        return awaits(self, most)

    def behind(self, final: Version) -> list[Peer]:
        """Engines that do not hold `final` yet, as far as they said."""
        return [p for p in self.registry.of_role("engine") if p.version is None or p.version < final]

    # -- everyone ----------------------------------------------------------------------------------------------

    def _dispatch(self, sender: str, event: Any) -> None:
        peer = self.registry.peers.get(sender)
        if peer is None:
            self._refuse(REPLY, "not_registered", f"say Hello before {type(event).__name__}")
            return
        role, handler = self._handlers.get(type(event), ("", None))
        if handler is None:
            self._refuse(sender, "unexpected_message", f"the queue takes no {type(event).__name__}")
        elif role and role != peer.role:
            self._refuse(
                sender, "wrong_role", f"{type(event).__name__} is for a {role} to say, {sender} is a {peer.role}"
            )
        else:
            peer.seen = self.now
            handler(peer, event)

    def _hello(self, hello: m.Hello) -> None:
        if problem := self.registry.problem(hello):
            self._refuse(REPLY, *problem)
            return
        peer, new = self.registry.welcome(hello, self.now)
        self._send(peer.name, m.Welcome(run=self.settings.run, next_sequence=peer.next_sequence))
        if peer.role == "actor":
            if new:
                self._lose_actor(peer.name)
            if self.drained and self.tallies.learner_done:
                self._send(peer.name, m.Drain(final=self.tallies.learner_done.final))
        self._advance()

    def _lose_actor(self, name: str) -> None:
        """A new incarnation knows nothing of the groups that the old one was growing."""
        self.credits[name] = 0
        for group in [g for g in self.store.groups.values() if g.actor == name and g.state is State.IN_FLIGHT]:
            self.store.drop_group(group, "actor_lost", cancel=True)

    def _shutdown(self, peer: Peer, event: m.Shutdown) -> None:
        self.closed = True
        self.waiting = None
        self.credits = dict.fromkeys(self.credits, 0)
        for trajectory in self._end(State.IN_FLIGHT) + self._end(State.READY):
            cancel = m.Cancel(group=trajectory.group.id, member=trajectory.member, reason="run_end")
            self._send(trajectory.group.actor, cancel)
        self._send(peer.name, self.status())

    def _end(self, state: State) -> list[Any]:
        """Drop the groups in `state` because the run ends; the trajectories whose generation that cancels."""
        groups = [group for group in self.store.groups.values() if group.state is state]
        return [t for group in groups for t in self.store.drop_group(group, "run_end", cancel=True)]

    # -- engines -----------------------------------------------------------------------------------------------

    def _chunks(self, peer: Peer, event: m.Chunks) -> None:
        if event.run != self.settings.run:
            self._refuse(peer.name, "other_run", f"this queue serves run {self.settings.run!r}, got {event.run!r}")
        elif self._is_current(peer, event.engine, event.incarnation):
            if event.sequence == peer.next_sequence:
                peer.next_sequence += 1
                settled, resend = self.store.chunks(event)
                self._send(peer.name, m.ChunksAck(next_sequence=peer.next_sequence, resend=resend))
                if settled:
                    self._advance()
                return
            ahead = event.sequence > peer.next_sequence
            self._count_refusal("sequence_gap" if ahead else "message_again")
            self._send(peer.name, m.ChunksAck(next_sequence=peer.next_sequence, resend=ahead))

    def _is_current(self, peer: Peer, engine: str, incarnation: int) -> bool:
        if engine == peer.name and incarnation == peer.incarnation:
            return True
        reason = "fenced" if engine == peer.name and incarnation < peer.incarnation else "not_registered"
        self._refuse(
            peer.name, reason, f"expected {peer.name} at incarnation {peer.incarnation}, got {engine} at {incarnation}"
        )
        return False

    def _engine_stats(self, peer: Peer, event: m.EngineStats) -> None:
        if self._is_current(peer, event.engine, event.incarnation):
            if problem := stats_problem(event):
                self._refuse(peer.name, "bad_stats", problem)
                return
            peer.version = event.version
            self.tallies.engine_stats(event)
            self._advance()

    # -- actors ------------------------------------------------------------------------------------------------

    def _open_group(self, peer: Peer, event: m.OpenGroup) -> None:
        if self.credits.get(peer.name, 0) < 1:
            self._refuse(peer.name, "no_credit", f"group {event.group}: wait for Admit")
        elif problem := self.store.opening_problem(event):
            self._refuse(peer.name, *problem)
        else:
            self.credits[peer.name] -= 1
            self.store.open(event, peer.name)

    def _close_trajectory(self, peer: Peer, event: m.CloseTrajectory) -> None:
        if problem := self.store.closing_problem(event, peer.name):
            self._refuse(peer.name, *problem)
            return
        self.store.close(event)
        self._advance()

    def _actor_stats(self, peer: Peer, event: m.ActorStats) -> None:
        self.tallies.actor_counters[peer.name, peer.incarnation] = event.counters

    def _evaluated(self, peer: Peer, event: m.Evaluated) -> None:
        if event.label not in ("first", "last"):
            self._refuse(peer.name, "bad_label", f"an evaluation is first or last, got {event.label!r}")
            return
        self.tallies.evaluation(event)
        self._send(peer.name, m.Done(what="Evaluated"))

    # -- learner -----------------------------------------------------------------------------------------------

    def _lease_request(self, peer: Peer, event: m.LeaseRequest) -> None:
        step, last = event.step, self.histories.last
        if self.closed or self.tallies.learner_done is not None:
            self._refuse(peer.name, "run_ended", f"no lease for step {step}: the run has ended")
            return
        if last.history < step.history <= MAX_HISTORY and 0 <= step.step <= last.step:
            self._open_history(step)
        elif step != last:
            self._refuse(peer.name, "wrong_step", f"the next step is {last}, a lease was asked for {step}")
            return
        if self.lease is not None:
            self._send(peer.name, self.lease.message)
            return
        self.waiting = peer.name
        self._advance()

    def _open_history(self, step: Version) -> None:
        self.histories.open(step.history, step.step)
        if self.lease is not None:
            self.store.put_back(self.lease.groups)
            self.lease = None
        self.store.fork(step.step)

    def _applied(self, peer: Peer, event: m.Applied) -> None:
        step = event.step
        if self.lease is None or step != self.lease.message.step:
            if step.history == self.histories.current and step.step < self.histories.last.step:
                self._send(peer.name, m.Done(what="Applied"))
                return
            self._refuse(peer.name, "not_leased", f"step {step} is not leased; the next is {self.histories.last}")
            return
        if event.outcome not in ("trained", "skipped"):
            self._refuse(peer.name, "bad_outcome", f"an outcome is trained or skipped, got {event.outcome!r}")
            return
        lease, self.lease = self.lease, None
        settled = settle(lease.message, event.outcome)
        window = self.tallies.windows[-1]
        self.tallies.applied(event, settled)
        self.store.apply(step, lease.groups, settled)
        self.histories.publish(Version(step.history, step.step + 1))
        self._send(peer.name, m.Done(what="Applied"))
        self._observe(step_record(self, event, lease.message, settled, window))
        self._advance()

    def _committed(self, peer: Peer, event: m.Committed) -> None:
        step = event.step
        if step.history != self.histories.current or step.step > self.histories.last.step:
            self._refuse(
                peer.name, "unknown_version", f"cannot commit {step}: the last version is {self.histories.last}"
            )
            return
        self.store.commit(step)
        self._send(peer.name, m.Done(what="Committed"))

    def _learner_done(self, peer: Peer, event: m.LearnerDone) -> None:
        if event.final != self.histories.last:
            self._refuse(peer.name, "unknown_version", f"the last version is {self.histories.last}, got {event.final}")
            return
        self.tallies.learner_done = event
        self.waiting = None
        self._send(peer.name, m.Done(what="LearnerDone"))
        self._advance()

    # -- what has become possible ------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self.closed:
            return
        if self.tallies.learner_done is None:
            self._try_lease()
            self._admit()
        elif not self.drained:
            self._drain(self.tallies.learner_done.final)

    def _try_lease(self) -> None:
        if self.waiting is None or self.lease is not None:
            return
        queue, step = self.settings.queue, self.histories.last
        self.store.drop_hopeless()
        if self.store.ready.trainable_tokens < queue.min_tokens:
            return
        groups = self.store.lease()
        message = build_lease(step, groups, self.histories, queue.max_token_age)
        self.tallies.short_leases += int(message.trainable.sum()) < queue.min_tokens
        self.lease = OutstandingLease(message, groups)
        self._send(self.waiting, message)
        self.waiting = None

    def _admit(self) -> None:
        loads = {actor.name: self.credits[actor.name] for actor in self.registry.of_role("actor")}
        if not loads:
            return
        credits = sum(loads.values())
        under_way = self.store.group_counts[State.IN_FLIGHT] + credits
        starving = self.waiting is not None and not under_way
        grant = self.store.admission.grant(self.store.outstanding + credits, starving)
        if grant < 1:
            return
        if len(loads) > 1:
            for group in self.store.groups.values():
                if group.state is State.IN_FLIGHT:
                    loads[group.actor] += 1
        granted = dict.fromkeys(loads, 0)
        for _ in range(grant):
            actor = min(loads, key=lambda name: (loads[name], name))
            loads[actor] += 1
            granted[actor] += 1
        for actor, groups in granted.items():
            if groups:
                self.credits[actor] += groups
                self._send(actor, m.Admit(groups=groups))

    def _drain(self, final: Version) -> None:
        """The engines live on the learner's last version: have it evaluated.  What is in flight ends here, since the
        actors are told to cancel it."""
        actors = list(self.registry.of_role("actor"))
        if not actors or self.behind(final):
            return
        self.drained = True
        self.credits = dict.fromkeys(self.credits, 0)
        self._end(State.IN_FLIGHT)
        for actor in actors:
            self._send(actor.name, m.Drain(final=final))

    # -- saying it ---------------------------------------------------------------------------------------------

    def _send(self, recipient: str, message: Any) -> None:
        self._out.append((recipient, message))

    def _observe(self, message: Any) -> None:
        for peer in self.registry.of_role("observer"):
            self._send(peer.name, message)

    def _count_refusal(self, reason: str) -> None:
        self.tallies.refused[reason] += 1

    def _refuse(self, recipient: str, reason: str, detail: str) -> None:
        self._count_refusal(reason)
        detail = detail[:MAX_DETAIL]
        self.tallies.last_refusal = f"{reason}: {detail}"
        self._send(recipient, m.Refused(reason=reason, detail=detail))
