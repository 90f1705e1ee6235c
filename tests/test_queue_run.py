"""The queue from admission to the end of a run, one behaviour a test.  Every event is followed by a recount."""

import math

import numpy as np
import pytest
from queue_builders import Row, Run, make_core, of_type, rid

from queues.core import Gone, Tick
from queues.ledger import State
from stream_rl import messages as m
from stream_rl.types import Version


def test_admission_follows_the_tokens_of_completed_groups():
    run = Run(make_core(min_tokens=12, first_groups=2, over_provision=2.0))
    assert run.core.admitted == {"actor-0": [0, 1, 2, 3]}
    run.grow(0, [1, 1])
    assert run.core.store.admission.limit == 6, "one short group, the first to finish, is no reason to triple them"
    for _ in range(300):
        run.core.store.admission.completed(2)
    run.grow(1, [1, 1])
    assert run.core.store.outstanding + len(run.core.admitted["actor-0"]) == run.core.store.admission.limit == 12


def test_a_waiting_lease_is_never_starved_by_the_limit():
    run = Run(make_core(min_tokens=12, first_groups=1, over_provision=1.0))
    run.core.store.admission.tokens_per_group = 12.0
    run.request(0)
    for group in range(3):
        assert run.core.admitted["actor-0"] == [group]
        assert not of_type(run.grow(group, [1, 1]), m.Lease)
        run.core.store.admission.tokens_per_group = 100.0
    assert of_type(run.grow(3, [6, 6]), m.Lease)


def test_actors_get_different_groups_and_the_one_with_less_to_do_gets_more():
    run = Run(make_core(first_groups=4, over_provision=1.0))
    run.hello("actor", 1)
    assert run.core.admitted == {"actor-0": [0, 1, 2, 3], "actor-1": []}
    run.open(2)
    run.core.store.admission.tokens_per_group = 1.0
    run.request(0)
    assert run.core.admitted == {"actor-0": [0, 1, 3], "actor-1": [4, 5, 6, 7]}
    assert run.open(4)[0][1].reason == "not_admitted"


OPEN = {"group": 2, "task": "t", "members": 2, "prompt_ids": np.array([1], np.int32)}
CLOSE = {"group": 1, "member": 0, "status": "done"}
INTERRUPTED = {"group": 1, "member": 0, "segment": 0, "reason": "r"}
EVALUATED = {"label": "middle", "version": Version(0, 0), "rewards": np.array([1], np.float32)}


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (m.OpenGroup, OPEN | {"group": 1}, "not_admitted"),
        (m.OpenGroup, OPEN | {"group": -1}, "not_admitted"),
        (m.OpenGroup, OPEN | {"group": 10**6}, "not_admitted"),
        (m.OpenGroup, OPEN | {"members": 0}, "bad_members"),
        (m.OpenGroup, OPEN | {"members": 10**6}, "bad_members"),
        (m.OpenGroup, OPEN | {"prompt_ids": np.array([[1], [2]], np.int32)}, "bad_prompt"),
        (m.OpenGroup, OPEN | {"prompt_ids": np.array([-1], np.int32)}, "bad_prompt"),
        (m.OpenGroup, OPEN | {"task": "t" * 10**6}, "bad_task"),
        (m.CloseTrajectory, CLOSE | {"group": 9}, "unknown_group"),
        (m.CloseTrajectory, CLOSE | {"member": 2}, "unknown_member"),
        (m.CloseTrajectory, CLOSE | {"member": -1}, "unknown_member"),
        (m.CloseTrajectory, CLOSE | {"status": "maybe"}, "bad_status"),
        (m.CloseTrajectory, CLOSE | {"member": 1}, "already_closed"),
        (m.CloseTrajectory, CLOSE | {"segment": 1}, "unknown_segment"),
        (m.CloseTrajectory, CLOSE | {"segment": -1}, "old_segment"),
        (m.Interrupted, INTERRUPTED | {"group": 9}, "unknown_group"),
        (m.Interrupted, INTERRUPTED | {"member": 1}, "already_closed"),
        (m.Interrupted, INTERRUPTED | {"segment": 7}, "unknown_segment"),
        (m.Evaluated, EVALUATED, "bad_label"),
    ],
)
def test_what_an_actor_may_not_say_is_refused_by_name_and_yet_acknowledged(kind, fields, reason):
    run = Run()
    run.open(1, 2)
    run.close(1, 1, 0)
    refused, ack = run.tell(kind, **fields)
    assert (refused[0], refused[1].reason) == ("actor-0", reason)
    assert ack[1].next_sequence == 3, "it would be sent again for ever"
    assert run.core.durable
    assert run.core.ledger.admitted == 2


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (m.LeaseRequest(step=Version(0, 0)), "wrong_role"),
        (m.Welcome(run="r", next_sequence=0), "unexpected_message"),
    ],
)
def test_what_is_not_for_an_actor_to_say_is_refused(event, reason):
    run = Run()
    ((to, answer),) = run.say("actor-0", event)
    assert (to, answer.reason) == ("actor-0", reason)
    assert not run.core.durable


def test_what_an_actor_says_again_is_acknowledged_again_and_a_gap_asks_for_what_is_missing():
    run = Run()
    run.open(0, 2)
    fields = {"group": 0, "member": 0, "status": "failed", "reason": "reward_error"}
    ((_, ack),) = run.say("actor-0", m.CloseTrajectory(sequence=2, **fields))
    assert (ack.next_sequence, ack.resend) == (1, True)
    ((_, ack),) = run.say("actor-0", m.OpenGroup(sequence=0, **OPEN | {"group": 1}))
    assert (ack.next_sequence, ack.resend) == (1, False)
    assert run.core.ledger.admitted == 2
    assert run.core.ledger.dropped == {}


def test_another_actors_group_is_not_an_actors_to_close():
    run = Run()
    run.hello("actor", 1)
    run.open(0, 2)
    event = m.CloseTrajectory(sequence=0, group=0, member=0, status="done", num_sampled=0)
    assert run.say("actor-1", event)[0][1].reason == "not_its_actor"


def test_a_reward_that_is_no_number_costs_its_trajectory():
    run = Run()
    run.open(1, 3)
    run.close(1, 0, 0, math.nan)
    assert run.core.ledger.dropped == {"bad_reward": 1}
    assert run.core.tallies.windows[-1].finished == 0


def test_drain_waits_for_every_engine_and_cancels_what_is_in_flight():
    run = Run(make_core(min_tokens=4, first_groups=3))
    run.grow(1, [2, 2])
    run.request(0)
    run.apply(0)
    run.open(2, 2)
    run.chunks(Row(rid(2, 0), 0, [4]))
    run.say("engine-0", stats_of(0))
    final = Version(0, 1)
    actions = run.say("learner-0", m.LearnerDone(final=final, weights_hash="abc"))
    assert [type(message) for _, message in actions] == [m.Done]
    assert not run.say("engine-0", stats_of(0))
    actions = run.say("engine-0", stats_of(1))
    assert [type(message) for to, message in actions if to == "actor-0"] == [m.Cancel, m.Cancel, m.Drain]
    assert run.open(3)[0][1].reason == "not_admitted"
    assert of_type(run.hello("actor"), m.Drain), "it may not have heard"
    assert run.core.ledger.dropped == {"run_end": 2}
    assert run.core.tallies.cancelled == {"run_end": 2}
    run.chunks(Row(rid(2, 0), 1, [4], finish="abort"))
    assert run.core.tallies.aborted == 0
    assert not run.core.finished
    run.tell(m.Evaluated, label="last", version=final, rewards=np.array([1, 0], np.float32))
    verified = {"engine": "engine-0", "weights_hash": "abc", "expected": "abc"}
    run.say("publisher-0", m.EngineVerified(version=Version(0, 0), **verified))
    assert not run.core.finished, "a hash of an earlier version proves nothing about the last"
    run.say("publisher-0", m.EngineVerified(version=final, **verified))
    assert run.core.finished
    assert run.core.summary()["heldout_last"] == 0.5
    assert run.request(1)[0][1].reason == "run_ended"


def test_shutdown_closes_the_books_and_answers_status():
    run = Run(make_core(min_tokens=100, max_tokens=200, first_groups=4))
    run.grow(1, [2, 2])
    run.open(2, 2)
    run.chunks(Row(rid(2, 0), 0, [4]))
    actions = run.shutdown()
    assert {(c.group, c.member) for c in of_type(actions, m.Cancel)} == {(2, 0), (2, 1)}
    (status,) = of_type(actions, m.Status)
    assert status.fields["dropped.run_end"] == 4
    assert status.fields["cancelled.run_end"] == 2
    assert status.texts["conserved"] == "true"
    assert run.open(3)[0][1].reason == "not_admitted"
    run.chunks(Row(rid(2, 0), 1, [4], finish="abort"))
    assert run.core.tallies.aborted == 0


def stats_of(step: int) -> m.EngineStats:
    return m.EngineStats(engine="engine-0", incarnation=1, version=Version(0, step), counters={}, histograms={})


def test_observers_get_a_record_of_every_step_until_they_are_gone():
    run = Run(make_core(min_tokens=4))
    run.grow(1, [2, 2])
    run.request(0)
    (record,) = of_type(run.apply(0), m.StepRecord)
    assert record.step == (0, 0)
    assert record.fields["reward_mean"] == 0.5
    assert record.fields["learner.loss"] == 0.5
    run.say("", Gone("observer-0"))
    run.say("", Gone("actor-0"))
    assert "observer-0" not in run.core.registry.peers
    assert "actor-0" in run.core.registry.peers


def test_the_summary_says_what_engines_and_the_publisher_reported():
    run = Run(make_core(min_tokens=4, first_groups=40))
    for step in range(20):
        run.grow(step, [2, 2], (0, step))
        run.request(step)
        run.apply(step)
    counters = {"pauses": 0, "hook_cpu_seconds": 1, "scheduler_cpu_seconds": 50, "busy_seconds": 3, "wall_seconds": 4}
    histograms = {"decode_step_seconds": {"-160": 10}}
    for incarnation in (1, 2):
        run.hello("engine", incarnation=incarnation)
        stats = m.EngineStats(
            engine="engine-0", incarnation=incarnation, version=Version(0, 2), counters=counters, histograms=histograms
        )
        run.say("engine-0", stats)
    for number in range(1, 4):
        run.say("publisher-0", version_report(number))
    verified = m.EngineVerified(engine="engine-0", version=Version(0, 3), weights_hash="h", expected="h")
    run.say("publisher-0", verified)
    summary = run.core.summary()
    expected = {
        "steps": 20,
        "versions": 3,
        "trained_tokens": 80,
        "delta_bytes": 20,
        "full_bytes": 200,
        "update_stall_ms_p99": 3.0,
        "plugin_cpu_share": 0.02,
        "engine_busy": 0.75,
        "learner_busy": 0.5,
        "weights_hash_engine": "h",
        "reward_first": 0.5,
        "reward_last": 0.5,
        "streamed_before_end": 0.0,
        "hash_mismatches": 0,
        "conserved": True,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary["decode_step_ms_p50"] == pytest.approx(1000 * 2 ** (-159.5 / 16))


def version_report(number: int) -> m.VersionReport:
    return m.VersionReport(
        engine="engine-0",
        version=Version(0, number),
        anchor=number == 1,
        update_bytes=10,
        full_bytes=100,
        changed=1,
        elements=2,
        code="fast",
        encode_seconds=0.0,
        send_seconds=0.0,
        stage_seconds=0.0,
        stall_seconds=number / 1000,
        commit_seconds=0.0,
        weights_hash="h",
        hash_matches=True,
    )


@pytest.mark.parametrize(
    ("counters", "histograms"),
    [
        ({"pauses": math.nan}, {}),
        ({}, {"decode_step_seconds": {"soon": 1}}),
        ({}, {"decode_step_seconds": {"1": -1}}),
        ({str(i): 1.0 for i in range(1000)}, {}),
    ],
)
def test_statistics_that_cannot_be_summed_are_refused(counters, histograms):
    run = Run()
    stats = m.EngineStats(
        engine="engine-0", incarnation=1, version=Version(0, 0), counters=counters, histograms=histograms
    )
    assert run.say("engine-0", stats)[0][1].reason == "bad_stats"
    run.say("", Tick())


def test_reasons_from_outside_are_bounded():
    run = Run(make_core(first_groups=200, over_provision=1.0))
    run.open(1, 300)
    for member in range(300):
        run.fail(1, member, f"reason.{member}")
    assert len(run.core.ledger.dropped) <= 66
    assert not any("." in reason for reason in run.core.ledger.dropped)


def test_memory_is_bounded_by_forgetting_old_groups():
    run = Run(make_core(min_tokens=4, keep_retired=3, first_groups=9))
    for step in range(12):
        run.grow(step, [2, 2], (0, step))
        run.request(step)
        run.apply(step)
        run.commit(step + 1)
    remembered, kept = [8, 9, 10], 11  # the newest checkpoint may be unreadable
    assert list(run.core.store.groups) == [*remembered, kept]
    assert len(run.core.store.assembly.by_rid) == 8
    for group in remembered:
        held = run.core.store.groups[group]
        assert (held.prompt.size, held.problem, held.versions) == (0, b"", {})
        assert not any(t.ids or t.logprobs or t.spans for t in held.members)
    assert run.core.ledger.trajectories[State.COMMITTED] == 24


@pytest.mark.parametrize("side", ["admitted", "received"])
def test_broken_books_are_reported_with_both_sides(side):
    run = Run()
    run.grow(1, [2, 2])
    setattr(run.core.ledger, side, 3)
    with pytest.raises(AssertionError, match=f"{side} 3 !="):
        run.core.check()
    assert run.core.summary()["conserved"] is False


def test_a_wrong_count_that_keeps_the_sums_is_found_by_the_recount():
    run = Run()
    run.grow(1, [2, 2])
    run.core.ledger.tokens[State.READY] -= 1
    run.core.ledger.tokens[State.IN_FLIGHT] += 1
    run.core.check()
    with pytest.raises(AssertionError, match="counted"):
        run.core.recount()
