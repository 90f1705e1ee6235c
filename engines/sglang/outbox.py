"""Chunk messages until the queue has them: numbered without gaps, kept until acknowledged, sent again if they were not.

The queue takes a message only when it has all before it and asks for the rest otherwise, so an answer to any message
tells the whole state: when none comes, one message is sent again and not everything.

Owned by the plugin's thread.  Rows come in from the scheduler's thread through a deque.
"""

from collections import deque

import numpy as np

from engines.sglang.streaming import Row
from stream_rl.errors import EngineError
from stream_rl.messages import Chunks

BYTES_PER_TOKEN = 8
ROW_OVERHEAD_BYTES = 120
"""Estimates of what a token and a row weigh in a message; the bound on the buffer need not be exact."""


class Outbox:
    """Unacknowledged chunk messages of one engine incarnation."""

    def __init__(self, run: str, engine: str, incarnation: int, resend_seconds: float) -> None:
        self._run, self._engine, self._incarnation = run, engine, incarnation
        self._resend_seconds = resend_seconds
        self._kept: deque[tuple[Chunks, int]] = deque()
        self._next_sequence = 0
        self._next_to_send = 0
        self._last_progress = 0.0
        self._sent_again = (-1, 0.0)
        """From which message everything was sent again because the queue asked for it, and when."""
        self.bytes = 0
        """Size of everything kept, about."""

    def add(self, rows: list[Row], now: float) -> None:
        """Number a message of these rows and keep it."""
        message = _message(self._run, self._engine, self._incarnation, self._next_sequence, rows)
        size = sum(len(row.token_ids) * BYTES_PER_TOKEN + ROW_OVERHEAD_BYTES for row in rows)
        if not self._kept:
            self._last_progress = now
        self._kept.append((message, size))
        self._next_sequence += 1
        self.bytes += size

    def next_to_send(self) -> Chunks | None:
        """The first message not sent yet."""
        if self._next_to_send == self._next_sequence:
            return None
        return self._kept[self._next_to_send - self._first][0]

    def sent(self) -> None:
        """`next_to_send` has left."""
        self._next_to_send += 1

    def acknowledge(self, next_sequence: int, resend: bool, now: float) -> None:
        """Everything below `next_sequence` is in the queue's journal; with `resend`, the rest is to be sent again.

        Raises EngineError if the queue has messages that were never made here.
        """
        if next_sequence > self._next_sequence:
            raise EngineError(
                f"the queue has {next_sequence} chunk messages of {self._engine}@{self._incarnation}, this process has "
                f"made {self._next_sequence}: another one has used this incarnation; start it with a higher one"
            )
        while self._first < next_sequence:
            self.bytes -= self._kept.popleft()[1]
            self._last_progress = now
        self._next_to_send = max(self._next_to_send, self._first)
        if resend and self._may_send_again(now):
            self._next_to_send, self._sent_again = self._first, (self._first, now)

    def welcome(self, next_sequence: int, now: float) -> None:
        """The queue, restarted or not, goes on from `next_sequence`: send from there.

        Raises EngineError if it has less than it had acknowledged, or more than was made here.
        """
        if next_sequence < self._first:
            raise EngineError(
                f"the queue had acknowledged {self._first} chunk messages of {self._engine}@{self._incarnation} and "
                f"now has {next_sequence}: its journal was lost or replaced; start the run again"
            )
        self._sent_again = (-1, 0.0)
        self.acknowledge(next_sequence, True, now)
        self._last_progress = now

    def resend_overdue(self, now: float) -> None:
        """Send the newest message again if nothing was acknowledged for too long: if the queue misses any before it,
        it asks for all of them."""
        if self._next_to_send > self._first and now - self._last_progress > self._resend_seconds:
            self._next_to_send, self._last_progress = self._next_to_send - 1, now

    def _may_send_again(self, now: float) -> bool:
        """Each message after a lost one asks for it again; one answer to all of them, or n messages would make n^2."""
        first, when = self._sent_again
        return first != self._first or now - when > self._resend_seconds

    @property
    def _first(self) -> int:
        return self._next_sequence - len(self._kept)


def _message(run: str, engine: str, incarnation: int, sequence: int, rows: list[Row]) -> Chunks:
    spans = [(i, v.history, v.step, count) for i, row in enumerate(rows) for v, count in row.spans]
    return Chunks(
        run=run,
        engine=engine,
        incarnation=incarnation,
        sequence=sequence,
        rids=[row.rid for row in rows],
        finishes=[str(row.finish) for row in rows],
        starts=np.array([row.start for row in rows], np.int64),
        counts=np.array([len(row.token_ids) for row in rows], np.int32),
        token_ids=np.concatenate([np.asarray(row.token_ids, np.int32) for row in rows]),
        logprobs=np.concatenate([np.asarray(row.logprobs, np.float32) for row in rows]),
        spans=np.array(spans, np.int64).reshape(-1, 4),
    )
