"""Who takes part: incarnations, silence, bad names, which engines are asked.  A recount follows every event."""

import pytest
from queue_builders import Row, Run, make_core, of_type, rid

from queues import snapshot
from queues.core import Recovered, Tick
from queues.registry import MAX_PEERS
from stream_rl import messages as m
from stream_rl.types import Version


def hello(name: str = "engine-0", role: str = "engine", incarnation: int = 1, run: str = "r") -> m.Hello:
    return m.Hello(run=run, role=role, name=name, incarnation=incarnation, pid=1)


def stats(engine: str, step: int, history: int = 0, incarnation: int = 1) -> m.EngineStats:
    version = Version(history, step)
    return m.EngineStats(engine=engine, incarnation=incarnation, version=version, counters={}, histograms={})


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (hello(run="another"), "other_run"),
        (hello(role="boss"), "unknown_role"),
        (hello(name=""), "bad_name"),
        (hello(name="x" * 65), "bad_name"),
        (hello(name="journal", role="observer"), "bad_name"),
        (hello(role="actor"), "role_changed"),
        (hello(incarnation=0), "fenced"),
        (hello(incarnation=-1), "fenced"),
    ],
)
def test_who_cannot_be_welcomed_hears_why(event, reason):
    run = Run()
    before = dict(run.core.registry.peers)
    ((to, answer),) = run.say("", event)
    assert (to, answer.reason) == ("", reason)
    assert run.core.registry.peers == before
    assert not run.core.durable


def test_whoever_has_said_no_hello_is_told_to():
    run = Run()
    ((to, answer),) = run.say("", m.Alive())
    assert (to, answer.reason) == ("", "not_registered")


def test_the_number_of_peers_is_bounded():
    run = Run(joined=False)
    for number in range(MAX_PEERS):
        run.core.handle(1.0, "", hello(f"engine-{number}"))
    assert run.hello("actor")[0][1].reason == "too_many_peers"
    assert of_type(run.say("", hello("engine-5", incarnation=2)), m.Welcome), "who is known may come back"


def test_lost_peers_are_fenced_whatever_they_say():
    run = Run()
    for _ in range(12):
        run.now += 3
        run.say("observer-0", m.Alive())
        run.say("", Tick())
    assert {name for name, peer in run.core.registry.peers.items() if peer.lost} == {
        "engine-0",
        "actor-0",
        "learner-0",
        "publisher-0",
    }
    assert run.request(0)[0][1].reason == "fenced"
    assert run.open(0)[0][1].reason == "fenced"
    assert run.chunks(Row(rid(0), 0, [1]))[0][1].reason == "fenced"
    assert run.say("publisher-0", m.Alive())[0][1].reason == "fenced"
    assert run.hello("learner")[0][1].reason == "fenced"
    assert run.core.steps.waiting is None
    assert of_type(run.hello("learner", incarnation=2), m.Welcome)
    run.request(0)
    assert run.core.steps.waiting == "learner-0"
    assert any("engine-0 is lost" in line for line in run.core.why())


def test_a_peer_that_says_anything_new_is_alive_and_one_that_repeats_itself_is_not():
    run = Run()
    run.open(0)
    for _ in range(20):
        run.now += 3
        run.say("actor-0", m.Alive())
        run.chunks(Row(rid(0), 0, [1]), sequence=0)
        run.say("", Tick())
    lost = {name for name, peer in run.core.registry.peers.items() if peer.lost}
    assert lost == {"engine-0", "learner-0", "publisher-0"}


@pytest.mark.parametrize("pause", [Tick(), Recovered()])
def test_nobody_is_blamed_for_a_time_in_which_the_queue_was_away(pause):
    run = Run()
    run.say("", Tick())
    run.now += 1000
    run.say("", pause)
    for _ in range(9):
        run.now += 3
        run.say("", Tick())
    assert not any(peer.lost for peer in run.core.registry.peers.values())
    for _ in range(3):
        run.now += 3
        run.say("", Tick())
    assert run.core.registry.peers["engine-0"].lost


def test_a_replay_knows_the_observers_whose_orders_are_in_the_journal():
    live, journal = Run(), []
    for sender, event in (("", hello("stop", "observer")), ("stop", m.Shutdown(reason="x"))):
        live.say(sender, event)
        if live.core.durable:
            journal.append((live.now, sender, event))
    replayed = Run().core
    for row in journal:
        replayed.handle(*row)
    assert live.core.closed
    assert replayed.closed
    live.say("", Recovered())
    assert not list(live.core.registry.of_role("observer")), "none is connected to the new process"


# -- engines that take requests --------------------------------------------------------------------------------


def engines(actions: list[tuple[str, object]]) -> list[list[str]]:
    return [message.names for message in of_type(actions, m.Engines)]


def test_an_engine_takes_requests_once_it_has_said_what_its_weights_are():
    run = Run(joined=False)
    run.hello("actor")
    assert not engines(run.hello("engine"))
    assert engines(run.say("engine-0", stats("engine-0", 0))) == [["engine-0"]]
    assert not engines(run.say("engine-0", stats("engine-0", 0))), "nothing has changed"
    run.hello("engine", 1)
    assert engines(run.say("engine-1", stats("engine-1", 0))) == [["engine-0", "engine-1"]]
    assert engines(run.hello("engine", incarnation=2)) == [["engine-1"]]
    assert engines(run.say("engine-0", stats("engine-0", 0, incarnation=2))) == [["engine-0", "engine-1"]]


def advanced(steps: int, **queue: object) -> Run:
    run = Run(make_core(min_tokens=4, first_groups=8, **queue))
    for step in range(steps):
        run.grow(step, [2, 2], (0, step))
        run.request(step)
        run.apply(step)
    return run


def test_an_engine_that_joins_late_is_left_alone_until_its_weights_are_young():
    run = advanced(6, max_token_age=4)
    assert not engines(run.say("engine-0", stats("engine-0", 0)))
    assert not engines(run.say("engine-0", stats("engine-0", 3)))
    assert engines(run.say("engine-0", stats("engine-0", 4))) == [["engine-0"]]
    run.grow(6, [2, 2], (0, 4))
    run.request(6)
    run.apply(6)
    assert not engines(run.say("engine-0", stats("engine-0", 0))), "it has joined: the mask is for those that lag"


@pytest.mark.parametrize("version", [(5, 0), (0, 99), (0, -1), (-1, 0), (1 << 40, 1 << 40)])
def test_an_engine_of_a_version_that_does_not_exist_takes_no_requests_and_breaks_nothing(version):
    run = Run()
    history, step = version
    assert not engines(run.say("engine-0", stats("engine-0", step, history)))
    run.grow(0, [4, 4])
    run.request(0)
    run.apply(0)
    assert engines(run.say("engine-0", stats("engine-0", 1))) == [["engine-0"]]


def test_a_lost_engine_takes_no_requests():
    run = Run()
    run.say("engine-0", stats("engine-0", 0))
    told = []
    for _ in range(12):
        run.now += 3
        run.say("actor-0", m.Alive())
        told += engines(run.say("", Tick()))
    assert told == [[]]
    assert "hello of an engine" in run.core.awaits()


def test_a_core_that_was_written_and_read_back_goes_on_as_if_nothing_had_been():
    run = advanced(2)
    run.open(2)
    run.chunks(Row(rid(2), 0, [4, 5]))
    run.hello("actor", 1)
    again = Run(snapshot.load(snapshot.dump(run.core)), joined=False, now=run.now)
    for core in (run.core, again.core):
        core.recount()
    later = [
        ("", hello("engine-0", incarnation=2)),
        ("", hello("actor-0", "actor", 2)),
        ("learner-0", m.LeaseRequest(step=Version(1, 1))),
    ]
    for sender, event in later:
        live, loaded = ([(to, type(x).__name__) for to, x in r.say(sender, event)] for r in (run, again))
        assert live == loaded
    assert again.core.steps.lease is not None
