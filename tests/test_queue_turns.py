"""Trajectories of many turns.  A recount follows every event."""

import numpy as np
import pytest
from queue_builders import Row, Run, make_core, of_type, rid
from queue_turns import a_turn, close_1, held, orders, two_turns

from queues.problems import MAX_MEMBERS, MAX_TOKENS
from stream_rl import messages as m

# -- turns -----------------------------------------------------------------------------------------------------


def test_what_the_environment_said_is_leased_between_what_was_sampled_and_never_trains():
    run = two_turns(min_tokens=4)
    run.chunks(Row(rid(0, 0, 1), 0, [7, 8, 9], [(0, 0)] * 3, "stop", [-1.0, -2.0, -3.0]))
    assert orders(run.append(0, 0, 5, [72], segment=1)) == [("Appended", 0, 0, 2)]
    run.chunks(Row(rid(0, 0, 2), 0, [3], [(0, 0)], "length", [-4.0]))
    run.close(0, 0, 6, segment=2)
    close_1(run)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.lengths.tolist() == [12, 7]
    assert lease.token_ids[:12].tolist() == [1, 2, 3, 5, 6, 70, 71, 7, 8, 9, 72, 3]
    assert lease.sampled[:12].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1]
    assert lease.trainable.tolist() == lease.sampled.tolist()
    assert lease.logprobs[:12].tolist() == [0, 0, 0, -0.25, -0.25, 0, 0, -1, -2, -3, 0, -4]
    assert lease.episodes.tolist() == lease.members.tolist() == [0, 1]
    assert run.core.ledger.received == 10


def test_ages_are_of_the_turns_that_sampled_the_tokens():
    run = two_turns(min_tokens=4, max_token_age=0)
    run.grow(1, [4, 4])
    run.request(0)
    run.apply(0)
    run.chunks(Row(rid(0, 0, 1), 0, [7, 8], [(0, 1)] * 2, "stop"))
    run.close(0, 0, 4, segment=1)
    run.chunks(Row(rid(0, 1), 0, [4, 4, 4], [(0, 1)] * 3, "stop"))
    run.close(0, 1, 3)
    (lease,) = of_type(run.request(1), m.Lease)
    assert lease.ages[:9].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert lease.trainable[:9].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_an_append_that_overtakes_its_segments_tokens_waits_for_them():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5]))
    assert orders(run.append(0, 0, 3, [70])) == []
    assert orders(run.chunks(Row(rid(0, 0), 1, [6]))) == []
    assert held(run) == [5, 6]
    assert orders(run.chunks(Row(rid(0, 0), 2, [7], finish="stop"))) == [("Appended", 0, 0, 1)]
    assert held(run) == [5, 6, 7, 70]


def test_an_append_is_acknowledged_before_its_segment_is_whole():
    run = Run()
    run.open(0)
    (ack,) = of_type(run.append(0, 0, 3, [70]), m.Ack)
    assert ack.next_sequence == run.told


def test_a_finish_is_awaited_even_when_all_tokens_are_here():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5, 6]))
    assert orders(run.append(0, 0, 2, [70])) == []
    assert orders(run.chunks(Row(rid(0, 0), 2, [], finish="stop"))) == [("Appended", 0, 0, 1)]


def test_rows_of_the_segment_before_are_void():
    run = two_turns()
    run.chunks(Row(rid(0, 0), 2, [9], finish="stop"))
    assert run.refused == {"old_segment": 1}
    assert held(run) == [5, 6, 70, 71]


@pytest.mark.parametrize(("count", "reason"), [(1, "count_mismatch"), (3, "count_mismatch")])
def test_a_wrong_count_drops_the_trajectory_and_tells_its_actor(count, reason):
    run = Run()
    run.open(0)
    a_turn(run, [5, 6])
    assert orders(run.append(0, 0, count, [70])) == [("Cancel", 0, 0, reason)]
    assert run.core.ledger.dropped == {reason: 1}
    assert ("Cancel", 0, 0, reason) in orders(run.hello("actor"))


def test_more_tokens_than_were_said_break_the_stream():
    run = Run()
    run.open(0)
    run.append(0, 0, 2, [70])
    assert orders(run.chunks(Row(rid(0, 0), 0, [5, 6, 7]))) == [("Cancel", 0, 0, "broken_stream")]


def test_a_hole_in_the_stream_drops_the_trajectory():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 2, [5], finish="stop"))
    assert orders(run.append(0, 0, 3, [70])) == [("Cancel", 0, 0, "broken_stream")]


def test_an_abort_is_never_the_end_of_a_turn():
    run = Run()
    run.open(0)
    run.append(0, 0, 2, [70])
    assert orders(run.chunks(Row(rid(0, 0), 0, [5, 6], finish="abort"))) == [("Cancel", 0, 0, "interrupted")]


def test_the_budget_counts_what_was_sampled_and_nothing_else():
    run = Run(make_core(max_new_tokens=4))
    run.open(0)
    a_turn(run, [5, 6])
    run.append(0, 0, 2, range(100, 120))
    run.chunks(Row(rid(0, 0, 1), 0, [7, 8, 9]))
    assert run.refused == {"too_long": 1}
    run.chunks(Row(rid(0, 0, 1), 0, [7, 8], finish="length"))
    run.append(0, 0, 4, [70], segment=1)
    (order,) = of_type(run.hello("actor", incarnation=2), m.Resume)[:1]
    assert (order.finish, len(order.token_ids)) == ("length", 25)


def test_an_episode_may_end_after_its_environment_spoke():
    run = two_turns(min_tokens=4)
    run.close(0, 0, 2, segment=1)
    close_1(run)
    (lease,) = of_type(run.request(0), m.Lease)
    assert lease.token_ids[:7].tolist() == [1, 2, 3, 5, 6, 70, 71]


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_close_that_crosses_with_the_answer_to_an_append_counts(status):
    run = two_turns()
    end = {"status": status, "reason": "deadline", "num_sampled": 2}
    assert not of_type(run.tell(m.CloseTrajectory, group=0, member=0, segment=0, **end), m.Refused)
    trajectory = run.core.store.groups[0].members[0]
    assert trajectory.complete if status == "done" else trajectory.reason == "deadline"


def test_a_close_takes_the_place_of_an_append_that_waits():
    run = Run()
    run.open(0)
    run.chunks(Row(rid(0, 0), 0, [5]))
    run.append(0, 0, 2, [70])
    run.close(0, 0, 2)
    assert orders(run.chunks(Row(rid(0, 0), 1, [6], finish="stop"))) == []
    assert run.core.store.groups[0].members[0].complete
    assert held(run) == [5, 6]


def test_a_close_of_an_old_segment_is_void_once_tokens_of_the_next_came():
    run = two_turns()
    run.chunks(Row(rid(0, 0, 1), 0, [7]))
    run.close(0, 0, 2)
    assert run.refused == {"old_segment": 1}


# -- to be seen -----------------------------------------------------------------------------------------------


def test_turns_and_what_waits_are_counted_and_shown():
    run = Run(make_core(min_tokens=2))
    run.open(0, prompt=())
    run.open(1)
    assert run.core.status().fields["queue.waiting_for_environment"] == 2
    run.append(0, 0, 0, [11, 12])
    a_turn(run, [5, 6], segment=1)
    status = run.core.status(why=True)
    assert status.fields["queue.waiting_for_environment"] == 2
    (line,) = [line for name, line in status.texts.items() if "queue.why" in name and "0/0" in line]
    assert "actor-0 to go on with trajectory 0/0 or to close it" in line
    run.append(0, 0, 2, [70], segment=1)
    run.branch(0, 2, 0)
    a_turn(run, [7, 7], member=2)
    run.close(0, 2, 2, reward=5.0)
    run.close(0, 0, 2, reward=5.0, segment=2)
    run.append(0, 1, 0, [13])
    a_turn(run, [7], member=1, segment=1)
    run.close(0, 1, 1, segment=1)
    run.request(0)
    (record,) = of_type(run.apply(0), m.StepRecord)
    assert record.fields["finished"] == 2, "an episode counts once"
    assert record.fields["reward_mean"] == 3.0
    assert record.fields["finished_turns_mean"] == 1.5
    assert record.fields["finished_tokens_mean"] == 2.5
    assert record.fields["lease_branches"] == 1
    summary = run.core.summary()
    assert (summary["turns"], summary["branches"], summary["appended_tokens"]) == (3, 1, 4)


def test_an_answer_of_one_turn_is_one_turn():
    run = Run(make_core(min_tokens=2))
    run.grow(0, [2, 3])
    assert run.core.summary()["turns"] == 2
    assert run.core.store.admission.occupancy == 1.0


# -- hostile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros(0, np.int32),
        np.array([3, -1], np.int32),
        np.zeros((2, 2), np.int32),
        np.zeros(MAX_TOKENS + 1, np.int32),
    ],
)
def test_tokens_that_are_none_are_refused(tokens):
    run = Run()
    run.open(0)
    run.tell(m.AppendTokens, group=0, member=0, segment=0, num_sampled=0, token_ids=tokens)
    run.tell(m.OpenBranch, group=0, member=2, episode=0, prompt_ids=tokens)
    assert run.refused == {"bad_tokens": 1, "bad_prompt": 1}
    assert run.core.ledger.admitted == 2


def test_a_trajectory_has_a_greatest_length():
    run = Run()
    run.open(0)
    tokens = np.zeros(MAX_TOKENS - 3, np.int32)
    assert orders(run.append(0, 0, 0, tokens)) == [("Appended", 0, 0, 1)]
    run.append(0, 0, 0, [1], segment=1)
    assert run.refused == {"too_long": 1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"group": 7}, "unknown_group"),
        ({"member": 3}, "unknown_member"),
        ({"member": 1}, "unknown_member"),
        ({"member": -1}, "unknown_member"),
        ({"episode": 2}, "unknown_episode"),
        ({"episode": -1}, "unknown_episode"),
        ({"prompt_ids": np.zeros(0, np.int32)}, "bad_prompt"),
    ],
)
def test_branches_that_cannot_be_are_refused(fields, reason):
    run = Run()
    run.open(0)
    good = {"group": 0, "member": 2, "episode": 0, "prompt_ids": np.ones(1, np.int32)}
    run.tell(m.OpenBranch, **(good | fields))
    assert run.refused == {reason: 1}
    run.tell(m.OpenBranch, **good)
    run.tell(m.OpenBranch, **(good | {"member": 3, "episode": 2}))
    assert run.refused.get("unknown_episode", 0) == 1 + (reason == "unknown_episode"), "a branch of a branch"


def test_a_group_has_a_greatest_number_of_branches():
    run = Run()
    run.open(0, MAX_MEMBERS)
    run.branch(0, MAX_MEMBERS, 0)
    assert run.refused == {"bad_members": 1}


def test_what_contradicts_an_append_is_refused():
    run = Run()
    run.open(0)
    run.append(0, 0, 2, [70])
    run.append(0, 0, 2, [71])
    run.interrupt(0, 0)
    run.append(0, 0, 2, [71], segment=1)
    run.interrupt(0, 1, 3)
    run.append(0, 1, 3, [71])
    assert run.refused == {"already_appended": 2, "unknown_segment": 1, "interrupted": 1}
    assert run.core.store.groups[0].members[0].appending == np.array([70], np.int32).tobytes()


def test_another_actor_appends_nothing_and_opens_no_branch():
    run = two_turns()
    run.hello("actor", 1)
    ids = np.ones(1, np.int32)
    run.say("actor-1", m.AppendTokens(sequence=0, group=0, member=0, segment=1, num_sampled=2, token_ids=ids))
    run.say("actor-1", m.OpenBranch(sequence=1, group=0, member=2, episode=0, prompt_ids=ids))
    assert run.refused == {"not_its_actor": 2}


def test_a_negative_count_of_sampled_tokens_drops_the_trajectory():
    run = Run()
    run.open(0)
    assert orders(run.append(0, 0, -1, [70])) == [("Cancel", 0, 0, "count_mismatch")]


def test_an_append_to_what_was_dropped_changes_nothing():
    run = Run()
    run.open(0, 3)
    a_turn(run, [5, 6])
    run.close(0, 1, -1)
    run.append(0, 1, 2, [70])
    assert run.refused == {"already_closed": 1}
    run.append(0, 0, 7, [70])
    assert orders(run.append(0, 0, 2, [70])) == []
    assert run.core.ledger.dropped == {"count_mismatch": 2}
