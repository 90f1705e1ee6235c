"""What may go wrong while nothing runs, or as it ends.  A recount follows every event."""

import pytest
from queue_builders import Row, Run, make_core, of_type, rid
from queue_turns import a_turn, held, orders, two_turns

from queues import snapshot
from queues.core import Recovered, Tick
from queues.ledger import State
from stream_rl import messages as m

# -- what may go wrong between turns ---------------------------------------------------------------------------


def test_an_engine_that_is_lost_between_turns_costs_nothing_and_resumes_nothing():
    run = two_turns()
    assert orders(run.hello("engine", incarnation=2)) == []
    run.sequence = 0
    run.chunks(Row(rid(0, 0, 1), 0, [7], finish="stop"), incarnation=2)
    run.close(0, 0, 3, segment=1)
    assert run.core.store.groups[0].members[0].complete


def test_an_engine_that_is_lost_while_the_environment_thinks_costs_nothing():
    run = Run()
    run.open(0)
    a_turn(run, [5, 6])
    assert orders(run.hello("engine", incarnation=2)) == []
    assert orders(run.append(0, 0, 2, [70])) == [("Appended", 0, 0, 1)]


def test_a_segment_whose_end_was_lost_is_resumed_in_place_of_its_append():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5]))
    run.append(0, 0, 2, [70])
    (order,) = of_type(run.hello("engine", incarnation=2), m.Resume)
    assert (order.segment, order.token_ids.tolist(), order.finish) == (1, [5], "")
    assert not run.core.store.groups[0].members[0].said_over
    run.append(0, 0, 2, [70])
    assert run.refused == {"old_segment": 1}


def test_an_append_of_which_nothing_came_is_resumed_when_any_engine_is_lost():
    run = Run()
    run.hello("engine", 1)
    run.open(0)
    run.append(0, 0, 2, [70])
    assert orders(run.hello("engine", 1, incarnation=2)) == [("Resume", 0, 0, 1)]


@pytest.mark.parametrize("whole", [True, False])
def test_a_new_incarnation_of_the_actor_gets_flags_and_log_probs(whole):
    run = two_turns()
    run.chunks(Row(rid(0, 0, 1), 0, [7, 8], finish="stop" if whole else "", logprobs=[-1.0, -2.0]))
    if not whole:
        run.append(0, 0, 9, [73], segment=1)
    order = of_type(run.hello("actor", incarnation=2), m.Resume)[0]
    assert (order.segment, order.finish, order.episode) == (2, "stop" if whole else "", 0)
    assert order.token_ids.tolist() == [5, 6, 70, 71, 7, 8]
    assert order.sampled.tolist() == [1, 1, 0, 0, 1, 1]
    assert order.logprobs.tolist() == [-0.25, -0.25, 0, 0, -1, -2]
    run.told = 0
    if whole:  # the environment speaks again behind the turn that it was rebuilt with
        assert orders(run.append(0, 0, 4, [72], segment=2)) == [("Appended", 0, 0, 3)]
        assert held(run)[-1] == 72


def test_an_actor_that_registers_again_hears_again_what_it_may_ask_for():
    run = two_turns()
    assert ("Appended", 0, 0, 1) in orders(run.hello("actor"))
    run.chunks(Row(rid(0, 0, 1), 0, [7]))
    assert orders(run.hello("actor")) == []
    run.say("", Recovered())
    run.interrupt(0, 0, segment=1)
    assert orders(run.hello("actor")) == [("Resume", 0, 0, 2)]


def test_what_waits_to_be_appended_survives_a_snapshot():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5]))
    run.append(0, 0, 2, [70, 71])
    run.branch(0, 2, 1)
    run.core = snapshot.load(snapshot.dump(run.core))
    assert orders(run.chunks(Row(rid(0, 0), 1, [6], finish="stop"))) == [("Appended", 0, 0, 1)]
    assert held(run) == [5, 6, 70, 71]


def test_a_drained_engine_does_not_disturb_who_waits_for_an_environment():
    run = Run()
    run.open(0, 3)
    a_turn(run, [5, 6])
    run.chunks(Row(rid(0, 1), 0, [5]), Row(rid(0, 2), 0, [5]))
    run.append(0, 1, 2, [70])
    assert orders(run.say("observer-0", m.DrainEngine(engine="engine-0"))) == [("Park", 0, 2, 0)]
    assert orders(run.chunks(Row(rid(0, 1), 1, [6], finish="stop"))) == [("Appended", 0, 1, 1)]
    assert orders(run.append(0, 0, 2, [70])) == [("Appended", 0, 0, 1)]


def test_a_turn_that_ends_although_its_engine_is_drained_goes_on():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5]))
    run.say("observer-0", m.DrainEngine(engine="engine-0"))
    run.chunks(Row(rid(0, 0), 1, [6], finish="stop"))
    assert orders(run.append(0, 0, 2, [70])) == [("Appended", 0, 0, 1)]
    assert not run.core.store.groups[0].members[0].parking


def test_a_group_that_is_overdue_goes_on_without_those_that_wait():
    run = Run(make_core(group_deadline_s=5.0))
    run.open(0, 4)
    run.append(0, 0, 2, [70])
    for member in (2, 3):
        a_turn(run, [4], member=member)
        run.close(0, member, 1)
    a_turn(run, [4], member=1)
    run.now += 10
    assert orders(run.say("", Tick())) == [("Cancel", 0, 0, "deadline"), ("Cancel", 0, 1, "deadline")]
    assert run.core.store.groups[0].state is State.READY
    run.append(0, 1, 1, [70])
    assert run.core.ledger.dropped == {"deadline": 2}


# -- rounds ----------------------------------------------------------------------------------------------------


def between_rounds() -> Run:
    """Group 0: member 0 waits for its environment, 1 is asked for nothing yet; group 1 is leased."""
    run = Run(make_core(mode="rounds", min_tokens=4, over_provision=2.0))
    run.open(0)
    a_turn(run, [5, 6])
    run.grow(1, [4, 4])
    assert orders(run.request(0)) == [("Park", 0, 1, 0)]
    return run


def test_a_turn_that_ends_between_rounds_goes_on_in_the_next():
    run = between_rounds()
    assert orders(run.append(0, 0, 2, [70])) == []
    assert held(run) == [5, 6, 70]
    assert run.core.store.resuming.resting == 1
    assert orders(run.apply(0)) == [("Appended", 0, 0, 1)]
    run.chunks(Row(rid(0, 0, 1), 0, [7], finish="stop"))
    run.close(0, 0, 3, segment=1)
    assert run.core.store.groups[0].members[0].complete


def test_a_new_actor_gets_all_of_what_was_appended_between_rounds():
    run = between_rounds()
    run.append(0, 0, 2, [70])
    assert orders(run.hello("actor", incarnation=2)) == []
    first, _ = of_type(run.apply(0), m.Resume)
    assert (first.token_ids.tolist(), first.segment) == ([5, 6, 70], 2)


def test_an_episode_may_end_between_rounds_after_its_append():
    run = between_rounds()
    run.append(0, 0, 2, [70])
    run.close(0, 0, 2, segment=1)
    assert run.core.store.groups[0].members[0].complete
    assert orders(run.apply(0)) == []


def test_a_member_without_a_prompt_is_not_parked_and_brings_it_for_the_next_round():
    run = Run(make_core(mode="rounds", min_tokens=4, over_provision=2.0))
    run.open(0, prompt=())
    run.grow(1, [4, 4])
    assert orders(run.request(0)) == []
    assert orders(run.append(0, 0, 0, [11])) == []
    assert orders(run.apply(0)) == [("Appended", 0, 0, 1)]


def test_a_branch_that_opens_between_rounds_is_parked():
    run = between_rounds()
    assert orders(run.branch(0, 2, 0)) == [("Park", 0, 2, 0)]
    run.interrupt(0, 2, 0)
    assert orders(run.apply(0)) == [("Resume", 0, 2, 1)]
