"""Chunk messages against everything that a broken or hostile engine can put into them."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queue_builders import Row, Run, make_chunks, make_core, of_type, rid

from stream_rl import messages as m

NAN, INF = float("nan"), float("inf")


def a_run() -> Run:
    """Trajectory 1/0 holds the tokens 5 6, 1/1 is finished after one token."""
    run = Run()
    run.open(1, 2)
    run.chunks(Row(rid(1, 0), 0, [5, 6]), Row(rid(1, 1), 0, [9], finish="stop"))
    return run


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(rid(1, 0), 2, [7], logprobs=[NAN]), "bad_logprob"),
        (Row(rid(1, 0), 2, [7], logprobs=[-INF]), "bad_logprob"),
        (Row(rid(1, 0), 2, [7], logprobs=[0.01]), "bad_logprob"),
        (Row(rid(1, 0), 2, [-7]), "bad_token"),
        (Row(rid(1, 0), -1, [7, 8, 9, 10]), "bad_start"),
        (Row(rid(1, 0), 3, [7]), "gap"),
        (Row(rid(1, 0), 1 << 60, [7]), "gap"),
        (Row(rid(1, 0), 2, [7], finish="bored"), "bad_finish"),
        (Row(rid(1, 0), 0, [5], finish="stop"), "short_finish"),
        (Row(rid(1, 0), 2, [7] * 15), "too_long"),
        (Row(rid(1, 0), 2, [7], [(0, 1)]), "unknown_version"),
        (Row(rid(1, 0), 2, [7], [(3, 0)]), "unknown_version"),
        (Row(rid(1, 0), 2, [7], [(-1, -1)]), "unknown_version"),
        (Row(rid(1, 1), 1, [7]), "after_finish"),
        (Row(rid(1, 0), 0, [5, 6]), "duplicate"),
        (Row(rid(1, 1), 0, [9], finish="stop"), "duplicate"),
        (Row(rid(2, 0), 0, [7]), "unknown_rid"),
        (Row("x/1/0/0.", 0, [7]), "other_run"),
        (Row("r/1/0", 0, [7]), "bad_rid"),
        (Row("", 0, [7]), "bad_rid"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_reason_and_its_neighbours_are_taken(row, reason):
    run = a_run()
    run.open(3, 2)
    before = dict(run.refused)
    (ack,) = of_type(run.chunks(Row(rid(3, 0), 0, [1]), row, Row(rid(3, 1), 0, [2])), m.Ack)
    assert run.refused == before | {reason: 1}
    assert ack.next_sequence == 2
    assert run.core.ledger.received == 5
    good = Row(rid(1, 0), 2, [7], finish="stop")
    run.chunks(good)
    assert run.core.store.groups[1].members[0].received == 3


def test_another_engine_cannot_continue_a_trajectory():
    run = a_run()
    run.hello("engine", 1)
    run.say("engine-1", make_chunks([Row(rid(1, 0), 2, [7])], engine="engine-1"))
    assert run.refused == {"not_its_engine": 1}
    run.say("engine-1", make_chunks([Row(rid(1, 0), 2, [7])], sequence=2))
    assert run.refused["not_registered"] == 1


def test_rows_of_a_dropped_trajectory_are_counted_and_left_alone():
    run = a_run()
    run.fail(1, 0)
    run.chunks(Row(rid(1, 0), 2, [7]))
    assert run.refused == {"after_drop": 1}


def test_tokens_beyond_what_the_close_said_are_refused():
    run = a_run()
    run.close(1, 0, 2)
    run.chunks(Row(rid(1, 0), 2, [7]))
    assert run.refused == {"after_close": 1}


def test_an_overlapping_row_brings_only_what_is_new():
    run = a_run()
    run.chunks(Row(rid(1, 0), 1, [6, 7, 8], [(0, 0)] * 3, finish="stop", logprobs=[-9, -1, -2]))
    held = run.core.store.groups[1].members[0]
    assert np.frombuffer(held.ids, np.int32).tolist() == [5, 6, 7, 8]
    assert np.frombuffer(held.logprobs, np.float32).tolist() == [-0.5, -0.5, -1, -2]
    assert held.spans == [(0, 0, 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"finishes": []},
        {"starts": np.array([2, 3], np.int64)},
        {"starts": np.array([[2]], np.int64)},
        {"counts": np.array([], np.int32)},
        {"counts": np.array([2], np.int32)},
        {"counts": np.array([-1], np.int32)},
        {"token_ids": np.array([], np.int32)},
        {"token_ids": np.array([[7]], np.int32)},
        {"token_ids": np.zeros(10**6, np.int32)},
        {"logprobs": np.array([-1, -1], np.float32)},
        {"logprobs": np.array([[-1]], np.float32)},
        {"spans": np.zeros((1, 3), np.int64)},
        {"spans": np.zeros(4, np.int64)},
        {"spans": np.array([[1, 0, 0, 1]], np.int64)},
        {"spans": np.array([[-1, 0, 0, 1]], np.int64)},
        {"spans": np.array([[0, 0, 0, 0], [0, 0, 0, 1]], np.int64)},
        {"spans": np.array([[0, 0, 0, 1 << 62]], np.int64)},
    ],
)
def test_columns_that_do_not_fit_are_refused_as_a_whole(changes):
    run = a_run()
    (ack,) = of_type(run.chunks(Row(rid(1, 0), 2, [7]), **changes), m.Ack)
    assert run.refused == {"bad_columns": 1}
    assert (run.core.ledger.received, ack.next_sequence) == (3, 2)


@pytest.mark.parametrize("spans", [[], [[0, 0, 0, 2]], [[0, 0, 0, 1], [0, 0, 0, 1]]])
def test_spans_that_do_not_cover_their_row_refuse_the_row(spans):
    run = a_run()
    rows = [Row(rid(1, 0), 2, [7]), Row("r/9/9/0.", 0, [1, 1, 1])]
    run.chunks(*rows, spans=np.array([*spans, [1, 0, 0, 3]], np.int64))
    assert run.refused == {"bad_spans": 1, "unknown_rid": 1}


numbers = st.integers(-3, 20) | st.sampled_from([1 << 31, -(1 << 31), 1 << 62, -(1 << 63)])


def array_of(dtype: type, values: st.SearchStrategy[object]) -> st.SearchStrategy[np.ndarray]:
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None

    def make(numbers: list[object]) -> np.ndarray:
        if limits is not None:
            numbers = [min(max(n, limits.min), limits.max) for n in numbers]
        return np.array(numbers, dtype)

    return st.lists(values, max_size=6).map(make)


@settings(max_examples=300, deadline=None)
@given(
    rids=st.lists(st.sampled_from([rid(1, 0), rid(1, 1), rid(2, 0), "r/1", "x/1/0/0.", "\x00", "r/1/0/0"]), max_size=4),
    finishes=st.lists(st.sampled_from(["", "stop", "length", "abort", "?"]), max_size=4),
    starts=array_of(np.int64, numbers),
    counts=array_of(np.int32, numbers),
    token_ids=array_of(np.int32, numbers),
    logprobs=array_of(np.float32, st.sampled_from([-0.5, 0.0, NAN, INF, -INF, 1.0])),
    spans=st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=4),
    sequence=numbers,
    incarnation=numbers,
)
def test_no_columns_whatever_break_the_queue(spans, sequence, incarnation, **columns):
    run = a_run()
    spans = np.array(spans, np.int64).reshape(-1, 4)
    for number, kept in ((sequence, incarnation), (run.core.registry.peers["engine-0"].next_sequence, 1)):
        run.say("engine-0", make_chunks([], sequence=number, incarnation=kept, spans=spans, **columns))
    expected = run.core.store.groups[1].members[1]
    assert np.frombuffer(expected.ids, np.int32)[:1].tolist() in ([9], [])
    run.chunks(Row(rid(1, 0), 0, [5, 6]), sequence=run.core.registry.peers["engine-0"].next_sequence)


def test_rows_cost_little():
    """A guard against per-token work or copies of whole streams, not a benchmark: the limit is ten times what a slow
    core needs, and a quadratic path costs hundreds of microseconds here."""
    core = make_core(max_new_tokens=4096, max_tokens=1 << 20, first_groups=64, over_provision=1.0)
    run = Run(core)
    for group in range(32):
        run.open(group, 8)
    messages = [
        make_chunks([Row(rid(g, k), 16 * n, range(16)) for g in range(32) for k in range(8)], sequence=n)
        for n in range(40)
    ]
    begin = time.process_time()
    for message in messages:
        core.handle(0.0, "engine-0", message)
    per_row = (time.process_time() - begin) / (40 * 256)
    core.recount()
    assert core.ledger.received == 40 * 256 * 16
    assert per_row < 50e-6
    print(f"{1e6 * per_row:.2f} us a row")
