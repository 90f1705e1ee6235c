"""Modes to compare with, in which a step has a batch of its own.  Every event is followed by a recount."""

import pytest
from queue_builders import Run, make_core, of_type

from stream_rl import messages as m
from stream_rl.types import Version


def a_run(mode: str, **queue: object) -> Run:
    run = Run(make_core(mode=mode, min_tokens=4, first_groups=2, **queue))
    live(run, 0)
    return run


def admitted(actions: object) -> list[list[int]]:
    return [message.groups for message in of_type(actions, m.Admit)]


def live(run: Run, step: int) -> list[tuple[str, object]]:
    report = dict.fromkeys(("update_bytes", "full_bytes", "changed", "elements"), 1)
    report |= dict.fromkeys(("encode_seconds", "send_seconds", "stage_seconds", "stall_seconds", "commit_seconds"), 0.1)
    return run.say(
        "publisher-0",
        m.VersionReport(
            engine="engine-0", version=Version(0, step), anchor=False, code="fast", weights_hash="a", hash_matches=True,
            **report,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["synchronous", "one_step_off"])
def test_a_step_waits_for_all_of_its_groups_and_takes_them_all(mode: str):
    run = a_run(mode, max_tokens=8)
    run.request(0)
    assert not of_type(run.grow(0, [3, 3]), m.Lease), "enough tokens, but not all groups"
    assert any("1 of its groups are ready, and all" in line for line in run.core.why())
    [lease] = of_type(run.grow(1, [3, 3]), m.Lease)
    assert lease.groups.tolist() == [0, 0, 1, 1], "more than max_tokens: the batch is whole"


def test_the_next_batch_begins_when_its_engines_hold_what_the_last_came_to():
    run = a_run("synchronous")
    run.grow(0, [3, 3])
    assert not admitted(run.request(0)) and not admitted(run.grow(1, [3, 3]))
    assert not admitted(run.apply(0))
    assert not admitted(run.request(1))
    assert [line.split(" to ")[0] for line in run.core.awaits()] == ["engine-0"]
    assert admitted(live(run, 1)) == [[2, 3]]


def test_one_step_off_begins_the_next_batch_when_the_lease_is_taken_and_no_further_one():
    run = a_run("one_step_off")
    run.grow(0, [3, 3])
    run.request(0)
    assert admitted(run.grow(1, [3, 3])) == [[2, 3]]
    run.grow(2, [3, 3])
    assert not admitted(run.grow(3, [3, 3])), "the batch that is ready has to be leased first"
    assert not admitted(run.apply(0))
    assert admitted(run.request(1)) == [[4, 5]]


def test_a_batch_that_is_dropped_whole_is_followed_by_another():
    run = a_run("synchronous", filter="equal_rewards")
    run.request(0)
    run.open(0, 2)
    run.fail(0, 0)
    assert not admitted(run.fail(0, 1))
    run.open(1, 2)
    run.fail(1, 0)
    assert admitted(run.fail(1, 1)) == [[2, 3]]
