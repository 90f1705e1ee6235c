"""Short histories with a fault at every step, chosen by hypothesis, around the same model as `queue_world`.

After every event: both conservation laws by recount, a named input that is awaited.  What the queue durably says is
compared with the truth: tokens and versions of every lease and resume, ages and their bound, steps that grow within a
history, every trajectory in one surviving step at most.  At the end a fair world brings all that grows to its end.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_peers import Engine, Link, Peer
from queue_world import SILENCE_S, Setting, World

seeds = st.integers(0, 1 << 16)
"""Of what peers do by themselves: how many tokens, which reward."""


class QueueMachine(RuleBasedStateMachine):
    @initialize(
        seed=seeds,
        engines=st.integers(1, 2),
        actors=st.integers(1, 2),
        members=st.integers(1, 3),
        mode=st.sampled_from(["streaming", "rounds", "synchronous", "one_step_off"]),
        age=st.sampled_from([-1, 0, 1, 3]),
        only=st.sampled_from(["", "filter", "deadline"]),
        every=st.integers(1, 3),
        agents=st.booleans(),
    )
    def begin(
        self,
        seed: int,
        engines: int,
        actors: int,
        members: int,
        mode: str,
        age: int,
        only: str,
        every: int,
        agents: bool,
    ) -> None:
        queue: dict[str, object] = {"mode": mode, "max_token_age": age, "max_token_age_of": {"u": -1}}
        queue |= {"min_tokens": 12, "max_tokens": 40, "first_groups": 2}
        if only == "filter":
            queue["filter"] = "equal_rewards"
            members = max(2, members)
        elif only == "deadline":
            queue["group_deadline_s"] = 30.0
        # Nothing goes wrong by itself: that is for the rules.
        setting = Setting(
            seed=seed,
            queue=queue,
            engines=engines,
            actors=actors,
            members=members,
            max_new=12,
            checkpoint_every=every,
            agents=agents,
            faults=0.0,
        )
        self.world = World(setting)
        self.world.shell.recounts = True

    def one(self, data: st.DataObject, of: type[Peer] = Peer) -> Peer:
        names = [name for name, peer in self.world.peers.items() if isinstance(peer, of)]
        return self.world.peers[data.draw(st.sampled_from(names))]

    def link(self, data: st.DataObject) -> Link:
        """One on which something has come."""
        links = [peer.link for peer in self.world.peers.values() if peer.link.up]
        return links[data.draw(st.integers(0, len(links) - 1))]

    def something_came(self) -> bool:
        return any(peer.link.up for peer in self.world.peers.values())

    # -- everybody does what they should -----------------------------------------------------------------------

    @rule(seed=seeds, rounds=st.integers(1, 6), seconds=st.sampled_from([0.1, 0.6]))
    def all_is_well(self, seed: int, rounds: int, seconds: float) -> None:
        self.world.random.seed(seed)
        for _ in range(rounds):
            self.breathe(seconds)

    def breathe(self, seconds: float, *quiet: Peer) -> None:
        self.world.pass_time(seconds)
        for peer in list(self.world.peers.values()):
            if peer not in quiet:
                self.world.turn(peer)
                self.world.hear(peer.link)
        self.world.commit()

    @rule(data=st.data(), seed=seeds)
    def one_takes_a_turn(self, data: st.DataObject, seed: int) -> None:
        self.world.random.seed(seed)
        self.world.pass_time(0.3)
        self.world.turn(self.one(data))

    @rule(data=st.data(), seed=seeds, tokens=st.integers(1, 12))
    def an_engine_runs_ahead_of_its_chunks(self, data: st.DataObject, seed: int, tokens: int) -> None:
        self.world.random.seed(seed)
        engine = self.one(data, Engine)
        assert isinstance(engine, Engine)
        engine.generate(tokens)

    @rule()
    def the_queue_commits(self) -> None:
        self.world.commit()

    @rule()
    def the_queue_takes_a_snapshot(self) -> None:
        self.world.shell.save()

    # -- on the way --------------------------------------------------------------------------------------------

    @precondition(something_came)
    @rule(data=st.data(), place=st.integers(0, 3), twice=st.booleans())
    def a_message_comes_early_late_or_twice(self, data: st.DataObject, place: int, twice: bool) -> None:
        link = self.link(data)
        if twice:
            link.up.append(link.up[0])
        self.world.deliver(link, min(place, len(link.up) - 1))

    @precondition(something_came)
    @rule(data=st.data())
    def a_message_is_lost(self, data: st.DataObject) -> None:
        self.link(data).up.popleft()

    @rule(data=st.data())
    def a_connection_breaks(self, data: st.DataObject) -> None:
        self.one(data).reconnect()

    @rule(seed=seeds)
    def a_stranger_speaks(self, seed: int) -> None:
        self.world.random.seed(seed)
        self.world.shell.take(self.world.now, *self.world.strangers.say(self.world.core))

    @rule(seed=seeds, data=st.data())
    def an_engine_sends_a_bad_row(self, seed: int, data: st.DataObject) -> None:
        self.world.random.seed(seed)
        engine = self.one(data, Engine)
        assert isinstance(engine, Engine)
        engine.tamper()

    # -- processes ---------------------------------------------------------------------------------------------

    @rule(seed=seeds, data=st.data())
    def the_queue_is_killed(self, seed: int, data: st.DataObject) -> None:
        """With any number of the last events durable, and none of their consequences said."""
        self.world.random.seed(seed)
        self.world.crash_queue(data.draw(st.integers(0, len(self.world.shell.held))))

    @rule(data=st.data(), seed=seeds, at_once=st.booleans())
    def a_process_is_killed(self, data: st.DataObject, seed: int, at_once: bool) -> None:
        self.world.random.seed(seed)
        peer = self.one(data)
        self.world.end(peer)
        if at_once:
            self.world.start(peer.name)

    @rule(data=st.data(), seed=seeds)
    def a_process_hangs_until_it_is_given_up(self, data: st.DataObject, seed: int) -> None:
        self.world.random.seed(seed)
        peer = self.one(data)
        for _ in range(int(SILENCE_S / 3) + 2):
            self.breathe(3.0, peer)

    @rule(data=st.data())
    def an_engine_is_drained(self, data: st.DataObject) -> None:
        engine = self.one(data, Engine)
        assert isinstance(engine, Engine)
        self.world.drain(engine)

    # -- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def a_learner_waits_only_while_there_is_too_little_and_more_is_under_way(self) -> None:
        if not hasattr(self, "world"):
            return
        core = self.world.core
        if core.store.admission.by_batch:  # a batch may be whole in part only, or wait for engines to hold its version
            return
        if core.steps.waiting is not None and any(core.registry.living("actor")):
            assert core.store.ready.trainable_tokens < core.settings.queue.min_tokens
            assert self.world.growing()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.commit()
            self.world.check()
            self.world.shell.recounts = False
            self.world.finish()


QueueMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestQueueMachine = QueueMachine.TestCase
