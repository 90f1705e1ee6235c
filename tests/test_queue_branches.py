"""Trajectories with a prompt of their own, and episodes of many trajectories.  A recount follows every event."""

import pytest
from queue_builders import Row, Run, make_core, of_type, rid
from queue_turns import a_turn, close_1, orders

from queues.ledger import State
from stream_rl import messages as m

# -- prompts of their own --------------------------------------------------------------------------------------


def test_members_of_a_group_without_a_prompt_bring_their_own():
    run = Run(make_core(min_tokens=2))
    run.open(0, prompt=())
    assert orders(run.append(0, 0, 0, [11, 12])) == [("Appended", 0, 0, 1)]
    assert orders(run.append(0, 1, 0, [13])) == [("Appended", 0, 1, 1)]
    run.chunks(Row(rid(0, 0, 1), 0, [5], finish="stop"), Row(rid(0, 1, 1), 0, [6], finish="stop"))
    run.close(0, 0, 1, segment=1)
    run.close(0, 1, 1, segment=1)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.token_ids.tolist() == [11, 12, 5, 13, 6]
    assert lease.sampled.tolist() == [0, 0, 1, 0, 1]
    assert run.core.store.groups[0].total_tokens == 5


def test_bringing_ones_prompt_is_no_turn_and_makes_no_room_for_more_groups():
    run = Run()
    for group in range(100):
        run.open(group, prompt=())
        run.append(group, 0, 0, [11])
        run.append(group, 1, 0, [11])
    assert run.core.store.admission.occupancy == 1.0
    a_turn(run, [5, 6], segment=1)
    run.append(0, 0, 2, [70], segment=1)
    assert run.core.store.admission.occupancy < 1.0


def test_an_own_prompt_is_resumed_as_the_prompt():
    run = Run()
    run.open(0, prompt=())
    run.append(0, 0, 0, [11, 12])
    first, second = of_type(run.hello("actor", incarnation=2), m.Resume)
    assert (first.prompt_ids.tolist(), first.token_ids.tolist(), first.segment) == ([11, 12], [], 2)
    assert not first.forked
    assert (second.prompt_ids.tolist(), second.token_ids.tolist(), second.segment) == ([], [], 1)
    run.told = 0
    assert orders(run.append(0, 1, 0, [13], segment=1)) == [("Appended", 0, 1, 2)]


def test_a_trajectory_that_never_had_a_prompt_is_dropped_by_that_name():
    run = Run()
    run.open(0, members=3, prompt=())
    run.close(0, 0, 0)
    run.chunks(Row(rid(0, 1), 0, [5], finish="stop"))
    run.close(0, 1, 1)
    a_turn(run, [5], member=2)
    run.append(0, 2, 1, [70])
    run.close(0, 2, 1, segment=1)
    assert run.core.ledger.dropped == {"no_prompt": 3}


# -- branches --------------------------------------------------------------------------------------------------


def forked(**queue: object) -> Run:
    """Episode 0 went on as trajectory 2; everything but trajectory 2 is closed."""
    run = Run(make_core(**queue))
    run.open(0)
    a_turn(run, [5, 6])
    assert not of_type(run.branch(0, 2, 0), m.Refused)
    run.close(0, 0, 2, reward=3.0)
    close_1(run)
    return run


def test_a_branch_is_a_trajectory_of_its_group_with_its_own_prompt():
    run = forked(min_tokens=2)
    assert run.core.store.groups[0].state is State.IN_FLIGHT
    assert run.core.ledger.admitted == 3
    a_turn(run, [7, 7, 7], member=2)
    run.close(0, 2, 3, reward=3.0)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.members.tolist() == [0, 1, 2]
    assert lease.episodes.tolist() == [0, 1, 0]
    assert lease.lengths.tolist() == [5, 7, 5]
    assert lease.token_ids[-5:].tolist() == [8, 9, 7, 7, 7]
    group = run.core.store.groups[0]
    assert (group.total_tokens, group.reward_mean, group.reward_range) == (17, 2.0, 2.0)


def test_a_branch_is_resumed_with_its_episode_and_its_prompt():
    run = forked()
    (order,) = of_type(run.hello("actor", incarnation=2), m.Resume)
    assert (order.member, order.episode, order.members, order.forked) == (2, 0, 3, True)
    assert order.prompt_ids.tolist() == [8, 9]


def test_branches_of_one_episode_are_nothing_to_compare():
    run = forked()
    a_turn(run, [7], member=2)
    run.close(0, 2, 1)
    assert run.core.store.groups[0].state is State.READY
    run = Run()
    run.open(0)
    run.branch(0, 2, 0)
    for member in (0, 2):
        a_turn(run, [5], member=member)
        run.close(0, member, 1)
    run.fail(0, 1)
    assert run.core.ledger.dropped == {"reward_error": 1, "too_few_members": 2}


def test_each_branch_stands_for_itself():
    run = forked(min_tokens=2)
    run.fail(0, 2, "environment_raised")
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.members.tolist() == [0, 1]
    run = forked(min_tokens=2)
    a_turn(run, [7], member=2)
    run.close(0, 2, 9)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.members.tolist() == [0, 1]


def test_an_episode_lives_on_in_a_branch_when_what_it_began_as_is_dropped():
    run = Run(make_core(min_tokens=2))
    run.open(0)
    run.branch(0, 2, 0)
    a_turn(run, [5], member=2)
    run.close(0, 2, 1)
    run.fail(0, 0)
    close_1(run)
    (lease,) = of_type(run.request(0), m.Lease)
    assert (lease.members.tolist(), lease.episodes.tolist()) == ([1, 2], [1, 0])


@pytest.mark.parametrize("over", ["ready", "dropped", "leased"])
def test_a_branch_that_comes_too_late_is_dropped_and_its_actor_told(over):
    run = Run(make_core(min_tokens=2))
    run.open(0)
    close_1(run)
    if over == "dropped":
        run.fail(0, 0)
    else:
        a_turn(run, [5])
        run.close(0, 0, 1)
    if over == "leased":
        run.request(0)
    assert orders(run.branch(0, 2, 0)) == [("Cancel", 0, 2, "group_over")]
    assert run.core.ledger.dropped["group_over"] == 1
    assert ("Cancel", 0, 2, "group_over") in orders(run.hello("actor"))
    run.fail(0, 2, "cancelled")
    if over == "leased":
        run.apply(0)
        run.commit(1)
