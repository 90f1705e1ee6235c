"""Leases, steps, checkpoints and histories: a learner that restarts.  Every event is followed by a recount."""

import numpy as np
import pytest
from queue_builders import Row, Run, make_core, of_type, rid

from queues.ledger import State
from queues.records import Ended, Step
from queues.versions import Histories
from stream_rl import messages as m
from stream_rl.types import Version


def trained(steps: int, run: Run | None = None, **queue: object) -> Run:
    """A run in which each step trained one group, of its own number, sampled at that step."""
    run = run or Run(make_core(**{"min_tokens": 4, "first_groups": 9, "max_token_age": -1} | queue))
    for step in range(steps):
        run.grow(step, [2, 3], (0, step))
        run.request(step)
        run.apply(step)
    return run


def groups_of(actions: list[tuple[str, object]]) -> list[list[int]]:
    return [list(dict.fromkeys(lease.groups.tolist())) for lease in of_type(actions, m.Lease)]


def retrain(run: Run, history: int, steps: range) -> list[list[int]]:
    """The groups of each lease that the learner of `history` gets for `steps`."""
    leased = []
    for step in steps:
        leased += groups_of(run.request(step, history))
        run.apply(step, history)
    return leased


# -- a learner goes back to its checkpoint ---------------------------------------------------------------------


def test_a_restarted_learner_gets_the_steps_after_its_checkpoint_again_in_order():
    run = trained(4)
    run.commit(1)
    run.hello("learner", incarnation=2)
    assert retrain(run, 1, range(1, 4)) == [[1], [2], [3]]
    assert run.core.ledger.dropped == {}
    assert run.core.histories.last == Version(1, 4)
    run.commit(4, history=1)
    assert run.core.ledger.trajectories[State.COMMITTED] == 8
    assert run.core.ledger.trained == 20


def test_a_lease_comes_again_in_the_same_composition_whatever_else_is_ready():
    run = Run(make_core(min_tokens=12, max_tokens=40, first_groups=9))
    for group in range(3):
        run.grow(group, [2, 2])
    run.request(0)
    run.apply(0)
    for group in range(3, 6):
        run.grow(group, [8, 8])
    run.hello("learner", incarnation=2)
    (lease,) = of_type(run.request(0, history=1), m.Lease)
    assert lease.groups.tolist() == [0, 0, 1, 1, 2, 2]
    run.apply(0, history=1)
    assert groups_of(run.request(1, history=1)) == [[3]]


def test_a_lease_that_was_out_comes_again_after_those_that_were_applied():
    run = trained(2)
    run.grow(2, [2, 2], (0, 2))
    assert groups_of(run.request(2)) == [[2]]
    run.hello("learner", incarnation=2)
    assert retrain(run, 1, range(3)) == [[0], [1], [2]]


def test_a_second_restart_during_the_repetition_keeps_the_order():
    run = trained(4)
    run.commit(1)
    assert retrain(run, 1, range(1, 2)) == [[1]]
    assert groups_of(run.request(2, 1)) == [[2]]
    assert len(run.core.steps.again) == 1
    assert retrain(run, 2, range(1, 4)) == [[1], [2], [3]]
    run.commit(2, history=2)
    assert retrain(run, 3, range(2, 4)) == [[2], [3]]
    assert run.core.tallies.forked_steps == 3 + 1 + 2


def test_tokens_sampled_after_the_fork_count_as_sampled_at_the_fork():
    run = trained(3, max_token_age=2)
    run.commit(1)
    (lease,) = of_type(run.request(1, history=1), m.Lease)
    assert (lease.steps.max(), lease.ages.max()) == (1, 0)
    run.apply(1, history=1)
    (lease,) = of_type(run.request(2, history=1), m.Lease)
    assert lease.steps[lease.sampled == 1].tolist() == [2] * 5
    assert lease.ages[lease.sampled == 1].tolist() == [1] * 5, "history 1 left history 0 at step 1"


def test_a_lease_that_has_grown_too_old_is_dropped_by_reason_and_the_next_serves_the_step():
    run = trained(4, max_token_age=1)
    run.commit(1)
    run.grow(7, [4, 4], (0, 4))
    assert retrain(run, 1, range(1, 3)) == [[1], [2]]
    assert groups_of(run.request(3, 1)) == []
    assert run.core.ledger.dropped == {"too_old": 4}, "3 and 7 were sampled at the fork, two steps ago"
    run.grow(8, [4, 4], (1, 3))
    assert run.core.steps.lease is not None
    assert list(run.core.steps.again) == []


def test_a_lease_of_which_a_part_may_train_is_not_taken_apart():
    run = trained(2, max_token_age=0, max_token_age_of={"slow": -1}, min_tokens=5)
    run.tell(m.OpenGroup, group=2, task="slow", members=1, prompt_ids=np.array([1], np.int32))
    run.chunks(Row(rid(2), 0, [7, 8], [(0, 2)] * 2, "stop"))
    run.close(2, 0, 2)
    run.grow(3, [2, 2], (0, 2))
    run.request(2)
    run.apply(2)
    run.commit(1)
    assert retrain(run, 1, range(1, 2)) == [[1]]
    (lease,) = of_type(run.request(2, history=1), m.Lease)
    assert lease.groups.tolist() == [2, 3, 3]
    assert lease.ages[lease.sampled == 1].tolist() == [1] * 6
    assert lease.trainable.sum() == 2
    run.apply(2, history=1)
    run.commit(3, history=1)
    assert run.core.ledger.masked["too_old"] == 4


def test_the_older_of_two_checkpoints_can_be_gone_back_to():
    run = trained(6)
    run.commit(2)
    run.commit(4)
    assert run.core.ledger.trained == 20
    assert run.request(1, history=1)[0][1].reason == "wrong_step"
    assert retrain(run, 1, range(2, 6)) == [[2], [3], [4], [5]]
    assert run.core.ledger.trained == 10, "2 and 3 are in no checkpoint that can be read"
    run.commit(6, history=1)
    assert run.core.ledger.trained == 30
    assert run.core.ledger.trajectories[State.COMMITTED] == 12


def test_a_checkpoint_counts_again_after_it_was_lost():
    run = trained(4)
    run.commit(2)
    run.commit(4)
    retrain(run, 1, range(2, 4))
    run.commit(4, history=1)
    assert (run.core.steps.checkpoint, run.core.ledger.trained) == (4, 20)
    assert not run.core.steps.applied


def test_each_history_is_left_where_the_surviving_line_left_it_first():
    histories = Histories()
    for step in range(1, 7):
        histories.publish(Version(0, step))
    histories.open(1, 4)
    histories.publish(Version(1, 5))
    histories.open(4, 5)
    assert [histories.effective_step(0, step) for step in (3, 4, 6)] == [3, 4, 4]
    assert [histories.effective_step(1, step) for step in (4, 5)] == [4, 5]
    histories.open(5, 2)
    assert [histories.effective_step(h, 5) for h in (0, 1, 4)] == [2, 2, 2]
    assert not histories.knows(Version(2, 0)) and not histories.knows(Version(0, 7))
    assert histories.knows(Version(0, 6)) and histories.last == Version(5, 2)


def test_before_the_second_checkpoint_the_start_can_be_gone_back_to():
    run = trained(3)
    run.commit(2)
    assert retrain(run, 1, range(3)) == [[0], [1], [2]]


def test_a_step_beyond_the_last_two_checkpoints_is_forgotten():
    run = trained(6)
    for step in (2, 4, 6):
        run.commit(step)
    assert all(t.received and not t.ids for g in (0, 1) for t in run.core.store.groups[g].members)
    assert run.request(3, history=1)[0][1].reason == "wrong_step"
    assert run.core.histories.current == 0
    assert retrain(run, 1, range(4, 6)) == [[4], [5]]


def test_a_checkpoint_that_is_said_again_releases_nothing():
    run = trained(4)
    run.commit(2)
    for _ in range(3):
        assert [message.what for message in of_type(run.commit(2), m.Done)] == ["Committed"]
        assert [message.what for message in of_type(run.commit(1), m.Done)] == ["Committed"]
    assert retrain(run, 1, range(4)) == [[0], [1], [2], [3]]


def test_a_checkpoint_of_a_new_history_opens_it():
    run = trained(4)
    run.commit(1)
    run.hello("learner", incarnation=2)
    assert of_type(run.commit(2, history=1), m.Done)
    assert run.core.histories.last == Version(1, 2)
    assert run.core.steps.checkpoint == 2, "the former learner died between writing it and saying so"
    assert run.core.ledger.trained == 10
    assert retrain(run, 1, range(2, 4)) == [[2], [3]]
    assert run.commit(2)[0][1].reason == "unknown_version"


def test_the_books_of_a_checkpoint_that_was_lost_are_undone():
    run = trained(3)
    run.commit(3)
    books = run.core.ledger
    assert (books.trained, books.trajectories[State.COMMITTED]) == (15, 6)
    run.request(1, history=1)
    assert (books.trained, books.trajectories[State.COMMITTED]) == (5, 2)
    assert (books.trajectories[State.APPLIED], books.trajectories[State.LEASED], len(run.core.steps.again)) == (0, 2, 1)


@pytest.mark.parametrize(
    ("history", "step"), [(0, 3), (0, 1), (1, 3), (1, -1), (-1, 2), (1 << 31, 2), (1 << 62, 0), (1, 1 << 62)]
)
def test_a_step_that_cannot_be_next_is_refused_and_changes_nothing(history, step):
    run = trained(2)
    run.commit(1)
    run.commit(2)
    before = run.core.histories.last
    assert run.request(step, history)[0][1].reason == "wrong_step"
    assert not run.core.durable
    assert (run.core.histories.last, run.core.steps.waiting) == (before, None)


def test_a_former_learner_that_still_speaks_is_refused():
    run = trained(2)
    run.request(1, history=1)
    assert run.apply(2)[0][1].reason == "not_leased"
    assert run.commit(2)[0][1].reason == "unknown_version"
    assert run.request(2)[0][1].reason == "wrong_step"
    assert run.core.histories.last == Version(1, 1)


def test_the_journal_tells_of_each_trajectory_which_step_holds_it():
    run = trained(2)
    run.hello("learner", incarnation=2)
    records = [message for to, message in run.request(1, history=1) if to == "journal"]
    assert records == [Ended(1, 0, "forked", history=0, step=1), Ended(1, 1, "forked", history=0, step=1)]
    records = [message for to, message in run.apply(1, history=1, outcome="skipped") if to == "journal"]
    assert records == [
        Step(1, 1, "skipped", (1, 1), (0, 1)),
        Ended(1, 0, "applied", history=1, step=1),
        Ended(1, 1, "applied", history=1, step=1),
    ]


def test_a_skipped_step_is_settled():
    run = trained(1)
    run.grow(1, [2, 2], (0, 1))
    run.request(1)
    run.apply(1, outcome="skipped")
    run.commit(2)
    assert run.core.ledger.masked == {"too_old": 0, "skipped": 4}
    assert groups_of(run.request(2)) == []


def test_a_learner_that_was_done_may_come_back():
    run = trained(2)
    run.say("learner-0", m.LearnerDone(final=Version(0, 2), weights_hash="h"))
    run.hello("learner", incarnation=2)
    assert of_type(run.commit(2, history=1), m.Done)
    assert run.core.tallies.learner_done is None
    done = m.LearnerDone(final=Version(1, 2), weights_hash="h")
    assert of_type(run.say("learner-0", done), m.Done)
    assert of_type(run.say("learner-0", done), m.Done), "said again"
    assert run.say("learner-0", m.LearnerDone(final=Version(0, 2), weights_hash="h"))[0][1].reason == "unknown_version"


# -- what may train --------------------------------------------------------------------------------------------


def test_the_bound_may_differ_by_task():
    run = Run(make_core(min_tokens=4, first_groups=9, max_token_age=0, max_token_age_of={"slow": -1, "old": 1}))
    trained(2, run)
    for group, task in ((4, "slow"), (5, "old"), (6, "t")):
        run.tell(m.OpenGroup, group=group, task=task, members=2, prompt_ids=np.array([1], np.int32))
        for member in range(2):
            run.chunks(Row(rid(group, member), 0, [7, 8, 9], [(0, 0), (0, 1), (0, 2)], "stop"))
            run.close(group, member, 3)
    (lease,) = of_type(run.request(2), m.Lease)
    assert lease.groups.tolist() == [4, 4, 5, 5, 6, 6]
    assert lease.max_token_ages.tolist() == [-1, -1, 1, 1, 0, 0]
    assert lease.trainable.tolist() == [0, 1, 1, 1] * 2 + [0, 0, 1, 1] * 2 + [0, 0, 0, 1] * 2


def test_groups_that_have_nothing_to_compare_are_filtered_and_make_room():
    run = Run(make_core(filter="equal_rewards", first_groups=1, over_provision=1.0, min_tokens=4))
    run.open(0)
    for member in range(2):
        run.chunks(Row(rid(0, member), 0, [7, 8], finish="stop"))
        actions = run.close(0, member, 2, reward=0.5)
    assert run.core.ledger.dropped == {"equal_rewards": 2}
    assert [admit.groups for admit in of_type(actions, m.Admit)] == [[1]]
    run.grow(1, [2, 2])
    assert run.core.store.group_counts[State.READY] == 1
    assert run.core.tallies.windows[-1].finished == 4, "before any filter"


def test_a_group_is_filtered_by_its_survivors():
    run = Run(make_core(filter="equal_rewards"))
    run.open(0, 3)
    for member, reward in enumerate((0.5, 0.5, 1.0)):
        run.chunks(Row(rid(0, member), 0, [7, 8], finish="stop"))
        run.close(0, member, 3 if reward == 1.0 else 2, reward=reward)
    assert run.core.ledger.dropped == {"count_mismatch": 1, "equal_rewards": 2}


# -- what is counted -------------------------------------------------------------------------------------------


def test_the_masked_share_is_told_by_length():
    run = Run(make_core(min_tokens=4, max_tokens=1000, first_groups=40, max_token_age=0, max_new_tokens=64))
    for step in range(2):
        run.grow(step, [2, 2], (0, step))
        run.request(step)
        run.apply(step)
    run.open(2, 16)
    for member in range(16):
        old = member // 2  # of these trajectories' member + 3 tokens
        versions = [(0, 1)] * old + [(0, 2)] * (3 + member - old)
        run.chunks(Row(rid(2, member), 0, range(3 + member), versions, "stop"))
        run.close(2, member, 3 + member, float(member))
    run.request(2)
    run.apply(2)
    lengths = sorted([(2, 0)] * 4 + [(3 + n, n // 2) for n in range(16)])
    expected = {}
    for i in range(10):
        pair = lengths[2 * i : 2 * i + 2]
        expected[f"d{i + 1}"] = round(sum(masked for _, masked in pair) / sum(length for length, _ in pair), 6)
    summary = run.core.summary()
    assert summary["masked_by_length"] == expected
    assert expected["d1"] == 0 < expected["d10"]
    assert summary["wholly_masked"] == 0
    assert summary["masked_share"] == pytest.approx(
        sum(n // 2 for n in range(16)) / (8 + sum(3 + n for n in range(16)))
    )


def test_length_bias_compares_what_was_trained_with_all_that_ended():
    run = Run(make_core(min_tokens=4, first_groups=9))
    run.grow(0, [2, 4])
    run.open(1, 3)
    for member, length in enumerate((10, 3, 3)):
        run.chunks(Row(rid(1, member), 0, range(length), finish="stop"))
    run.fail(1, 0)
    run.close(1, 1, 3)
    run.close(1, 2, 3)
    run.open(2, 2)
    run.chunks(Row(rid(2, 0), 0, range(16)))
    run.request(0)
    run.apply(0)
    assert run.core.summary()["length_bias"] == pytest.approx((12 / 4) / (22 / 5))
    run.shutdown()
    assert run.core.summary()["length_bias"] == pytest.approx((12 / 4) / (22 / 5)), "the end of a run is no bias"


def test_what_a_fork_takes_back_was_never_counted():
    run = trained(2, max_token_age=-1)
    before = tallied(run)
    for step, outcome in ((2, "trained"), (3, "skipped")):
        run.grow(step, [2, 3, 4], (0, 0))
        run.request(step)
        run.apply(step, outcome=outcome)
    assert run.core.summary()["token_age_max"] == 2
    run.request(2, history=1)
    assert tallied(run) == before
    assert run.core.tallies.forked_steps == 2
    run.apply(2, history=1)
    run.request(3, history=1)
    run.apply(3, history=1)
    assert run.core.tallies.task("t").applied == 4


def tallied(run: Run) -> dict[str, object]:
    tallies, summary = run.core.tallies, run.core.summary()
    names = ("steps", "skipped_steps", "trained_tokens", "masked_share", "token_age_mean", "token_age_max")
    lengths = {"lengths": tallies.lengths.tolist(), "too_old": tallies.too_old.tolist()}
    return {name: summary[name] for name in names} | lengths | {"applied": tallies.task("t").applied}
