"""Rounds mode: a round is stopped when its lease is made, and what was cut goes on first in the next.

Every event is followed by a recount.
"""

from queue_builders import Row, Run, make_core, of_type, rid

from queues.core import Tick
from queues.ledger import State
from stream_rl import messages as m


def a_round(**queue: object) -> Run:
    """Group 0 is leased for step 0; 1/0 has two tokens, 1/1 none; group 2 is admitted and not opened."""
    settings = {"mode": "rounds", "min_tokens": 4, "first_groups": 1, "over_provision": 3.0}
    run = Run(make_core(**settings | queue))
    run.open(1)
    run.chunks(Row(rid(1, 0), 0, [5, 6]))
    run.request(0)
    assert of_type(run.grow(0, [2, 2]), m.Park)
    return run


def keys(orders: list[object]) -> list[tuple[int, int, int]]:
    return [(order.group, order.member, order.segment) for order in orders]


def test_what_grows_is_parked_when_the_lease_is_made():
    run = Run(make_core(mode="rounds", min_tokens=4, first_groups=1, over_provision=3.0))
    run.open(1, 3)
    run.chunks(Row(rid(1, 0), 0, [5, 6]), Row(rid(1, 2), 0, [7], finish="stop"))
    run.request(0)
    actions = run.grow(0, [2, 2])
    assert of_type(actions, m.Lease)
    assert keys(of_type(actions, m.Park)) == [(1, 0, 0), (1, 1, 0)], "what has ended is not parked"
    assert not of_type(actions, m.Admit), "nothing new begins while a lease is out"


def test_streaming_cuts_nothing_because_a_batch_filled():
    run = Run(make_core(min_tokens=4, first_groups=1, over_provision=3.0))
    run.open(1)
    run.request(0)
    actions = run.grow(0, [2, 2])
    assert of_type(actions, m.Lease)
    assert not of_type(actions, m.Park)


def test_what_was_parked_rests_until_the_step_is_applied_and_goes_on_before_anything_new():
    run = a_round()
    assert not of_type(run.interrupt(1, 1, 0), m.Resume)
    run.interrupt(1, 0, 3)
    assert run.core.store.resuming.resting == 1
    assert not of_type(run.chunks(Row(rid(1, 0), 2, [7], finish="abort")), m.Resume)
    assert run.core.store.resuming.resting == 2
    assert "trajectory 1/0 to be resumed in the next round" in run.core.awaits()
    told = [message for _, message in run.apply(0) if isinstance(message, m.Resume | m.Admit)]
    assert keys(told[:2]) == [(1, 1, 1), (1, 0, 1)]
    assert told[1].token_ids.tolist() == [5, 6, 7]
    assert isinstance(told[2], m.Admit)
    assert run.core.store.resuming.resting == 0
    assert run.core.tallies.resumed == {"parked": 2}
    assert run.core.tallies.aborted == 0


def test_what_had_not_stopped_when_the_next_round_began_goes_on_once_it_has():
    run = a_round()
    assert not of_type(run.apply(0), m.Resume)
    assert keys(of_type(run.interrupt(1, 0, 2), m.Resume)) == [(1, 0, 1)]


def test_a_group_that_is_opened_after_its_round_ended_is_parked_at_once():
    run = a_round()
    assert keys(of_type(run.open(2), m.Park)) == [(2, 0, 0), (2, 1, 0)]
    run.interrupt(2, 0, 0)
    run.interrupt(2, 1)
    assert keys(of_type(run.apply(0), m.Resume)) == [(2, 0, 1), (2, 1, 1)]


def test_a_trajectory_that_ended_while_it_was_being_parked_is_closed_as_ever():
    run = a_round()
    run.chunks(Row(rid(1, 0), 2, [7], finish="stop"))
    run.close(1, 0, 3)
    assert run.core.store.groups[1].members[0].complete
    assert run.core.ledger.dropped == {}


def test_a_trajectory_whose_engine_is_lost_between_rounds_waits_for_the_next():
    run = a_round()
    assert not of_type(run.hello("engine", incarnation=2), m.Resume)
    (order,) = of_type(run.apply(0), m.Resume)
    assert (order.member, order.segment, order.token_ids.tolist()) == (0, 1, [5, 6])


def test_an_answer_that_comes_in_full_after_its_trajectory_was_laid_to_rest_is_not_asked_for_again():
    run = a_round()
    run.interrupt(1, 0)
    assert run.core.store.resuming.resting == 1
    run.chunks(Row(rid(1, 0), 2, [7], finish="stop"))
    run.close(1, 0, 3)
    assert run.core.store.groups[1].members[0].complete
    assert not of_type(run.apply(0), m.Resume)
    assert run.core.store.groups[1].members[0].segment == 0


def test_an_abort_is_counted_once_however_often_it_is_told_of():
    run = a_round()
    run.chunks(Row(rid(1, 0), 2, [7], finish="abort"))
    run.core.store.groups[1].members[0].parking = False  # the engine did it by itself
    for _ in range(2):
        run.interrupt(1, 0, 3)
    assert run.core.tallies.aborted == 1


def test_a_resting_trajectory_is_handed_to_the_next_incarnation_of_its_actor_in_the_next_round():
    run = a_round()
    run.interrupt(1, 0)
    assert not of_type(run.hello("actor", incarnation=2), m.Resume)
    run.told = 0
    orders = of_type(run.apply(0), m.Resume)
    assert sorted(keys(orders)) == [(1, 0, 1), (1, 1, 1)]


def test_a_resting_trajectory_may_run_into_its_groups_deadline():
    run = a_round(group_deadline_s=60.0)
    run.interrupt(1, 0)
    run.now += 100
    run.say("", Tick())
    assert run.core.ledger.dropped == {"deadline": 2}
    assert not of_type(run.apply(0), m.Resume)


def test_a_learner_that_restarts_in_the_middle_of_its_step_blocks_nobody():
    run = a_round()
    run.interrupt(1, 0)
    run.hello("learner", incarnation=2)
    (lease,) = of_type(run.request(0, history=1), m.Lease)
    assert lease.groups.tolist() == [0, 0]
    assert run.core.store.resuming.resting == 1
    assert keys(of_type(run.apply(0, history=1), m.Resume)) == [(1, 0, 1)]


def test_a_learner_that_commits_first_when_it_restarts_begins_a_round():
    run = a_round()
    run.interrupt(1, 0)
    run.hello("learner", incarnation=2)
    assert keys(of_type(run.commit(0, history=1), m.Resume)) == [(1, 0, 1)]
    actions = run.request(0, history=1)
    assert of_type(actions, m.Lease)[0].groups.tolist() == [0, 0]
    assert keys(of_type(actions, m.Park)) == [(1, 0, 1)], "1/1 was told before"


def test_a_round_of_which_too_little_is_ready_goes_on():
    run = a_round()
    run.interrupt(1, 0)
    run.interrupt(1, 1)
    run.apply(0)
    assert not of_type(run.request(1), m.Lease)
    for member, base in ((0, 2), (1, 0)):
        run.chunks(Row(rid(1, member, 1), 0, [8, 8], finish="stop"))
        run.close(1, member, base + 2, segment=1)
    assert run.core.steps.lease is not None
    assert run.core.store.group_counts[State.LEASED] == 1
