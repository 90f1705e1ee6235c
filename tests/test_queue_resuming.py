"""Trajectories that move: their engine, their actor or the queue itself is lost.  A recount follows every event."""

import numpy as np
import pytest
from queue_builders import Row, Run, make_chunks, make_core, of_type, rid

from queues.core import Tick
from queues.ledger import State
from stream_rl import messages as m
from stream_rl.types import Version


def a_run(members: int = 2, **queue: object) -> Run:
    """Two engines; trajectory 0/0 has the tokens 5 6 of engine-0, the other members have none."""
    run = Run(make_core(**queue))
    run.hello("engine", 1)
    run.open(0, members)
    run.chunks(Row(rid(0, 0), 0, [5, 6], logprobs=[-0.25, -0.5]))
    return run


def silence(run: Run, *quiet: str) -> list[tuple[str, object]]:
    """Time passes in which all but `quiet` give signs of life; what the ticks lead to."""
    actions = []
    for _ in range(12):
        run.now += 3
        for name, peer in list(run.core.registry.peers.items()):
            if name not in quiet and not peer.lost:
                actions += run.say(name, m.Alive())
        actions += run.say("", Tick())
    return actions


def engine_1(*rows: Row, sequence: int = 0) -> m.Chunks:
    return make_chunks(rows, sequence, engine="engine-1")


def restarts(run: Run) -> list[tuple[str, object]]:
    return run.hello("engine", incarnation=2)


def falls_silent(run: Run) -> list[tuple[str, object]]:
    return silence(run, "engine-0")


def is_told_of(run: Run) -> list[tuple[str, object]]:
    return run.interrupt(0, 0)


# -- an engine is lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [restarts, falls_silent, is_told_of])
def test_a_trajectory_goes_on_elsewhere_with_all_its_tokens_when_its_engine_is_lost(lost):
    run = a_run()
    ((to, order),) = [(to, message) for to, message in lost(run) if isinstance(message, m.Resume)]
    assert (to, order.group, order.member, order.segment, order.members) == ("actor-0", 0, 0, 1, 2)
    assert (order.problem, order.finish) == (b"p", "")
    assert (order.prompt_ids.tolist(), order.token_ids.tolist()) == ([1, 2, 3], [5, 6])
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7], finish="stop", logprobs=[-0.75])))
    run.close(0, 0, 3, segment=1)
    held = run.core.store.groups[0].members[0]
    assert held.complete
    assert np.frombuffer(held.ids, np.int32).tolist() == [5, 6, 7]
    assert np.frombuffer(held.logprobs, np.float32).tolist() == [-0.25, -0.5, -0.75]
    assert run.core.ledger.received == 3


def test_versions_are_kept_over_segments():
    run = a_run(min_tokens=4, first_groups=3)
    run.grow(1, [2, 2])
    run.request(0)
    run.apply(0)
    restarts(run)
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7, 8], [(0, 0), (0, 1)], "stop")))
    assert run.core.store.groups[0].members[0].spans == [(0, 0, 3), (0, 1, 1)]


def test_the_budget_is_of_the_trajectory_and_not_of_its_segments():
    run = a_run()
    restarts(run)
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7] * 15)))
    assert run.refused["too_long"] == 1
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7] * 14, finish="length"), sequence=1))
    run.close(0, 0, 16, segment=1)
    assert run.core.store.groups[0].members[0].complete


def test_what_an_old_segment_still_says_is_void():
    run = a_run()
    run.interrupt(0, 0)
    run.chunks(Row(rid(0, 0), 2, [7, 8], finish="stop"))
    assert run.refused["old_segment"] == 1
    assert run.core.ledger.received == 2
    assert run.close(0, 0, 4)[0][1].reason == "old_segment"
    assert run.interrupt(0, 0)[0][1].reason == "old_segment"
    assert not run.core.store.groups[0].members[0].closed
    assert run.core.tallies.resumed == {"interrupted": 1}


def test_a_later_segment_than_the_queues_is_unknown():
    run = a_run()
    run.chunks(Row(rid(0, 0, 1), 0, [7]))
    assert run.refused == {"unknown_rid": 1}
    assert run.close(0, 0, 2, segment=1)[0][1].reason == "unknown_segment"


def test_at_its_full_budget_only_the_reward_is_asked_for():
    run = a_run()
    run.chunks(Row(rid(0, 0), 2, [7] * 14))
    (order,) = of_type(restarts(run), m.Resume)
    assert (order.finish, len(order.token_ids)) == ("length", 16)
    run.close(0, 0, 16, segment=1)
    assert run.core.store.groups[0].members[0].complete


def test_a_stream_that_has_ended_needs_no_engine_any_more():
    run = a_run()
    run.chunks(Row(rid(0, 0), 2, [7], finish="stop"))
    assert not of_type(restarts(run), m.Resume)
    run.close(0, 0, 3)
    assert run.core.store.groups[0].members[0].complete


def test_a_close_whose_stream_was_lost_with_its_engine_is_void():
    run = a_run()
    run.close(0, 0, 4, reward=0.75)
    (order,) = of_type(restarts(run), m.Resume)
    assert (order.segment, order.token_ids.tolist()) == (1, [5, 6])
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [8], finish="stop")))
    assert not run.core.store.groups[0].members[0].complete
    run.close(0, 0, 3, reward=0.25, segment=1)
    held = run.core.store.groups[0].members[0]
    assert (held.complete, held.reward) == (True, 0.25)
    window = run.core.tallies.windows[-1]
    assert (window.finished, window.rewards, window.sampled) == (1, 0.25, 3)


@pytest.mark.parametrize("lost", [restarts, falls_silent])
@pytest.mark.parametrize("said", ["close", "interrupt"])
def test_an_answer_of_which_no_token_was_streamed_is_asked_for_again_when_an_engine_is_lost(said, lost):
    """The engine was killed between its answer to the actor and its first chunk: nobody knows whose answer it was."""
    run = a_run()
    getattr(run, said)(0, 1, 3)
    orders = {order.member: order for order in of_type(lost(run), m.Resume)}
    assert orders[1].segment == 1
    assert orders[1].token_ids.size == 0
    run.say("engine-1", engine_1(Row(rid(0, 1, 1), 0, [9], finish="stop")))
    run.close(0, 1, 1, segment=1)
    assert run.core.store.groups[0].members[1].complete


@pytest.mark.parametrize("lost", [restarts, falls_silent])
@pytest.mark.parametrize("said", ["close", "interrupt"])
def test_an_answer_that_is_told_of_only_after_its_engine_was_lost_is_asked_for_again(said, lost):
    """A reward takes its time; meanwhile the engine was killed before its first chunk, and has started again."""
    run = a_run()
    lost(run)
    (order,) = of_type(getattr(run, said)(0, 1, 3), m.Resume)
    assert (order.member, order.segment, order.token_ids.size) == (1, 1, 0)
    assert not of_type(run.close(0, 1, 3, segment=1), m.Resume), "no engine was lost since"
    run.say("engine-1", engine_1(Row(rid(0, 1, 1), 0, [9, 9, 9], finish="stop")))
    assert run.core.store.groups[0].members[1].complete


def test_what_waits_at_a_living_engine_is_left_alone():
    run = a_run(3)
    run.say("engine-1", engine_1(Row(rid(0, 1), 0, [9])))
    assert [order.member for order in of_type(restarts(run), m.Resume)] == [0]


def test_a_lost_engine_is_fenced_until_its_next_incarnation():
    run = a_run()
    falls_silent(run)
    assert run.chunks(Row(rid(0, 1), 0, [7]))[0][1].reason == "fenced"
    assert run.hello("engine")[0][1].reason == "fenced"
    assert of_type(run.hello("engine", incarnation=2), m.Welcome)[0].next_sequence == 0


# -- a segment is interrupted ----------------------------------------------------------------------------------


def test_an_aborted_segment_is_resumed_when_its_stream_has_brought_what_the_engine_said():
    run = a_run()
    assert not of_type(run.interrupt(0, 0, 4), m.Resume)
    assert not of_type(run.chunks(Row(rid(0, 0), 2, [7])), m.Resume)
    (order,) = of_type(run.chunks(Row(rid(0, 0), 3, [8], finish="abort")), m.Resume)
    assert order.token_ids.tolist() == [5, 6, 7, 8]
    assert run.core.tallies.aborted == 1


def test_a_stream_need_not_end_to_have_brought_everything():
    """A request that is aborted before it was scheduled, or never sent, has no finish."""
    run = a_run()
    assert of_type(run.interrupt(0, 1, 0), m.Resume)
    assert of_type(run.interrupt(0, 0, 2), m.Resume)


def test_an_interrupted_stream_with_a_hole_goes_on_from_before_the_hole():
    run = a_run()
    run.interrupt(0, 0, 5)
    (order,) = of_type(run.chunks(Row(rid(0, 0), 2, [-7])), m.Resume)
    assert order.token_ids.tolist() == [5, 6]
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7], finish="stop")))
    run.close(0, 0, 3, segment=1)
    assert run.core.store.groups[0].members[0].complete


def test_a_hole_in_one_segment_is_none_in_the_next():
    run = a_run()
    run.chunks(Row(rid(0, 0), 2, [7, 7, 7, 7, -7]))
    run.interrupt(0, 0)
    run.close(0, 0, 3, segment=1)
    run.say("engine-1", engine_1(Row(rid(0, 0, 1), 0, [7], finish="stop")))
    assert run.core.store.groups[0].members[0].complete
    assert run.core.ledger.dropped == {}


def test_a_segment_that_had_ended_when_it_was_interrupted_only_wants_its_reward():
    run = a_run()
    run.chunks(Row(rid(0, 0), 2, [7], finish="stop"))
    (order,) = of_type(run.interrupt(0, 0), m.Resume)
    assert order.finish == "stop"


def test_a_dropped_trajectory_is_not_resumed():
    run = a_run(3)
    run.fail(0, 1)
    assert run.interrupt(0, 1)[0][1].reason == "already_closed"
    run.chunks(Row(rid(0, 1), 0, [7]))
    assert not of_type(restarts(run), m.Cancel)
    assert run.core.tallies.resumed == {"engine_lost": 1}


# -- an engine is drained --------------------------------------------------------------------------------------


def usable(run: Run, name: str, step: int = 0) -> list[tuple[str, object]]:
    version = Version(0, step)
    return run.say(name, m.EngineStats(engine=name, incarnation=1, version=version, counters={}, histograms={}))


def test_a_drained_engine_gets_nothing_more_and_what_it_grows_is_moved():
    run = a_run()
    usable(run, "engine-0")
    assert of_type(usable(run, "engine-1"), m.Engines)[-1].names == ["engine-0", "engine-1"]
    actions = run.say("observer-0", m.DrainEngine(engine="engine-0"))
    assert [(p.group, p.member, p.segment) for p in of_type(actions, m.Park)] == [(0, 0, 0)]
    assert of_type(actions, m.Engines)[0].names == ["engine-1"]
    assert of_type(actions, m.Done)[0].what == "DrainEngine"
    run.chunks(Row(rid(0, 0), 2, [7], finish="abort"))
    (order,) = of_type(run.interrupt(0, 0, 3), m.Resume)
    assert order.token_ids.tolist() == [5, 6, 7]
    assert run.core.tallies.resumed == {"parked": 1}
    assert run.core.tallies.aborted == 0, "it was asked for"


def test_a_request_that_a_drained_engine_had_not_begun_is_moved_when_its_first_tokens_come():
    run = a_run()
    run.say("observer-0", m.DrainEngine(engine="engine-0"))
    (order,) = of_type(run.chunks(Row(rid(0, 1), 0, [7])), m.Park)
    assert (order.member, order.segment) == (1, 0)
    assert not of_type(run.chunks(Row(rid(0, 1), 1, [7])), m.Park), "once is enough"


def test_draining_what_is_no_engine_is_refused():
    run = a_run()
    assert run.say("observer-0", m.DrainEngine(engine="actor-0"))[0][1].reason == "unknown_engine"
    assert run.say("observer-0", m.DrainEngine(engine="engine-7"))[0][1].reason == "unknown_engine"


# -- an actor is lost ------------------------------------------------------------------------------------------


def test_the_next_incarnation_of_an_actor_gets_all_that_was_growing():
    run = a_run(3)
    run.chunks(Row(rid(0, 1), 0, [7], finish="stop"))
    run.fail(0, 2)
    actions = run.hello("actor", incarnation=2)
    assert [type(message) for _, message in actions[:2]] == [m.Welcome, m.Engines]
    assert actions[0][1].admitted == [1, 2, 3]
    orders = {order.member: order for order in of_type(actions, m.Resume)}
    assert orders.keys() == {0, 1}
    assert (orders[0].token_ids.tolist(), orders[0].finish) == ([5, 6], "")
    assert (orders[1].token_ids.tolist(), orders[1].finish) == ([7], "stop")
    run.told = 0
    run.close(0, 1, 1, segment=1)
    assert run.core.store.groups[0].members[1].complete
    assert run.core.tallies.resumed == {"actor_lost": 2}


def test_a_trajectory_that_was_closed_does_not_go_back_when_its_actor_is_lost():
    run = a_run()
    run.close(0, 0, 3, reward=0.5)
    assert [order.member for order in of_type(run.hello("actor", incarnation=2), m.Resume)] == [1]
    run.chunks(Row(rid(0, 0), 2, [7], finish="stop"))
    assert run.core.store.groups[0].members[0].complete


def test_another_actor_takes_over_after_a_silence():
    run = a_run()
    run.hello("actor", 1)
    actions = silence(run, "actor-0")
    orders = [(to, order.member) for to, order in actions if isinstance(order, m.Resume)]
    assert orders == [("actor-1", 0), ("actor-1", 1)]
    assert [admit.groups for to, admit in actions if isinstance(admit, m.Admit)] == [[1, 2, 3]]
    assert run.core.admitted == {"actor-0": [], "actor-1": [1, 2, 3]}
    late = m.CloseTrajectory(sequence=1, group=0, member=0, status="done", num_sampled=2)
    assert run.say("actor-0", late)[0][1].reason == "fenced"
    close = m.CloseTrajectory(sequence=0, group=0, member=1, segment=1, status="failed", reason="reward_error")
    assert of_type(run.say("actor-1", close), m.Ack)
    assert run.core.ledger.dropped == {"reward_error": 1}


def test_whoever_comes_next_takes_over_when_the_only_actor_is_lost():
    run = a_run()
    silence(run, "actor-0")
    assert "hello of an actor" in run.core.awaits()
    actions = run.hello("actor", 1)
    assert [order.member for order in of_type(actions, m.Resume)] == [0, 1]
    assert [admit.groups for admit in of_type(actions, m.Admit)] == [[1, 2, 3]]
    assert not of_type(run.hello("actor", incarnation=2), m.Resume), "actor-1 has them"


def test_two_actors_that_are_lost_in_the_same_second_lose_nothing():
    run = a_run()
    run.hello("actor", 1)
    silence(run, "actor-0", "actor-1")
    assert {order.member for order in of_type(run.hello("actor", incarnation=2), m.Resume)} == {0, 1}


def test_what_a_lost_actor_had_heard_of_an_interruption_does_not_matter():
    run = a_run()
    run.interrupt(0, 0, 5)
    (order,) = [o for o in of_type(run.hello("actor", incarnation=2), m.Resume) if o.member == 0]
    assert (order.segment, order.token_ids.tolist()) == (1, [5, 6])


# -- the queue was restarted -----------------------------------------------------------------------------------


def test_an_actor_that_only_reconnects_is_reminded_of_what_it_may_have_missed():
    run = a_run(5)
    for member in (1, 2, 3):
        run.interrupt(0, member)
    run.say("engine-1", engine_1(Row(rid(0, 2, 1), 0, [7])))
    run.close(0, 3, 4, segment=1)
    orders = of_type(run.hello("actor"), m.Resume)
    assert [(order.member, order.segment) for order in orders] == [(1, 1)], "2 and 3 have been heard of, 0 never moved"
    assert run.core.tallies.resumed == {"interrupted": 3}, "a reminder is no resume"


def test_a_reconnecting_actor_is_reminded_of_what_it_was_told_to_stop():
    run = a_run(3, group_deadline_s=60.0)
    run.say("observer-0", m.DrainEngine(engine="engine-0"))
    (park,) = of_type(run.hello("actor"), m.Park)
    assert (park.group, park.member, park.segment) == (0, 0, 0)
    run.close(0, 1, 0)
    run.chunks(Row(rid(0, 1), 0, [], finish="stop"))
    run.now += 100
    told = of_type(run.say("", Tick()), m.Cancel)
    assert [(c.member, c.reason) for c in of_type(run.hello("actor"), m.Cancel)] == [(0, "deadline"), (2, "deadline")]
    assert [c.member for c in told] == [0, 2]


# -- a group takes too long ------------------------------------------------------------------------------------


def test_a_group_goes_on_without_its_unfinished_members_after_its_deadline():
    run = a_run(3, group_deadline_s=60.0, first_groups=1, over_provision=1.0)
    for member, tokens in ((1, [4, 4]), (2, [4, 4])):
        run.chunks(Row(rid(0, member), 0, tokens, finish="stop"))
        run.close(0, member, 2)
    run.now += 40
    assert not of_type(run.say("", Tick()), m.Cancel)
    run.now += 40
    (cancel,) = of_type(run.say("", Tick()), m.Cancel)
    assert (cancel.group, cancel.member, cancel.reason) == (0, 0, "deadline")
    assert run.core.ledger.dropped == {"deadline": 1}
    assert run.core.tallies.cancelled["deadline"] == 1
    assert run.core.store.group_counts[State.READY] == 1
    run.chunks(Row(rid(0, 0), 2, [7], finish="abort"))
    assert run.core.tallies.aborted == 0
    assert run.refused == {"after_drop": 1}


def test_a_deadline_that_leaves_nothing_to_compare_ends_the_group():
    run = a_run(2, group_deadline_s=60.0, first_groups=1, over_provision=1.0)
    run.chunks(Row(rid(0, 1), 0, [4, 4], finish="stop"))
    run.close(0, 1, 2)
    run.now += 80
    actions = run.say("", Tick())
    assert run.core.ledger.dropped == {"deadline": 1, "too_few_members": 1}
    assert [admit.groups for admit in of_type(actions, m.Admit)] == [[1]]
