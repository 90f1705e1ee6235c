"""Random interleavings of everything that engines, actors and learners do, against a model that knows the truth.

The model's engine makes chunk messages whose rows overlap what it sent before; the wire loses, repeats and reorders
them, and brings bad rows, other engines' rows and old incarnations beside them.  After every event: both conservation
laws by recount, a named input that is awaited, and no stream that differs from the truth.  Every lease is compared
with the truth token by token.  At the end a fair world must reach the next lease.
"""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from queue_builders import Row, Run, make_chunks, make_core, of_type, rid

from queues.ledger import State
from stream_rl import messages as m
from stream_rl.types import Version

MIN_TOKENS, MAX_TOKENS, MAX_NEW = 10, 40, 12
PROMPT = (1, 2)


@dataclass
class Truth:
    """What an engine really sampled for one trajectory."""

    group: int
    member: int
    tokens: list[int] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    flushed: int = 0
    finish: str = ""
    finish_sent: bool = False
    closed: str = ""
    reward: float = 0.0
    tampered: bool = False
    """A bad row of its own engine was sent for it."""
    lied: bool = False
    """Its actor closed it with a wrong length."""

    def row(self, start: int, end: int) -> Row:
        logprobs = [-0.01 * token for token in self.tokens[start:end]]
        last = self.finish if end == len(self.tokens) else ""
        return Row(
            rid(self.group, self.member), start, self.tokens[start:end], self.versions[start:end], last, logprobs
        )


class QueueMachine(RuleBasedStateMachine):
    @initialize(
        age=st.integers(-1, 3),
        over_provision=st.sampled_from([0.5, 1.0, 2.0]),
        groups=st.integers(1, 4),
        slow=st.integers(0, 4),
    )
    def begin(self, age: int, over_provision: float, groups: int, slow: int) -> None:
        self.slow = slow
        self.max_age = age
        self.run = Run(
            make_core(
                max_new_tokens=MAX_NEW,
                min_tokens=MIN_TOKENS,
                max_tokens=MAX_TOKENS,
                max_token_age=age,
                over_provision=over_provision,
                first_groups=groups,
                keep_retired=6,
            )
        )
        self.core = self.run.core
        self.truths: dict[tuple[int, int], Truth] = {}
        self.sent: list[m.Chunks] = []
        self.acked = 0
        self.forks: dict[int, int] = {}
        self.leases: dict[Version, m.Lease] = {}
        self.settled: dict[tuple[int, int], Version] = {}
        self.token = 0
        self.next_group = 0

    # -- the world ---------------------------------------------------------------------------------------------

    def say(self, sender: str, event: object) -> list[tuple[str, object]]:
        actions = self.run.say(sender, event)
        for lease in of_type(actions, m.Lease):
            self.check_lease(lease)
        for ack in of_type(actions, m.ChunksAck):
            assert ack.next_sequence >= self.acked, "an acknowledgement went back"
            self.acked = ack.next_sequence
        self.check_streams()
        self.check_waiting()
        return actions

    def growing(self) -> list[Truth]:
        return [t for t in self.truths.values() if not t.finish and t.closed != "failed"]

    @precondition(lambda self: self.core.credits["actor-0"])
    @rule(members=st.integers(1, 3))
    def open(self, members: int) -> None:
        group, self.next_group = self.next_group, self.next_group + 1
        prompt = np.array(PROMPT, np.int32)
        self.say("actor-0", m.OpenGroup(group=group, task="t", members=members, prompt_ids=prompt))
        self.truths.update({(group, member): Truth(group, member) for member in range(members)})

    @precondition(lambda self: self.growing())
    @rule(data=st.data(), count=st.integers(0, 6), finish=st.sampled_from(["", "", "stop", "length", "abort"]))
    def sample(self, data: st.DataObject, count: int, finish: str) -> None:
        truth = data.draw(st.sampled_from(self.growing()))
        self.grow(truth, count, finish)

    def grow(self, truth: Truth, count: int, finish: str) -> None:
        for _ in range(min(count, MAX_NEW - len(truth.tokens))):
            self.token += 1
            truth.tokens.append(self.token)
            truth.versions.append(tuple(self.core.histories.last))
        truth.finish = finish

    @precondition(lambda self: self.truths)
    @rule(data=st.data(), overlap=st.integers(0, 3), split=st.booleans())
    def flush(self, data: st.DataObject, overlap: int, split: bool) -> None:
        """The engine puts what is new, and a little of what is not, into one message."""
        fresh = [t for t in self.truths.values() if self.unsent(t)]
        chosen = data.draw(st.lists(st.sampled_from(fresh), unique_by=id)) if fresh else []
        rows = []
        for truth in chosen:
            middle = (truth.flushed + len(truth.tokens)) // 2
            start = max(0, truth.flushed - overlap)
            if split and middle > truth.flushed:
                rows.append(truth.row(start, middle))
                start = middle
            rows.append(truth.row(start, len(truth.tokens)))
            truth.flushed, truth.finish_sent = len(truth.tokens), bool(truth.finish)
        self.sent.append(make_chunks(rows, len(self.sent)))

    @staticmethod
    def unsent(truth: Truth) -> bool:
        return truth.flushed < len(truth.tokens) or (bool(truth.finish) and not truth.finish_sent)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def deliver_any(self, data: st.DataObject) -> None:
        """Early, late or again."""
        self.say("engine-0", data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: self.acked < len(self.sent))
    @rule()
    def deliver_next(self) -> None:
        (_, ack), *_ = self.say("engine-0", self.sent[self.acked])
        assert ack.next_sequence == self.acked

    @precondition(lambda self: self.growing())
    @rule(data=st.data(), kind=st.sampled_from(["nan", "token", "gap", "version", "spans", "finish"]))
    def tamper(self, data: st.DataObject, kind: str) -> None:
        """A bad row of the right engine: it may cost this trajectory and nothing else."""
        truth = data.draw(st.sampled_from(self.growing()))
        truth.tampered = True
        row = Row(rid(truth.group, truth.member), truth.flushed, [9, 9])
        changes: dict[str, object] = {}
        if kind == "nan":
            row.logprobs = [-1.0, float("nan")]
        elif kind == "token":
            row.tokens = [9, -9]
        elif kind == "gap":
            row.start = MAX_NEW + 1
        elif kind == "version":
            row.versions = [(0, 0), (self.core.histories.current, 10**6)]
        elif kind == "spans":
            changes["spans"] = np.array([[0, 0, 0, 1]], np.int64)
        else:
            row.finish = "bored"
        self.sent.append(make_chunks([row], len(self.sent), **changes))

    @precondition(lambda self: self.truths)
    @rule(data=st.data(), old=st.booleans())
    def intrude(self, data: st.DataObject, old: bool) -> None:
        """An old incarnation, or somebody of another name, continues a stream."""
        truth = data.draw(st.sampled_from(list(self.truths.values())))
        row = Row(rid(truth.group, truth.member), len(truth.tokens), [77], finish="stop")
        received = self.core.ledger.received
        event = make_chunks([row], self.acked, **({"incarnation": 0} if old else {"engine": "engine-9"}))
        actions = self.say("engine-0", event)
        assert [answer.reason for _, answer in actions] == ["fenced" if old else "not_registered"]
        assert self.core.ledger.received == received

    @precondition(lambda self: any(not t.closed for t in self.truths.values()))
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "failed", "lie"]))
    def close(self, data: st.DataObject, outcome: str) -> None:
        open_ones = [t for t in self.truths.values() if not t.closed]
        truth = data.draw(st.sampled_from(open_ones))
        if not truth.finish and outcome != "failed":
            self.grow(truth, 1, "stop")
        truth.lied = outcome == "lie"
        self.finish_close(truth, "failed" if outcome == "failed" else "done")

    def finish_close(self, truth: Truth, status: str) -> None:
        truth.closed, truth.reward = status, 0.5 * truth.member
        sampled = len(truth.tokens) + truth.lied
        self.say(
            "actor-0",
            m.CloseTrajectory(
                group=truth.group,
                member=truth.member,
                status=status,
                reason="reward_error",
                reward=truth.reward,
                num_sampled=sampled,
            ),
        )

    @rule(tenths=st.integers(0, 10), fork=st.booleans())
    def request(self, tenths: int, fork: bool) -> None:
        last = self.core.histories.last
        if fork and tenths < 3 and len(self.forks) < 3:
            step = Version(last.history + 1, tenths * last.step // 10)
            self.forks = {h: min(at, step.step) for h, at in self.forks.items()} | {last.history: step.step}
            uncommitted = [s for s in self.open_steps() if s.step >= step.step]
            for gone in uncommitted:
                del self.leases[gone]
            self.settled = {t: s for t, s in self.settled.items() if s not in uncommitted}
            self.say("learner-0", m.LeaseRequest(step=step))
        else:
            self.say("learner-0", m.LeaseRequest(step=last))

    def open_steps(self) -> set[Version]:
        applied = {done.step for done in self.core.store.applied}
        return applied | ({self.core.lease.message.step} if self.core.lease else set())

    @precondition(lambda self: self.core.lease)
    @rule(outcome=st.sampled_from(["trained", "trained", "skipped"]))
    def apply(self, outcome: str) -> None:
        step = self.core.lease.message.step
        self.say("learner-0", m.Applied(step=step, outcome=outcome, metrics={}))
        assert self.core.histories.last == (step.history, step.step + 1)

    @rule(back=st.integers(0, 2))
    def commit(self, back: int) -> None:
        last = self.core.histories.last
        self.say("learner-0", m.Committed(step=Version(last.history, max(0, last.step - back))))

    @rule()
    def restart_actor(self) -> None:
        if self.core.ledger.trajectories[State.IN_FLIGHT] < 5:
            return
        peer = self.core.registry.peers["actor-0"]
        self.run.hello("actor", incarnation=peer.incarnation + 1)
        for truth in self.truths.values():
            if self.core.store.groups.get(truth.group) is None or self.is_dropped(truth):
                truth.closed = truth.closed or "failed"

    @rule(members=st.integers(2, 3), tokens=st.integers(1, 6), learn=st.booleans())
    def fair_round(self, members: int, tokens: int, learn: bool = False) -> None:
        """Everybody does what is awaited: random steps alone rarely bring a group to its end."""
        while self.core.credits["actor-0"]:
            self.open(members)
        if learn and not self.core.lease and self.core.waiting is None:
            self.request(10, False)
        for truth in self.truths.values():
            if not truth.finish and not truth.closed:
                # The long tail: one member in so many grows over several versions.
                lingers = self.slow and truth.group % self.slow == truth.member and len(truth.tokens) < MAX_NEW
                self.grow(truth, 2 if lingers else tokens, "" if lingers else "stop")
        rows = [t.row(t.flushed, len(t.tokens)) for t in self.truths.values() if self.unsent(t)]
        for truth in self.truths.values():
            truth.flushed, truth.finish_sent = len(truth.tokens), bool(truth.finish)
        self.sent.append(make_chunks(rows, len(self.sent)))
        while self.acked < len(self.sent):
            self.deliver_next()
        for truth in list(self.truths.values()):
            if not truth.closed and truth.finish:
                self.finish_close(truth, "failed" if truth.finish == "abort" else "done")
        for group in self.core.store.groups.values():
            for held in group.members:
                settled = held.complete or held.state is not State.IN_FLIGHT
                assert settled or not held.closed, f"{held.label} is closed, everything came, and it is not settled"
        if learn and self.core.lease:
            self.apply("trained")

    # -- what must hold ----------------------------------------------------------------------------------------

    def is_dropped(self, truth: Truth) -> bool:
        group = self.core.store.groups.get(truth.group)
        return group is None or group.members[truth.member].state is State.DROPPED

    def check_streams(self) -> None:
        """What the queue holds is a prefix of the truth; nobody who was honest was dropped for a stream's sake."""
        for (group, member), truth in self.truths.items():
            held_group = self.core.store.groups.get(group)
            if held_group is None:
                continue
            held = held_group.members[member]
            if held.state in (State.IN_FLIGHT, State.READY, State.LEASED):
                ids = np.frombuffer(held.ids, np.int32).tolist()
                assert ids == truth.tokens[: len(ids)]
                versions = [(h, s) for h, s, count in held.spans for _ in range(count)]
                assert versions == truth.versions[: len(ids)]
                if held.complete:
                    assert len(ids) == len(truth.tokens)
            elif held.state is State.DROPPED and held.reason in ("broken_stream", "count_mismatch"):
                assert truth.tampered or truth.lied
            elif held.state is State.DROPPED and held.reason == "interrupted":
                assert truth.finish == "abort"

    def check_lease(self, lease: m.Lease) -> None:
        known = self.leases.get(lease.step)
        assert known is None or known is lease, "a repeated request got another lease"
        if known is lease:
            return
        self.leases[lease.step] = lease
        at = 0
        for group, member, length, reward in zip(
            lease.groups, lease.members, lease.lengths, lease.rewards, strict=True
        ):
            truth = self.truths[int(group), int(member)]
            assert (int(group), int(member)) not in self.settled, "leased twice"
            self.settled[int(group), int(member)] = lease.step
            assert (truth.closed, truth.reward) == ("done", reward)
            here, own = slice(at, at + length), slice(at + len(PROMPT), at + length)
            assert lease.token_ids[here].tolist() == [*PROMPT, *truth.tokens]
            assert lease.sampled[here].tolist() == [0] * len(PROMPT) + [1] * len(truth.tokens)
            assert np.allclose(lease.logprobs[own], [-0.01 * token for token in truth.tokens])
            versions = list(zip(lease.histories[own].tolist(), lease.steps[own].tolist(), strict=True))
            assert versions == truth.versions
            ages = [lease.step.step - min(step, self.forks.get(history, step)) for history, step in truth.versions]
            assert lease.ages[own].tolist() == ages
            assert all(age >= 0 for age in ages)
            young = [self.max_age < 0 or age <= self.max_age for age in ages]
            assert lease.trainable[own].tolist() == young
            at += length
        assert at == len(lease.token_ids)
        assert lease.trainable.any()
        groups = np.unique(lease.groups)
        assert len(lease.token_ids) <= MAX_TOKENS or len(groups) == 1
        for group in groups.tolist():
            whole = [t.member for t in self.core.store.groups[group].survivors()]
            assert lease.members[lease.groups == group].tolist() == whole

    def check_waiting(self) -> None:
        """Liveness: a learner waits only while there is too little, and then more is under way."""
        core = self.core
        credits, under_way = sum(core.credits.values()), core.store.group_counts[State.IN_FLIGHT]
        if core.waiting is not None:
            assert core.store.ready.trainable_tokens < MIN_TOKENS
            assert credits + under_way > 0
        assert core.awaits()

    def teardown(self) -> None:
        """From wherever this got to, a fair world reaches the next lease."""
        if not hasattr(self, "core"):
            return
        self.slow = 0
        for _ in range(3):
            if self.core.lease:
                self.apply("trained")
            self.say("learner-0", m.LeaseRequest(step=self.core.histories.last))
            for _ in range(60):
                if self.core.lease:
                    break
                self.fair_round(3, 3)
            assert self.core.lease, self.core.awaits()
        self.run.shutdown()
        left = self.core.ledger.trajectories
        assert left[State.IN_FLIGHT] == left[State.READY] == 0


QueueMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestQueueMachine = QueueMachine.TestCase
