"""From requests to rows: every token once, in order, under the version that sampled it, as early as it should."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming_builders import Request

from engines.sglang.streaming import FULL_RETRY_SECONDS, ChunkStream, Row, finish_of
from stream_rl.types import Finish, Version, make_rid

LIGHT = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
RUN = "r"
TICK = 1 / 64
"""Times are multiples of this, so that sums of them are exact."""


@dataclass
class Sink:
    """Takes rows, is full when told, and knows when each came."""

    rows: list[Row] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    full: bool = False
    now: float = 0.0

    def emit(self, rows: list[Row]) -> None:
        assert rows, "an empty list is no news"
        self.rows += rows
        self.times += [self.now] * len(rows)

    def of(self, rid: str) -> list[Row]:
        return [row for row in self.rows if row.rid == rid]

    def sent(self, rid: str) -> int:
        return sum(len(row.token_ids) for row in self.of(rid))

    def ended(self, rid: str) -> bool:
        return any(row.finish for row in self.of(rid))


def make_stream(chunk_tokens: int = 4, chunk_seconds: float = 1.0) -> tuple[ChunkStream, Sink]:
    sink = Sink()
    return ChunkStream(RUN, chunk_tokens, chunk_seconds, sink.emit, lambda: sink.full), sink


def request(member: int = 0, run: str = RUN) -> Request:
    return Request(make_rid(run, 0, member, 0))


def step(stream: ChunkStream, sink: Sink, requests: Sequence[Request], version: Version, now: float) -> None:
    sink.now = now
    stream.observe(requests, version, now)
    for each in requests:
        each.finished_output = each.finished()  # SGLang's own output comes after our hook


def flush(stream: ChunkStream, sink: Sink, now: float) -> None:
    sink.now = now
    stream.flush_overdue(now)


def versions_of(row: Row) -> list[Version]:
    return [version for version, count in row.spans for _ in range(count)]


def check(rows: Sequence[Row], truth: Request) -> None:
    """The rows of a finished request are exactly what it sampled."""
    position = 0
    for i, row in enumerate(rows):
        end = position + len(row.token_ids)
        assert row.rid == truth.rid
        assert row.start == position, "rows are contiguous from 0"
        assert list(row.token_ids) == truth.output_ids[position:end]
        assert list(row.logprobs) == truth.logprob.output_token_logprobs_val[position:end]
        assert sum(count for _, count in row.spans) == end - position and all(count > 0 for _, count in row.spans)
        assert all(a[0] != b[0] for a, b in zip(row.spans, row.spans[1:], strict=False)), (
            "spans are as long as they can be"
        )
        assert versions_of(row) == truth.versions[position:end]
        assert bool(row.finish) == (i == len(rows) - 1), "exactly the last row carries a finish"
        assert row.token_ids or row.finish
        position = end
    assert position == truth.length
    assert truth.finished_reason is not None and rows[-1].finish == truth.finished_reason.kind


class World:
    """Requests that grow at random under versions that change at random, and what the stream must have sent by then."""

    def __init__(self, chunk_tokens: int, chunk_seconds: float) -> None:
        self.chunk_tokens, self.chunk_seconds = chunk_tokens, chunk_seconds
        self.stream, self.sink = make_stream(chunk_tokens, chunk_seconds)
        self.requests = [request(member) for member in range(3)]
        self.now, self.version = 8.0, Version(0, 0)
        self.full_until = 0.0

    def open(self) -> list[Request]:
        return [each for each in self.requests if not each.finished()]

    def step(self, draw: st.DataObject) -> None:
        taking_part = [each for each in self.open() if draw.draw(st.booleans())]
        for each in taking_part:
            before = len(each.output_ids)
            each.sample(draw.draw(st.integers(0, 2 * self.chunk_tokens + 1)), self.version, self.now)
            if draw.draw(st.integers(0, 4)) == 0:
                kind = draw.draw(st.sampled_from(["stop", "length", "abort"]))
                length = None if kind == "abort" else draw.draw(st.none() | st.integers(before, len(each.output_ids)))
                each.finish(kind, self.now, length)
                if kind == "abort":
                    each.output_ids += [-1] * draw.draw(st.integers(0, 2))
        step(self.stream, self.sink, taking_part, self.version, self.now)
        if not self.sink.full:
            for each in taking_part:
                waiting = each.length - self.sink.sent(each.rid)
                assert waiting < self.chunk_tokens, "a chunk leaves when it has enough tokens"
                assert not each.finished() or self.sink.ended(each.rid), "a finish leaves at once"

    def turn(self) -> None:
        flush(self.stream, self.sink, self.now)
        if self.sink.full:
            self.full_until = self.now
            return
        patience = FULL_RETRY_SECONDS + TICK if self.now - self.full_until < 0.25 else 0.0
        for each in self.requests:
            sent = self.sink.sent(each.rid)
            if each.length > sent:
                assert self.now - each.times[sent] < self.chunk_seconds + patience, "no token waits for longer"
            if each.finished() and self.now - max(each.finished_at, self.full_until) > patience:
                assert self.sink.ended(each.rid)

    def assert_nothing_left_early(self) -> None:
        """A row is as long as it should be, or old, or the last."""
        started: defaultdict[str, int] = defaultdict(int)
        for row, at in zip(self.sink.rows, self.sink.times, strict=True):
            [truth] = [each for each in self.requests if each.rid == row.rid]
            old = bool(row.token_ids) and at - truth.times[started[row.rid]] >= self.chunk_seconds
            assert row.finish or len(row.token_ids) >= self.chunk_tokens or old
            started[row.rid] += len(row.token_ids)


@LIGHT
@given(st.data(), st.integers(1, 5), st.sampled_from([TICK, 0.25, 1.0, 1000.0]), st.booleans())
def test_rows_are_the_tokens_once_in_order_under_their_versions_and_in_time(
    data: st.DataObject, chunk_tokens: int, chunk_seconds: float, may_fill: bool
) -> None:
    world = World(chunk_tokens, chunk_seconds)
    for action in data.draw(
        st.lists(st.sampled_from(["step", "step", "step", "turn", "version", "full"]), max_size=40)
    ):
        world.now += data.draw(st.integers(0, 32)) * TICK
        if action == "step":
            world.step(data)
        elif action == "turn":
            world.turn()
        elif action == "version":
            history, at = world.version
            world.version = (
                Version(history + 1, at - 1) if data.draw(st.integers(0, 5)) == 0 else Version(history, at + 1)
            )
        elif may_fill:
            world.sink.full = not world.sink.full
            world.full_until = world.now
    world.sink.full = False
    for each in world.open():
        each.sample(1, world.version, world.now)
        each.finish("length", world.now)
    step(world.stream, world.sink, world.requests, world.version, world.now)
    for _ in range(3):
        world.now += 0.25
        flush(world.stream, world.sink, world.now)
    for each in world.requests:
        check(world.sink.of(each.rid), each)
    world.assert_nothing_left_early()
    assert (
        world.stream.tokens
        == sum(each.length for each in world.requests)
        == sum(len(r.token_ids) for r in world.sink.rows)
    )
    before = len(world.sink.rows)
    step(world.stream, world.sink, world.requests, world.version, world.now + 10_000)
    flush(world.stream, world.sink, world.now + 20_000)
    assert len(world.sink.rows) == before, "what is finished and sent is not streamed again"


def test_the_check_sees_a_span_that_is_shifted_by_one_token_and_other_plants() -> None:
    stream, sink = make_stream(chunk_tokens=6)
    truth = request()
    for version in (Version(0, 1), Version(0, 2), Version(0, 3)):
        truth.sample(3, version, 0.0)
        step(stream, sink, [truth], version, 0.0)
    truth.finish("stop", 0.0)
    step(stream, sink, [truth], Version(0, 3), 0.0)
    rows = sink.rows
    check(rows, truth)
    [(first, a), (second, b)] = rows[0].spans
    plants = [
        rows[0]._replace(spans=((first, a + 1), (second, b - 1))),
        rows[0]._replace(spans=((first, a), (second, b + 1))),
        rows[0]._replace(spans=((second, b), (first, a))),
        rows[0]._replace(start=1),
        rows[0]._replace(finish=Finish.STOP),
        rows[0]._replace(logprobs=[*rows[0].logprobs[1:], 0.0]),
        rows[0]._replace(token_ids=rows[0].token_ids[:-1]),
    ]
    for plant in plants:
        with pytest.raises(AssertionError):
            check([plant, *rows[1:]], truth)
    for wrong in ([rows[0]], [*rows, rows[-1]], list(reversed(rows))):
        with pytest.raises(AssertionError):
            check(wrong, truth)


def test_a_version_that_changes_within_a_chunk_makes_two_spans() -> None:
    stream, sink = make_stream(chunk_tokens=5)
    truth = request()
    for version, count in ((Version(0, 0), 2), (Version(0, 1), 1), (Version(0, 1), 1), (Version(1, 0), 1)):
        truth.sample(count, version, 0.0)
        step(stream, sink, [truth], version, 0.0)
    assert [row.spans for row in sink.rows] == [((Version(0, 0), 2), (Version(0, 1), 2), (Version(1, 0), 1))]


def test_a_request_that_takes_part_in_no_step_does_not_sit_on_its_tokens() -> None:
    stream, sink = make_stream(chunk_tokens=100, chunk_seconds=0.5)
    retracted, running = request(0), request(1)
    retracted.sample(3, Version(0, 0), 1.0)
    step(stream, sink, [retracted], Version(0, 0), 1.0)
    for tick in range(1, 32):
        flush(stream, sink, 1.0 + tick * TICK)
        running.sample(1, Version(0, 0), 1.0 + tick * TICK)
        step(stream, sink, [running], Version(0, 0), 1.0 + tick * TICK)
        assert not sink.of(retracted.rid)
    flush(stream, sink, 1.5)
    assert [list(row.token_ids) for row in sink.of(retracted.rid)] == [retracted.output_ids]
    assert stream.owns(retracted.rid)


def test_the_clock_of_a_chunk_starts_with_its_oldest_unsent_token() -> None:
    stream, sink = make_stream(chunk_tokens=3, chunk_seconds=1.0)
    truth = request()
    for now in (0.0, 0.25, 0.5):
        truth.sample(1, Version(0, 0), now)
        step(stream, sink, [truth], Version(0, 0), now)
    assert sink.sent(truth.rid) == 3
    truth.sample(1, Version(0, 0), 0.75)
    step(stream, sink, [truth], Version(0, 0), 0.75)
    truth.sample(1, Version(0, 0), 1.5)
    step(stream, sink, [truth], Version(0, 0), 1.5)
    flush(stream, sink, 1.74)
    assert sink.sent(truth.rid) == 3
    flush(stream, sink, 1.75)
    assert sink.sent(truth.rid) == 5


def test_a_full_outbox_loses_nothing_and_a_finish_leaves_soon_after() -> None:
    stream, sink = make_stream(chunk_tokens=1, chunk_seconds=1000.0)
    truth, sink.full = request(), True
    for n in range(5):
        truth.sample(2, Version(0, n), float(n))
        step(stream, sink, [truth], Version(0, n), float(n))
    truth.finish("length", 4.0)
    step(stream, sink, [truth], Version(0, 4), 4.0)
    for tick in range(1, 10):
        flush(stream, sink, 4.0 + tick * TICK)
    assert not sink.rows
    sink.full = False
    flush(stream, sink, 4.0 + 10 * TICK + FULL_RETRY_SECONDS)
    check(sink.rows, truth)


def test_tokens_past_the_finished_length_are_not_streamed() -> None:
    for length in range(6):
        stream, sink = make_stream(chunk_tokens=100)
        truth = request()
        truth.sample(6, Version(0, 0), 0.0)
        truth.finish("stop", 0.0, length)
        step(stream, sink, [truth], Version(0, 0), 0.0)
        [row] = sink.rows
        assert list(row.token_ids) == truth.output_ids[:length] and stream.tokens == length
        check(sink.rows, truth)


@pytest.mark.parametrize(
    "rid", ["", "r", "r-eval/0/0/0.", "rr/0/0/0.", "R/0/0/0.", "x/r/0/0/0.", "HEALTH_CHECK_1", "/r/0"]
)
def test_requests_of_nobody_or_of_another_run_are_not_streamed(rid: str) -> None:
    stream, sink = make_stream(chunk_tokens=1)
    foreign = Request(rid)
    foreign.sample(3, Version(0, 0), 0.0)
    assert not stream.owns(rid)
    step(stream, sink, [foreign], Version(0, 0), 0.0)
    foreign.finish("stop", 1.0)
    step(stream, sink, [foreign], Version(0, 0), 1.0)
    flush(stream, sink, 100.0)
    assert not sink.rows and stream.tokens == 0


def test_a_foreign_request_may_lack_log_probs_but_one_of_the_run_may_not() -> None:
    stream, sink = make_stream(chunk_tokens=1)
    bare = request()
    bare.sample(1, Version(0, 0), 0.0)
    bare.logprob.output_token_logprobs_val = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"r/0/0/0\. has 0 log-probs for 1 tokens; return_logprob is off"):
        step(stream, sink, [bare], Version(0, 0), 0.0)
    step(stream, sink, [Request("other/0/0/0.", [1], bare.logprob)], Version(0, 0), 0.0)
    assert not sink.rows


@pytest.mark.parametrize("kind", ["stop", "length", "abort"])
def test_a_request_that_finishes_without_a_token_is_one_empty_row(kind: str) -> None:
    stream, sink = make_stream()
    truth = request()
    truth.finish(kind, 0.0)
    step(stream, sink, [truth], Version(0, 0), 0.0)
    assert [(row.start, list(row.token_ids), row.spans, row.finish) for row in sink.rows] == [(0, [], (), Finish(kind))]


def test_an_abort_of_a_request_that_never_ran_is_one_empty_row() -> None:
    stream, sink = make_stream()
    stream.abort_waiting("r/0/9/0.")
    assert sink.rows == [Row("r/0/9/0.", 0, (), (), (), Finish.ABORT)]


@pytest.mark.parametrize("full_before", [False, True])
def test_an_abort_while_waiting_sends_what_was_sampled_and_one_finish(full_before: bool) -> None:
    stream, sink = make_stream(chunk_tokens=4)
    truth, other = request(0), request(1)
    truth.sample(4, Version(0, 0), 0.0)
    step(stream, sink, [truth], Version(0, 0), 0.0)
    sink.full = full_before
    truth.sample(2, Version(0, 1), 0.0)
    other.sample(1, Version(0, 1), 0.0)
    step(stream, sink, [truth, other], Version(0, 1), 0.0)
    stream.abort_waiting(truth.rid)
    sink.full = False
    for now in (1.0, 2.0, 3.0):
        flush(stream, sink, now)
    truth.finish("abort", 0.0)
    check(sink.of(truth.rid), truth)
    assert sink.sent(other.rid) == 1 and not sink.ended(other.rid)


def test_rows_do_not_change_when_their_request_grows() -> None:
    stream, sink = make_stream(chunk_tokens=2)
    truth = request()
    truth.sample(2, Version(0, 0), 0.0)
    step(stream, sink, [truth], Version(0, 0), 0.0)
    truth.output_ids[0] = -1
    truth.logprob.output_token_logprobs_val.clear()
    assert len(sink.rows[0].token_ids) == len(sink.rows[0].logprobs) == 2 and sink.rows[0].token_ids[0] != -1


def test_sglangs_reasons_in_our_words() -> None:
    truth: Any = request()
    assert finish_of(truth) is Finish.NONE
    for kind in (Finish.STOP, Finish.LENGTH, Finish.ABORT):
        truth.finish(str(kind), 0.0)
        assert finish_of(truth) is kind


def test_a_later_segment_of_a_trajectory_is_a_request_of_its_own() -> None:
    """The queue let it go on: the actor aborts the old request, and the new one starts again at 0."""
    stream, sink = make_stream()
    old, new = (Request(make_rid(RUN, 1, 2, segment)) for segment in (0, 11))
    old.sample(6, Version(0, 0), 0.0)
    new.sample(5, Version(0, 3), 0.0)
    step(stream, sink, [old, new], Version(0, 3), 0.0)
    old.finish("abort", 1.0)
    stream.abort_waiting(old.rid)
    new.sample(4, Version(0, 4), 1.0)
    new.finish("stop", 1.0)
    step(stream, sink, [new], Version(0, 4), 1.0)
    assert [(row.start, len(row.token_ids), row.finish) for row in sink.of(new.rid)] == [(0, 5, ""), (5, 4, "stop")]
    assert [row.finish for row in sink.of(old.rid)] == ["", "abort"]


@pytest.mark.parametrize("aborted", [(1, 2, 0), (1, 2, 1), (1, 2, 11), (11, 2, 1), (1, 1, 0)])
def test_an_abort_by_prefix_hits_one_segment(aborted: tuple[int, int, int]) -> None:
    """SGLang aborts every request whose id starts with what it was given."""
    rids = [make_rid(RUN, *key) for key in [(1, 2, 0), (1, 2, 1), (1, 2, 11), (11, 2, 1), (1, 1, 0), (1, 21, 0)]]
    assert [rid for rid in rids if rid.startswith(make_rid(RUN, *aborted))] == [make_rid(RUN, *aborted)]
