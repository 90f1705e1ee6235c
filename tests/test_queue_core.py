"""The queue's state machine, one behaviour a test.  `Run.say` recounts the books after every event."""

import pytest
from queue_builders import Row, Run, make_core, of_type, rid

from queues.ledger import State
from stream_rl import messages as m


def test_hello_is_welcomed_and_an_actor_admitted_up_to_the_limit():
    run = Run(make_core(over_provision=2.0, first_groups=3), joined=False)
    assert [type(message) for _, message in run.hello("engine")] == [m.Welcome]
    welcome, engines, admit = (message for _, message in run.hello("actor"))
    assert (welcome.admitted, engines.names) == ([], [])
    assert admit.groups == [0, 1, 2, 3, 4, 5]
    again = run.hello("actor")
    assert not of_type(again, m.Admit)
    assert of_type(again, m.Welcome)[0].admitted == [0, 1, 2, 3, 4, 5]


def test_old_incarnations_and_other_runs_are_refused():
    run = Run(joined=False)
    run.hello("engine", incarnation=3)
    (answer,) = run.hello("engine", incarnation=2)
    assert answer[0] == ""
    assert answer[1].reason == "fenced"
    assert run.hello("actor", run="another")[0][1].reason == "other_run"
    assert run.say("learner-0", m.StatusRequest())[0][1].reason == "not_registered"
    old = run.chunks(Row(rid(1), 0, [1]), incarnation=2)
    assert old[0][1].reason == "fenced"


def test_a_new_incarnation_of_an_engine_counts_its_messages_from_zero():
    run = Run()
    run.chunks()
    assert run.hello("engine")[0][1].next_sequence == 1
    assert run.hello("engine", incarnation=2)[0][1].next_sequence == 0


def test_a_group_is_ready_when_every_member_is_whole_in_any_order_of_arrival():
    run = Run()
    run.open(1, 2)
    run.close(1, 0, 3)
    run.chunks(Row(rid(1, 0), 0, [5, 6]), Row(rid(1, 1), 0, [9], finish="length"))
    run.close(1, 1, 1)
    assert run.core.ledger.trajectories[State.IN_FLIGHT] == 2
    run.chunks(Row(rid(1, 0), 2, [7], finish="stop"))
    assert run.core.ledger.trajectories[State.READY] == 2


def test_a_lease_carries_whole_groups_with_versions_and_ages():
    run = Run(make_core(min_tokens=5, max_token_age=1, first_groups=4))
    run.request(0)
    for step in range(2):
        run.grow(step, [3, 2], (0, step))
        run.apply(step)
        run.request(step + 1)
    run.open(2, 2)
    run.chunks(Row(rid(2, 0), 0, [5, 6, 7], [(0, 0), (0, 1), (0, 2)], "stop", [-0.1, -0.2, -0.3]))
    run.chunks(Row(rid(2, 1), 0, [8, 9, 8], [(0, 2)] * 3, "stop"))
    run.close(2, 0, 3, 0.25)
    ((to, lease),) = [a for a in run.close(2, 1, 3, 0.75) if isinstance(a[1], m.Lease)]
    assert to == "learner-0"
    assert lease.step == (0, 2)
    assert lease.lengths.tolist() == [6, 6]
    assert lease.token_ids.tolist() == [1, 2, 3, 5, 6, 7, 1, 2, 3, 8, 9, 8]
    assert lease.sampled.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert lease.ages.tolist() == [0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    assert lease.trainable.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert lease.logprobs[3:6].tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert lease.rewards.tolist() == [0.25, 0.75]
    assert lease.max_token_ages.tolist() == [1, 1]
    run.apply(2)
    assert run.core.summary()["token_age_max"] == 1
    assert run.core.summary()["masked_share"] == pytest.approx(1 / 16)


def test_a_bound_of_minus_one_masks_nothing():
    run = Run(make_core(min_tokens=4, max_token_age=-1, first_groups=8))
    for step in range(5):
        run.grow(step, [2, 2], (0, 0))
        (lease,) = of_type(run.request(step), m.Lease)
        assert lease.trainable.tolist() == lease.sampled.tolist()
        assert lease.ages.max() == step
        run.apply(step)


def test_a_repeated_request_gets_the_identical_lease():
    run = Run()
    run.grow(1, [4, 4])
    (first,) = of_type(run.request(0), m.Lease)
    run.grow(2, [4, 4])
    (again,) = of_type(run.request(0), m.Lease)
    assert again is first


def test_a_lease_takes_the_oldest_first_and_stops_before_max_tokens():
    run = Run(make_core(min_tokens=8, max_tokens=30, first_groups=8))
    for group in (5, 3, 4):
        run.grow(group, [4, 4])
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.groups.tolist() == [5, 5, 3, 3]
    run.apply(0)
    assert run.core.store.group_counts[State.READY] == 1


def test_a_group_larger_than_max_tokens_goes_alone():
    run = Run(make_core(min_tokens=4, max_tokens=10, first_groups=8))
    run.grow(1, [8, 8])
    run.grow(2, [2, 2])
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.groups.tolist() == [1, 1]


def test_below_min_tokens_a_lease_looks_past_a_group_that_does_not_fit():
    run = Run(make_core(min_tokens=8, max_tokens=24, first_groups=8))
    run.grow(1, [2, 2])
    run.grow(2, [8, 8])
    run.grow(3, [2, 2])
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.groups.tolist() == [1, 1, 3, 3]
    run.apply(0)
    (lease,) = of_type(run.request(1), m.Lease)
    assert lease.groups.tolist() == [2, 2]


def test_a_failed_member_leaves_and_its_group_goes_on():
    run = Run()
    run.open(1, 3)
    for member in (0, 1, 2):
        run.chunks(Row(rid(1, member), 0, [4] * 4, finish="stop"))
    run.close(1, 0, 4)
    run.fail(1, 2, "reward_timeout")
    run.close(1, 1, 4)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.members.tolist() == [0, 1]
    assert run.core.ledger.dropped == {"reward_timeout": 1}


def test_a_group_with_one_member_left_is_dropped_and_admission_goes_on():
    run = Run(make_core(first_groups=1, over_provision=1.0))
    run.open(0, 2)
    run.chunks(Row(rid(0, 0), 0, [4] * 4, finish="stop"))
    run.close(0, 0, 4)
    actions = run.fail(0, 1)
    assert run.core.ledger.dropped == {"reward_error": 1, "too_few_members": 1}
    assert of_type(actions, m.Admit)[0].groups == [1]


def test_an_abort_is_counted_unless_somebody_cancelled():
    run = Run()
    run.open(1, 3)
    run.chunks(Row(rid(1, 0), 0, [4], finish="abort"))
    run.interrupt(1, 0, 1)
    assert (run.core.ledger.dropped.total(), run.core.tallies.aborted) == (0, 1)
    run.fail(1, 1, "request_timeout")
    run.chunks(Row(rid(1, 1), 0, [4], finish="abort"))
    assert run.core.tallies.aborted == 1
    assert run.core.tallies.cancelled["request_timeout"] == 1


def test_an_abort_that_overtakes_the_cancelling_close_is_explained_by_it():
    run = Run()
    run.open(1, 3)
    run.chunks(Row(rid(1, 0), 0, [4], finish="abort"))
    run.fail(1, 0, "request_timeout")
    assert run.core.tallies.aborted == 0
    assert run.core.tallies.cancelled["request_timeout"] == 1


def test_an_abort_is_never_the_end_of_an_answer():
    run = Run()
    run.open(1, 3)
    run.chunks(Row(rid(1, 0), 0, [4], finish="abort"))
    run.close(1, 0, 1)
    assert (run.core.ledger.dropped["interrupted"], run.core.tallies.aborted) == (1, 1)


@pytest.mark.parametrize(
    ("num_sampled", "rows"),
    [
        (3, [Row(rid(1, 0), 0, [4, 4], finish="stop")]),
        (1, [Row(rid(1, 0), 0, [4, 4], finish="stop")]),
        (-1, [Row(rid(1, 0), 0, [], finish="stop")]),
    ],
)
@pytest.mark.parametrize("close_first", [True, False])
def test_a_trajectory_on_whose_length_the_sides_disagree_is_dropped(num_sampled, rows, close_first):
    run = Run()
    run.open(1, 3)
    if close_first:
        run.close(1, 0, num_sampled)
    for row in rows:
        run.chunks(row)
    if not close_first:
        run.close(1, 0, num_sampled)
    assert sum(run.core.ledger.dropped.values()) == 1
    assert set(run.core.ledger.dropped) <= {"count_mismatch", "broken_stream"}


def test_a_trajectory_with_a_hole_is_dropped_when_it_closes_and_does_not_block_its_group():
    run = Run()
    run.open(1, 3)
    for member in (1, 2):
        run.chunks(Row(rid(1, member), 0, [4] * 4, finish="stop"))
        run.close(1, member, 4)
    run.chunks(Row(rid(1, 0), 0, [4, -4]))
    (ack,) = of_type(run.chunks(Row(rid(1, 0), 2, [4, 4], finish="stop")), m.Ack)
    assert not ack.resend
    assert run.core.ledger.trajectories[State.READY] == 0
    run.close(1, 0, 4)
    assert run.core.ledger.dropped == {"broken_stream": 1}
    assert run.core.ledger.trajectories[State.READY] == 2


def test_a_gap_in_starts_is_refused_and_asked_for_again_once():
    run = Run()
    run.open(1, 2)
    (ack,) = of_type(run.chunks(Row(rid(1, 0), 2, [4, 4])), m.Ack)
    assert (ack.next_sequence, ack.resend) == (1, True)
    (ack,) = of_type(run.chunks(Row(rid(1, 0), 4, [4])), m.Ack)
    assert not ack.resend
    run.chunks(Row(rid(1, 0), 0, range(5), finish="stop"))
    run.close(1, 0, 5)
    assert run.core.store.groups[1].members[0].complete


def test_a_gap_in_sequences_is_asked_for_again_and_a_repeated_message_changes_nothing():
    run = Run()
    run.open(1, 2)
    (ack,) = of_type(run.chunks(Row(rid(1), 1, [4]), sequence=1), m.Ack)
    assert (ack.next_sequence, ack.resend) == (0, True)
    run.chunks(Row(rid(1), 0, [4]), sequence=0)
    (ack,) = of_type(run.chunks(Row(rid(1), 0, [4]), sequence=0), m.Ack)
    assert (ack.next_sequence, ack.resend) == (1, False)
    assert run.core.ledger.received == 1


def test_a_ready_group_in_which_nothing_may_train_is_dropped_when_a_lease_is_asked_for():
    run = Run(make_core(min_tokens=4, max_token_age=0, first_groups=8))
    run.grow(1, [2, 2])
    run.request(0)
    run.grow(2, [2, 2])
    run.apply(0)
    run.request(1)
    assert run.core.ledger.dropped == {"too_old": 2}
    run.grow(3, [0, 0])
    assert run.core.ledger.dropped["empty"] == 2


def test_versions_exist_from_the_applied_step_on():
    run = Run(make_core(min_tokens=4, first_groups=8))
    run.open(9, 2)
    run.chunks(Row(rid(9), 0, [4], [(0, 1)]))
    assert run.refused["unknown_version"] == 1
    run.grow(1, [2, 2])
    run.request(0)
    run.apply(0)
    run.chunks(Row(rid(9), 0, [4], [(0, 1)]))
    run.chunks(Row(rid(9), 1, [4], [(1, 0)]))
    run.chunks(Row(rid(9), 1, [4], [(0, -1)]))
    assert run.refused["unknown_version"] == 3
    assert run.core.ledger.received == 5


def test_steps_that_are_not_leased_are_refused_and_a_repeated_applied_is_answered():
    run = Run(make_core(min_tokens=4))
    assert run.apply(0)[0][1].reason == "not_leased"
    assert run.request(1)[0][1].reason == "wrong_step"
    run.grow(1, [2, 2])
    run.request(0)
    assert run.apply(0, outcome="perhaps")[0][1].reason == "bad_outcome"
    run.apply(0)
    ((to, answer),) = run.apply(0)
    assert (to, answer.what) == ("learner-0", "Applied")
    assert run.core.tallies.steps == 1
    assert run.commit(2)[0][1].reason == "unknown_version"


def test_committed_tokens_are_trained_or_masked_by_reason():
    run = Run(make_core(min_tokens=4, first_groups=8))
    for step, outcome in enumerate(("trained", "skipped")):
        run.grow(step, [2, 2])
        run.request(step)
        run.apply(step, outcome=outcome)
    run.commit(2)
    run.commit(2)
    assert run.core.ledger.trained == 4
    assert run.core.ledger.masked == {"skipped": 4, "too_old": 0}
    assert run.core.ledger.trajectories[State.COMMITTED] == 4
