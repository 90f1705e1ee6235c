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
from stream_rl.errors import EngineError
from stream_rl.messages import Ack, Chunks, Welcome
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
    """Takes only the message that it expects; asks again for a gap.  What it takes is in its memory at first, and with
    the next commit in its journal, which alone survives; nothing is acknowledged before that."""

    taken: list[list[Row]] = field(default_factory=list)
    journaled: int = 0
    resend: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.taken for row in rows]

    @property
    def expected(self) -> int:
        return len(self.taken)

    def take(self, message: Chunks) -> None:
        assert (message.run, message.engine, message.incarnation) == ("r", "engine-0", 5)
        if message.sequence == self.expected:
            self.taken.append(rows_of(wire.decode([bytes(frame) for frame in wire.encode(message)])))
        self.resend = self.resend or message.sequence > self.expected

    def commit(self) -> Ack:
        self.journaled, resend, self.resend = self.expected, self.resend, False
        return Ack(next_sequence=self.journaled, resend=resend)

    def restart(self) -> Welcome:
        del self.taken[self.journaled :]
        self.resend = False
        return Welcome(run="r", next_sequence=self.journaled)


@dataclass
class Line:
    outbox: Outbox = field(default_factory=lambda: Outbox("r", "engine-0", 5, RESEND))
    queue: Queue = field(default_factory=Queue)
    up: deque[Chunks] = field(default_factory=deque)
    down: deque[Ack | Welcome] = field(default_factory=deque)
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

    def deliver(self, commit: bool = True) -> None:
        if self.up:
            self.queue.take(self.up.popleft())
        if commit:
            self.down.append(self.queue.commit())

    def acknowledge(self) -> None:
        if self.down:
            match self.down.popleft():
                case Ack() as ack:
                    self.outbox.acknowledge(ack.next_sequence, ack.resend, self.now)
                case Welcome() as welcome:
                    self.outbox.welcome(welcome.next_sequence, self.now)

    def restart(self, lost_up: int, lost_down: int) -> None:
        """The queue is killed: what it had not journaled is lost, and some of what is on the wire, from the front on
        its side and from the back on ours.  Its Welcome comes before anything new that it says."""
        for _ in range(min(lost_up, len(self.up))):
            self.up.popleft()
        for _ in range(min(lost_down, len(self.down))):
            self.down.pop()
        self.down.append(self.queue.restart())

    def assert_consistent(self) -> None:
        assert self.queue.rows == self.added[: len(self.queue.rows)]
        assert self.outbox.bytes >= 0
        assert (self.outbox.bytes == 0) == (len(self.outbox._kept) == 0)
        assert len(self.outbox._kept) >= self.messages - self.queue.journaled, "what the journal has not is kept"


ACTIONS = ["add", "add", "send", "send", "send", "deliver", "deliver", "take", "ack", "ack", "lose up", "repeat up"]
ACTIONS += ["swap up", "wait", "tick", "restart", "welcome"]


def settle(line: Line) -> None:
    """A fair end: nothing is lost any more."""
    for _ in range(4 * line.messages + 20):
        line.now += RESEND + 0.1
        line.outbox.resend_overdue(line.now)
        while line.outbox.next_to_send() is not None:
            line.send()
        while line.up or line.down:
            line.deliver(commit=bool(line.up))
            line.acknowledge()
        line.assert_consistent()
        if line.queue.expected == line.messages and line.outbox.bytes == 0:
            return


@LIGHT
@given(st.data())
def test_a_queue_that_is_killed_at_any_point_gets_every_row_exactly_once_in_order(data: st.DataObject) -> None:
    line = Line()
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=80)):
        match action.split()[0]:
            case "add":
                line.add(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
            case "send":
                line.send()
            case "deliver":
                line.deliver()
            case "take":
                line.deliver(commit=False)
            case "ack":
                line.acknowledge()
            case "lose" if line.up:
                line.up.popleft()
            case "repeat" if line.up:
                line.up.append(line.up[0])
            case "swap":
                line.up.rotate(1)
            case "wait":
                line.now += data.draw(st.sampled_from([0.1, 1.0, 3.0]))
            case "tick":
                line.outbox.resend_overdue(line.now)
            case "restart":
                line.restart(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)))
            case "welcome":  # to a Hello that was said twice
                line.down.append(Welcome(run="r", next_sequence=line.queue.commit().next_sequence))
        line.assert_consistent()
    settle(line)
    assert line.queue.rows == line.added
    assert line.outbox.bytes == 0 and line.outbox.next_to_send() is None
    line.add([2])
    line.send()
    line.deliver()
    line.acknowledge()
    assert line.queue.rows == line.added and line.outbox.bytes == 0


def test_a_queue_that_acknowledges_before_its_journal_has_it_would_be_found_out() -> None:
    line = Line()
    line.add([1])
    line.add([1])
    line.send()
    line.queue.take(line.up.popleft())
    line.outbox.acknowledge(1, False, line.now)
    line.restart(0, 0)
    with pytest.raises(EngineError, match="had acknowledged 1 chunk messages of engine-0@5 and now has 0"):
        line.acknowledge()


@pytest.mark.parametrize("says", ["ack", "welcome"])
def test_a_queue_that_has_what_was_never_made_here_is_found_out(says: str) -> None:
    """Two processes of one incarnation: the tokens of one would be taken for repetitions of the other's."""
    line = Line()
    line.add([1])
    with pytest.raises(EngineError, match=r"has 2 .* engine-0@5, this process has made 1: .* start it with a higher"):
        line.outbox.welcome(2, 0.0) if says == "welcome" else line.outbox.acknowledge(2, False, 0.0)


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


def test_a_queue_that_says_nothing_for_too_long_is_asked_by_the_newest_message_again() -> None:
    line = Line()
    for _ in range(3):
        line.add([1])
        line.send()
    line.outbox.acknowledge(1, False, line.now + 1.0)
    line.outbox.resend_overdue(line.now + 1.0 + RESEND)
    assert line.outbox.next_to_send() is None, "the acknowledgement was progress"
    for n in (1, 2):
        line.outbox.resend_overdue(line.now + 1.0 + n * (RESEND + 0.01))
        again = line.outbox.next_to_send()
        assert again is not None and again.sequence == 2, "one is enough to hear what is missing"
        line.send()
        line.outbox.resend_overdue(line.now + 1.0 + n * (RESEND + 0.01) + 0.001)
        assert line.outbox.next_to_send() is None, "and not more often than that"
    line.up.rotate(1)
    line.up.clear()
    line.add([1])
    line.send()
    line.deliver()
    line.acknowledge()
    again = line.outbox.next_to_send()
    assert again is not None and again.sequence == 1, "now it has said what it misses"


def test_a_queue_that_asks_for_the_same_gap_many_times_gets_it_once() -> None:
    line = Line()
    for _ in range(50):
        line.add([1])
        line.send()
    line.up.popleft()
    sent = 0
    while line.up:
        line.deliver()
        line.acknowledge()
        while line.outbox.next_to_send() is not None:
            line.send()
            sent += 1
    assert line.queue.rows == line.added and sent == 50


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
