"""The outbox: every message reaches a queue that takes only the next one, exactly once, however much gets lost."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.sglang.outbox import Outbox
from engines.sglang.streaming import Row
from stream_rl import wire
from stream_rl.messages import Chunks, ChunksAck
from stream_rl.types import Finish, Version

LIGHT = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
RESEND = 2.0


def make_row(number: int, tokens: int, finish: Finish = Finish.NONE) -> Row:
    """A row that can be told from any other; its tokens are of up to two versions."""
    spans = (
        ((Version(0, number), tokens - 1), (Version(0, number + 1), 1)) if tokens > 1 else ((Version(0, number), 1),)
    )
    ids = [10 * number + i for i in range(tokens)]
    return Row(f"r/{number}/0/0.", 7 * number, ids, [-0.5 * i for i in ids], spans if tokens else (), finish)


def rows_of(message: Chunks) -> list[Row]:
    """The rows that a queue reads out of a message's columns."""
    rows, token, span = [], 0, 0
    for i, rid in enumerate(message.rids):
        count, spans = int(message.counts[i]), []
        while span < len(message.spans) and message.spans[span][0] == i:
            _, history, step, length = (int(n) for n in message.spans[span])
            spans.append((Version(history, step), length))
            span += 1
        rows.append(
            Row(
                rid,
                int(message.starts[i]),
                message.token_ids[token : token + count].tolist(),
                message.logprobs[token : token + count].tolist(),
                tuple(spans),
                Finish(message.finishes[i]),
            )
        )
        token += count
    assert token == message.token_ids.size == message.logprobs.size and span == len(message.spans)
    return rows


@dataclass
class Queue:
    """Takes only the message that it expects; asks again for a gap."""

    taken: list[Row] = field(default_factory=list)
    expected: int = 0

    def take(self, message: Chunks) -> ChunksAck:
        assert (message.run, message.engine, message.incarnation) == ("r", "engine-0", 5)
        if message.sequence == self.expected:
            self.taken += rows_of(wire.decode([bytes(frame) for frame in wire.encode(message)]))
            self.expected += 1
        return ChunksAck(next_sequence=self.expected, resend=message.sequence > self.expected)


@dataclass
class Line:
    outbox: Outbox = field(default_factory=lambda: Outbox("r", "engine-0", 5, RESEND))
    queue: Queue = field(default_factory=Queue)
    up: deque[Chunks] = field(default_factory=deque)
    down: deque[ChunksAck] = field(default_factory=deque)
    added: list[Row] = field(default_factory=list)
    messages: int = 0
    now: float = 100.0

    def add(self, sizes: list[int]) -> None:
        rows = [
            make_row(len(self.added) + i, size, Finish.STOP if size % 3 == 0 else Finish.NONE)
            for i, size in enumerate(sizes)
        ]
        self.outbox.add(rows, self.now)
        self.added += rows
        self.messages += 1

    def send(self) -> None:
        if (message := self.outbox.next_to_send()) is not None:
            self.up.append(message)
            self.outbox.sent()

    def deliver(self) -> None:
        if self.up:
            self.down.append(self.queue.take(self.up.popleft()))

    def acknowledge(self) -> None:
        if self.down:
            ack = self.down.popleft()
            self.outbox.acknowledge(ack.next_sequence, ack.resend, self.now)

    def assert_consistent(self) -> None:
        assert self.queue.taken == self.added[: len(self.queue.taken)]
        assert self.outbox.bytes >= 0
        assert (self.outbox.bytes == 0) == (len(self.outbox._kept) == 0)
        assert len(self.outbox._kept) >= self.messages - self.queue.expected, "what the queue has not is kept"


ACTIONS = ["add", "add", "send", "send", "send", "deliver", "deliver", "ack", "ack", "lose up", "lose down"]
ACTIONS += ["repeat up", "repeat down", "swap up", "swap down", "wait", "tick", "welcome"]


@LIGHT
@given(st.data())
def test_a_queue_that_takes_only_the_next_message_gets_every_row_exactly_once_in_order(data: st.DataObject) -> None:
    line = Line()
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=80)):
        channel = line.up if action.endswith("up") else line.down
        match action.split()[0]:
            case "add":
                line.add(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
            case "send":
                line.send()
            case "deliver":
                line.deliver()
            case "ack":
                line.acknowledge()
            case "lose" if channel:
                channel.popleft()
            case "repeat" if channel:
                channel.append(channel[0])  # type: ignore[arg-type]
            case "swap":
                channel.rotate(1)
            case "wait":
                line.now += data.draw(st.sampled_from([0.1, 1.0, 3.0]))
            case "tick":
                line.outbox.resend_overdue(line.now)
            case "welcome":
                line.down.append(ChunksAck(next_sequence=line.queue.expected, resend=True))
        line.assert_consistent()
    for _ in range(4 * line.messages + 20):
        line.now += RESEND + 0.1
        line.outbox.resend_overdue(line.now)
        while line.outbox.next_to_send() is not None:
            line.send()
        while line.up or line.down:
            line.deliver()
            line.acknowledge()
        line.assert_consistent()
        if line.queue.expected == line.messages and line.outbox.bytes == 0:
            break
    assert line.queue.taken == line.added
    assert line.outbox.bytes == 0 and line.outbox.next_to_send() is None
    line.add([2])
    line.send()
    line.deliver()
    line.acknowledge()
    assert line.queue.taken == line.added and line.outbox.bytes == 0


def test_messages_are_numbered_from_zero_without_gaps_and_sent_once_each_when_nothing_is_lost() -> None:
    line = Line()
    for n in range(5):
        line.add([n])
    sequences = []
    while (message := line.outbox.next_to_send()) is not None:
        assert line.outbox.next_to_send() is message, "looking is not sending"
        sequences.append(message.sequence)
        line.send()
    assert sequences == [0, 1, 2, 3, 4]
    line.outbox.resend_overdue(line.now + RESEND)
    assert line.outbox.next_to_send() is None, "not overdue yet"


def test_what_was_not_acknowledged_for_too_long_is_sent_again_from_the_first() -> None:
    line = Line()
    for _ in range(3):
        line.add([1])
        line.send()
    line.outbox.acknowledge(1, False, line.now + 1.0)
    line.outbox.resend_overdue(line.now + 1.0 + RESEND)
    assert line.outbox.next_to_send() is None, "the acknowledgement was progress"
    line.outbox.resend_overdue(line.now + 1.0 + RESEND + 0.01)
    again = line.outbox.next_to_send()
    assert again is not None and again.sequence == 1
    line.send()
    line.send()
    line.outbox.resend_overdue(line.now + 1.0 + RESEND + 0.02)
    assert line.outbox.next_to_send() is None, "not more often than that"


def test_a_gap_is_filled_at_once_and_not_only_when_it_is_overdue() -> None:
    line = Line()
    for _ in range(3):
        line.add([1])
        line.send()
    line.outbox.acknowledge(1, True, line.now)
    sequences = []
    while (message := line.outbox.next_to_send()) is not None:
        sequences.append(message.sequence)
        line.send()
    assert sequences == [1, 2]


def test_a_first_message_after_a_long_silence_is_not_overdue() -> None:
    line = Line()
    line.add([1])
    line.send()
    line.deliver()
    line.acknowledge()
    line.now += 1000
    line.add([1])
    line.send()
    line.outbox.resend_overdue(line.now + 0.1)
    assert line.outbox.next_to_send() is None


@pytest.mark.parametrize("next_sequence", [-(2**63), -1, 0])
def test_an_acknowledgement_of_nothing_forgets_nothing(next_sequence: int) -> None:
    line = Line()
    line.add([1])
    line.outbox.acknowledge(next_sequence, True, line.now)
    first = line.outbox.next_to_send()
    assert first is not None and first.sequence == 0 and line.outbox.bytes > 0


def test_an_acknowledgement_of_more_than_there_is_does_not_break_the_numbering() -> None:
    line = Line()
    line.add([1])
    line.add([2])
    line.outbox.acknowledge(2**62, True, line.now)
    assert line.outbox.bytes == 0 and line.outbox.next_to_send() is None
    line.add([3])
    following = line.outbox.next_to_send()
    assert following is not None and following.sequence == 2


def test_the_size_grows_with_tokens_and_rows_and_goes_back_to_zero() -> None:
    line, sizes = Line(), []
    for tokens in ([0], [1], [1, 1], [100]):
        before = line.outbox.bytes
        line.add(tokens)
        sizes.append(line.outbox.bytes - before)
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3]
    real = sum(len(frame) for frame in wire.encode(line.outbox._kept[-1][0]))
    assert 0.5 * real < sizes[3] < 2 * real, f"a message of {real} bytes is estimated at {sizes[3]}"
    for n in range(1, 5):
        line.outbox.acknowledge(n, False, line.now)
    assert line.outbox.bytes == 0


def test_log_probs_travel_as_float32_and_special_values_survive() -> None:
    outbox = Outbox("r", "engine-0", 5, RESEND)
    values = [-0.0, float("-inf"), float("nan"), -1e-45, -103.97]
    outbox.add([Row("r/0/0/0.", 0, list(range(5)), values, ((Version(0, 0), 5),), Finish.NONE)], 0.0)
    message = outbox.next_to_send()
    assert message is not None
    assert message.logprobs.tobytes() == np.array(values, np.float32).tobytes()
