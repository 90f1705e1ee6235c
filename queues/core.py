"""The trajectory queue as one deterministic state machine: (time, sender, event) in, actions out.

No clock, socket, file or chance: the same events give the same actions, live, simulated or replayed.

Every event either changes the state or is refused and counted.  After each, whatever has become possible is done at
once (lease, resume, admit, drain), so that a state always awaits an input that `awaits` can name.
"""

from typing import Any, ClassVar

from queues import problems
from queues.admission import share
from queues.events import Gone, Recovered, Tick
from queues.ledger import Ledger, State
from queues.outgoing import JOURNAL, REPLY, Action, Outgoing
from queues.registry import Peer, Registry
from queues.steps import Steps
from queues.store import Settings, Store
from queues.summary import progress, step_record, summary
from queues.tallies import Tallies, stats_problem
from queues.versions import Histories
from queues.waits import awaits, why
from stream_rl import messages as m
from stream_rl.metrics import flatten
from stream_rl.types import Version

__all__ = ["JOURNAL", "REPLY", "Action", "Gone", "QueueCore", "Recovered", "Settings", "Tick"]


class QueueCore:
    HANDLERS: ClassVar[dict[type[Any], tuple[str, str]]] = {
        m.Chunks: ("engine", "_chunks"),
        m.EngineStats: ("engine", "_engine_stats"),
        m.OpenGroup: ("actor", "_open_group"),
        m.OpenBranch: ("actor", "_of_trajectory"),
        m.AppendTokens: ("actor", "_of_trajectory"),
        m.CloseTrajectory: ("actor", "_of_trajectory"),
        m.Interrupted: ("actor", "_of_trajectory"),
        m.ActorStats: ("actor", "_actor_stats"),
        m.Evaluated: ("actor", "_evaluated"),
        m.LeaseRequest: ("learner", "_lease_request"),
        m.Applied: ("learner", "_applied"),
        m.Committed: ("learner", "_committed"),
        m.LearnerDone: ("learner", "_learner_done"),
        m.VersionReport: ("publisher", "_weights_report"),
        m.EngineVerified: ("publisher", "_engine_verified"),
        m.StockReport: ("publisher", "_weights_report"),
        m.Alive: ("", "_alive"),
        m.StatusRequest: ("", "_status_request"),
        m.DrainEngine: ("", "_drain_engine"),
        m.Shutdown: ("", "_shutdown"),
    }
    """(role that says it, or "" for anyone; method)"""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.started: float | None = None
        self.histories = Histories()
        self.ledger = Ledger()
        self.tallies = Tallies()
        self.registry = Registry(settings.run)
        self._out = Outgoing(self.tallies)
        self.store = Store(settings, self.histories, self.ledger, self.tallies, self._out)
        self.steps = Steps(settings, self.histories, self.ledger, self.tallies, self.store, self._out)
        self.next_group = 0
        self.admitted: dict[str, list[int]] = {}
        """Groups that each actor may open and has not."""
        self.drained = False
        self.closed = False
        """Shut down: nothing is admitted, leased or evaluated any more."""

    def handle(self, now: float, sender: str, event: Any) -> list[Action]:
        """One event by the peer registered as `sender` ("" if it is not registered); what to send to whom, in order.

        `now` never goes back; only differences of it are used.  Afterwards `durable` says whether the event has to be
        in the journal before any of its actions may leave.
        """
        if self.started is None:
            self.started = now
        self.now = now
        self._out.begin()
        match event:
            case m.Hello():
                self._hello(event)
            case Tick():
                self._tick()
            case Recovered():
                self.registry.forgive(now)
                self.registry.forget_observers()
            case Gone():
                self._out.durable = False
                self.registry.forget(event.name)
            case _:
                self._dispatch(sender, event)
        return self._out.actions

    @property
    def durable(self) -> bool:
        """The last event changed something that must survive this process."""
        return self._out.durable

    def check(self) -> None:
        """Raises AssertionError, naming both sides, if a conservation law is broken."""
        violations = self.ledger.violations()
        assert not violations, "; ".join(violations)

    def recount(self) -> None:
        """`check`, and every count against a slow count of what is really there."""
        self.check()
        self.store.recount(self.steps.groups_again)

    @property
    def finished(self) -> bool:
        """The learner is done, the last evaluation is in, and every engine's weights were hashed in full at the end."""
        return self.tallies.learner_done is not None and "last" in self.tallies.evaluated and not self.unverified()

    def unverified(self) -> list[str]:
        """Engines whose live weights were not hashed in full at the final version yet."""
        done, verified = self.tallies.learner_done, self.tallies.verified
        engines = [peer.name for peer in self.registry.living("engine")]
        return [name for name in engines if done and (name not in verified or verified[name].version != done.final)]

    def behind(self, final: Version) -> list[Peer]:
        """Engines that do not hold `final` yet, as far as they said."""
        return [p for p in self.registry.living("engine") if p.version is None or p.version < final]

    def summary(self) -> dict[str, object]:
        return summary(self)

    def status(self, why: bool = False) -> m.Status:
        """Summary and progress by dotted name; with `why`, what everything waits for under `queue.why.N`."""
        fields, texts = flatten(summary(self) | progress(self))
        if why:
            texts |= {f"queue.why.{i}": line for i, line in enumerate(self.why())}
        return m.Status(fields={k: float(v) for k, v in fields.items()}, texts=texts, finished=self.finished)

    def awaits(self, most: int = 1 << 30) -> list[str]:
        """The inputs that can take this state further, in words.  Never empty: liveness."""
        return awaits(self, most)

    def why(self, most: int = 100) -> list[str]:
        """What everything is waiting for, the longest wait first."""
        return why(self, most)

    # -- everyone ----------------------------------------------------------------------------------------------

    def _dispatch(self, sender: str, event: Any) -> None:
        peer, name = self.registry.peers.get(sender), type(event).__name__
        if peer is None and sender and isinstance(event, (m.Shutdown, m.DrainEngine)):
            peer = self.registry.observer(sender, self.now)  # replayed; Hellos of observers are not journaled
        if peer is None:
            self._out.refuse(REPLY, "not_registered", f"say Hello before {name}")
            return
        if peer.lost:
            detail = f"{sender} at incarnation {peer.incarnation} was silent for too long and is taken for lost: exit"
            self._out.refuse(sender, "fenced", detail)
            return
        role, method = self.HANDLERS.get(type(event), ("", ""))
        if not method:
            self._out.refuse(sender, "unexpected_message", f"the queue takes no {name}")
        elif role and role != peer.role:
            detail = f"{name} is for a {role} to say, {sender} is a {peer.role}"
            self._out.refuse(sender, "wrong_role", detail)
        else:
            getattr(self, method)(peer, event)
            if self._out.durable:
                peer.seen = self.now

    def _in_sequence(self, peer: Peer, sequence: int) -> bool:
        """True if this is the peer's next message; otherwise it hears where the queue is."""
        if sequence == peer.next_sequence:
            peer.next_sequence += 1
            return True
        ahead = sequence > peer.next_sequence
        self.tallies.refused["sequence_gap" if ahead else "message_again"] += 1
        self._out.durable = False
        self._out.send(peer.name, m.Ack(next_sequence=peer.next_sequence, resend=ahead))
        return False

    def _taken(self, peer: Peer) -> None:
        """A sequenced message was taken, whatever was thought of its content."""
        self._out.durable = True
        self._out.send(peer.name, m.Ack(next_sequence=peer.next_sequence))

    def _hello(self, hello: m.Hello) -> None:
        if problem := self.registry.problem(hello):
            self._out.refuse(REPLY, *problem)
            return
        peer, new = self.registry.welcome(hello, self.now)
        welcome = m.Welcome(
            run=self.settings.run,
            next_sequence=peer.next_sequence,
            version=self.histories.last,
            admitted=list(self.admitted.setdefault(peer.name, [])) if peer.role == "actor" else [],
            evaluated=list(self.tallies.evaluated),
        )
        self._out.send(peer.name, welcome)
        if peer.role == "observer":
            self._out.durable = False
            return
        if peer.role == "engine" and new:
            self.store.resuming.engine_lost(self.now, peer.name)
        if peer.role == "actor":
            self._welcome_actor(peer, new)
        self._advance()

    def _welcome_actor(self, peer: Peer, new: bool) -> None:
        self._out.send(peer.name, self.registry.usable)
        if new:
            self._take_over(peer.name, peer.name)
            for other in self.registry.of_role("actor"):
                if other.lost:
                    self._take_over(other.name, peer.name)
        else:
            self.store.resuming.remind(peer.name)
        if self.drained and self.tallies.learner_done:
            self._out.send(peer.name, m.Drain(final=self.tallies.learner_done.final))

    def _take_over(self, lost: str, heir: str) -> None:
        """`heir` goes on with what `lost` was growing, and may open what it had not opened."""
        groups = [g for g in self.store.groups.values() if g.actor == lost and g.state is State.IN_FLIGHT]
        self.store.resuming.actor_lost(self.now, groups, heir)
        if lost != heir and self.admitted.get(lost):
            self._out.send(heir, m.Admit(groups=list(self.admitted[lost])))
            self.admitted[heir] += self.admitted[lost]
            self.admitted[lost] = []

    def _tick(self) -> None:
        for peer in self.registry.silent(self.now, self.settings.silence_s):
            peer.lost = True
            if peer.role == "engine":
                self.store.resuming.engine_lost(self.now, peer.name)
            heir = next(self.registry.living("actor"), None)
            if peer.role == "actor" and heir is not None:
                self._take_over(peer.name, heir.name)
        if deadline := self.settings.queue.group_deadline_s:
            self.store.overdue(self.now, deadline)
        self._advance()

    def _alive(self, peer: Peer, event: m.Alive) -> None:
        self._out.durable = peer.role != "observer"

    def _status_request(self, peer: Peer, event: m.StatusRequest) -> None:
        self._out.durable = False
        self._out.send(peer.name, self.status(event.why))

    def _shutdown(self, peer: Peer, event: m.Shutdown) -> None:
        self.closed = True
        self.steps.waiting = None
        self.admitted = {name: [] for name in self.admitted}
        self._end(State.IN_FLIGHT)
        self._end(State.READY)
        self.steps.again.clear()
        self._out.send(peer.name, self.status())

    def _end(self, state: State) -> None:
        """Drop the groups in `state` because the run ends."""
        for group in [group for group in self.store.groups.values() if group.state is state]:
            self.store.drop_group(group, "run_end", cancel=True)

    # -- engines -----------------------------------------------------------------------------------------------

    def _chunks(self, peer: Peer, event: m.Chunks) -> None:
        if event.run != self.settings.run:
            detail = f"this queue serves run {self.settings.run!r}, got {event.run!r}"
            self._out.refuse(peer.name, "other_run", detail)
        elif self._is_current(peer, event.engine, event.incarnation) and self._in_sequence(peer, event.sequence):
            settled, resend = self.store.chunks(self.now, event)
            self._out.send(peer.name, m.Ack(next_sequence=peer.next_sequence, resend=resend))
            if peer.drained:  # requests that had brought nothing when it was
                self.store.resuming.park(peer.name)
            if settled:
                self._advance()

    def _is_current(self, peer: Peer, engine: str, incarnation: int) -> bool:
        if engine == peer.name and incarnation == peer.incarnation:
            return True
        reason = "fenced" if engine == peer.name and incarnation < peer.incarnation else "not_registered"
        detail = f"expected {peer.name} at incarnation {peer.incarnation}, got {engine} at {incarnation}"
        self._out.refuse(peer.name, reason, detail)
        return False

    def _engine_stats(self, peer: Peer, event: m.EngineStats) -> None:
        if self._is_current(peer, event.engine, event.incarnation):
            if problem := stats_problem(event):
                self._out.refuse(peer.name, "bad_stats", problem)
                return
            peer.version = event.version
            self.tallies.engine_stats(event)
            self._advance()

    def _drain_engine(self, peer: Peer, event: m.DrainEngine) -> None:
        engine = self.registry.peers.get(event.engine)
        if engine is None or engine.role != "engine":
            names = [each.name for each in self.registry.living("engine")]
            self._out.refuse(peer.name, "unknown_engine", f"no engine {event.engine!r}; there are {names}")
            return
        engine.drained = True
        self.store.resuming.park(engine.name)
        self._out.send(peer.name, m.Done(what="DrainEngine"))
        self._advance()

    # -- actors ------------------------------------------------------------------------------------------------

    def _open_group(self, peer: Peer, event: m.OpenGroup) -> None:
        if not self._in_sequence(peer, event.sequence):
            return
        if event.group not in self.admitted[peer.name]:
            self._out.refuse(peer.name, "not_admitted", f"group {event.group}: wait for Admit")
        elif problem := problems.of_group(event):
            self._out.refuse(peer.name, *problem)
        else:
            self.admitted[peer.name].remove(event.group)
            self.store.open(self.now, event, peer.name)
        self._taken(peer)

    def _of_trajectory(self, peer: Peer, event: problems.OfTrajectory) -> None:
        if not self._in_sequence(peer, event.sequence):
            return
        if problem := problems.of_trajectory(event, peer.name, self.store.groups):
            self._out.refuse(peer.name, *problem)
        else:
            self.store.hear(self.now, event)
        self._taken(peer)
        self._advance()

    def _actor_stats(self, peer: Peer, event: m.ActorStats) -> None:
        self.tallies.actor_counters[peer.name, peer.incarnation] = event.counters

    def _evaluated(self, peer: Peer, event: m.Evaluated) -> None:
        if not self._in_sequence(peer, event.sequence):
            return
        if event.label not in ("first", "last"):
            self._out.refuse(peer.name, "bad_label", f"an evaluation is first or last, got {event.label!r}")
        elif not self.closed:
            self.tallies.evaluation(event)
        self._taken(peer)

    # -- learner and publisher ---------------------------------------------------------------------------------

    def _lease_request(self, peer: Peer, event: m.LeaseRequest) -> None:
        if self.closed:
            self._out.refuse(peer.name, "run_ended", f"no lease for step {event.step}: the run has ended")
            return
        self.steps.request(peer, event)
        self._advance()

    def _applied(self, peer: Peer, event: m.Applied) -> None:
        window = self.tallies.windows[-1]
        if (taken := self.steps.apply(self.now, peer, event)) is not None:
            lease, settled = taken
            self.store.admission.applied(self.now, self.ledger.received, settled.age_mean)
            record = step_record(self, event, lease, settled, window)
            self._out.send_all((o.name for o in self.registry.of_role("observer")), record)
            self._advance()

    def _committed(self, peer: Peer, event: m.Committed) -> None:
        self.steps.commit(peer, event)
        self._advance()

    def _learner_done(self, peer: Peer, event: m.LearnerDone) -> None:
        self.steps.done(peer, event)
        self._advance()

    def _weights_report(self, peer: Peer, event: m.VersionReport | m.StockReport) -> None:
        self.tallies.weights_report(event)
        if isinstance(event, m.VersionReport) and (engine := self.registry.peers.get(event.engine)) is not None:
            engine.version = max(engine.version or event.version, event.version)
        self._out.send_all((o.name for o in self.registry.of_role("observer")), event)
        self._advance()

    def _engine_verified(self, peer: Peer, event: m.EngineVerified) -> None:
        self.tallies.engine_verified(event)

    # -- what has become possible ------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self.closed:
            return
        # The last evaluation is of the final version and no other.
        max_age = 0 if self.tallies.learner_done else max(1, self.settings.queue.max_token_age // 2)
        if self.registry.refresh_usable(self.histories, max_age):
            for actor in self.registry.living("actor"):
                self._out.send(actor.name, self.registry.usable)
        if self.tallies.learner_done is None:
            growing = self.store.group_counts[State.IN_FLIGHT] + sum(map(len, self.admitted.values()))
            if not (self.store.admission.by_batch and growing):
                self.steps.try_lease()
            self._grow()
            self._admit()
        elif not self.drained:
            self._drain(self.tallies.learner_done.final)

    def _grow(self) -> None:
        """A round ends when its lease is made and the next begins when that was applied."""
        rounds = self.settings.queue.mode == "rounds"
        self.store.resuming.grow(self.now, not rounds or self.steps.lease is None)

    def _admit(self) -> None:
        loads = {actor.name: len(self.admitted[actor.name]) for actor in self.registry.living("actor")}
        if not loads or not self.store.resuming.may_grow:
            return
        admitted = sum(loads.values())
        grant = self._batch(admitted) if self.store.admission.by_batch else self._grant(admitted)
        if grant < 1:
            return
        if len(loads) > 1:
            for group in self.store.groups.values():
                if group.state is State.IN_FLIGHT and group.actor in loads:
                    loads[group.actor] += 1
        for actor, groups in share(range(self.next_group, self.next_group + grant), loads).items():
            self.admitted[actor] += groups
            self._out.send(actor, m.Admit(groups=groups))
        self.next_group += grant

    def _grant(self, admitted: int) -> int:
        """Groups to admit now, beside those that are admitted and not opened."""
        under_way = self.store.group_counts[State.IN_FLIGHT] + admitted
        starving = self.steps.waiting is not None and not under_way
        grown = self.store.outstanding + admitted - under_way
        return self.store.admission.grant(under_way, grown, starving)

    def _batch(self, admitted: int) -> int:
        """The same where a step has a batch of its own: none of it, or all."""
        counts, synchronous = self.store.group_counts, self.settings.queue.mode == "synchronous"
        before = counts[State.IN_FLIGHT] + counts[State.READY] + admitted
        if synchronous:
            before += counts[State.LEASED] + len(self.behind(self.histories.last))
        return 0 if before else self.store.admission.limit

    def _drain(self, final: Version) -> None:
        """The engines live on the learner's last version: have it evaluated.  What is in flight ends here, since the
        actors are told to cancel it."""
        actors = list(self.registry.living("actor"))
        if not actors or self.behind(final):
            return
        self.drained = True
        self.admitted = {name: [] for name in self.admitted}
        self._end(State.IN_FLIGHT)
        for actor in actors:
            self._out.send(actor.name, m.Drain(final=final))
