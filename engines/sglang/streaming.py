"""From the scheduler's requests to chunks: which tokens are new, which weights sampled them, when they leave.

Runs in the scheduler's thread after every step, so it does little: it notes how far each request has come and under
which version, and cuts a row out of a request when it has `chunk_tokens` new tokens, when the oldest of them is
`chunk_seconds` old, or when it is finished.  Rows become messages in the plugin's own thread.

Invariant: the rows of a request are contiguous from 0 and end with exactly one that carries a finish.  While the
outbox is full nothing is cut: tokens wait in their requests, which hold them anyway.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from stream_rl.types import Finish, Version

FULL_RETRY_SECONDS = 0.05
"""How soon a full outbox is looked at again."""


class Row(NamedTuple):
    """A chunk of one request."""

    rid: str
    start: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    spans: tuple[tuple[Version, int], ...]
    """Versions of the tokens in order, with how many each sampled."""
    finish: Finish


class _Segment:
    """How far one request has come."""

    __slots__ = ("finish", "request", "seen", "sent", "since", "spans")

    def __init__(self, request: Any) -> None:
        self.request = request
        self.seen = 0
        self.sent = 0
        self.since = 0.0
        """When the oldest unsent token was seen."""
        self.spans: list[tuple[Version, int]] = []
        """Versions of the unsent tokens."""
        self.finish = Finish.NONE


def finish_of(request: Any) -> Finish:
    """SGLang's finish reason in our words."""
    if not request.finished():
        return Finish.NONE
    return Finish(request.finished_reason.to_json()["type"])


def _length(request: Any, finish: Finish) -> int:
    """How many of a request's tokens count: those up to its stop, and of an aborted one those with a log-prob (a
    request that the scheduler refuses is run for one token without)."""
    length = len(request.output_ids)
    if finish and request.finished_len is not None:
        length = int(request.finished_len)
    if finish is Finish.ABORT:
        length = min(length, len(request.logprob.output_token_logprobs_val or ()))
    return length


class ChunkStream:
    """All requests of one run in one engine."""

    def __init__(
        self,
        run: str,
        chunk_tokens: int,
        chunk_seconds: float,
        emit: Callable[[list[Row]], None],
        is_full: Callable[[], bool],
    ) -> None:
        self._prefix = f"{run}/"
        self._chunk_tokens = chunk_tokens
        self._chunk_seconds = chunk_seconds
        self._emit = emit
        self._is_full = is_full
        self._segments: dict[str, _Segment] = {}
        self._due = float("inf")
        """No unsent token is older than allowed before this time."""
        self.tokens = 0

    def owns(self, rid: str) -> bool:
        """True for requests of this run; health checks and evaluations are not streamed."""
        return rid.startswith(self._prefix)

    def observe(self, requests: Iterable[Any], version: Version, now: float) -> None:
        """The step that `version` sampled has been processed; `requests` are those that took part in it."""
        full = self._is_full()
        rows: list[Row] = []
        for request in requests:
            segment = self._segments.get(request.rid)
            if segment is None:
                if not self.owns(request.rid) or request.finished_output:
                    continue
                segment = self._segments[request.rid] = _Segment(request)
            finish = finish_of(request)
            length = _length(request, finish)
            if length > segment.seen:
                if segment.sent == segment.seen:
                    segment.since = now
                    self._due = min(self._due, now + self._chunk_seconds)
                self._note(segment, length - segment.seen, version)
                segment.seen = length
            segment.finish = finish
            pending = segment.seen - segment.sent
            if not full and (finish or pending >= self._chunk_tokens or self._overdue(segment, now)):
                rows.append(self._cut(segment))
            elif finish:
                self._due = min(self._due, now + FULL_RETRY_SECONDS)
        if rows:
            self._emit(rows)

    def abort_waiting(self, rid: str) -> None:
        """A request was aborted while it waited in a queue, where no step will report it."""
        segment = self._segments.get(rid)
        if segment is None:
            self._emit([Row(rid, 0, (), (), (), Finish.ABORT)])
            return
        segment.finish = Finish.ABORT
        self._emit([self._cut(segment)])

    def flush_overdue(self, now: float) -> None:
        """Cut what has waited long enough; called every turn of the scheduler's loop, also for retracted requests,
        which take part in no step."""
        if now < self._due:
            return
        if self._is_full():
            self._due = now + FULL_RETRY_SECONDS
            return
        rows = [self._cut(s) for s in list(self._segments.values()) if s.finish or self._overdue(s, now)]
        waiting = [s.since for s in self._segments.values() if s.seen > s.sent]
        self._due = min(waiting, default=float("inf")) + self._chunk_seconds
        if rows:
            self._emit(rows)

    def _overdue(self, segment: _Segment, now: float) -> bool:
        return segment.seen > segment.sent and now - segment.since >= self._chunk_seconds

    def _note(self, segment: _Segment, count: int, version: Version) -> None:
        if segment.spans and segment.spans[-1][0] == version:
            count += segment.spans.pop()[1]
        segment.spans.append((version, count))

    def _cut(self, segment: _Segment) -> Row:
        request, start, end = segment.request, segment.sent, segment.seen
        logprobs = (request.logprob.output_token_logprobs_val or ())[start:end]
        if len(logprobs) != end - start:
            raise ValueError(
                f"{request.rid} has {len(logprobs)} log-probs for {end - start} tokens; return_logprob is off"
            )
        spans = tuple(segment.spans)
        row = Row(request.rid, start, request.output_ids[start:end], logprobs, spans, segment.finish)
        segment.sent, segment.spans = end, []
        self.tokens += end - start
        if segment.finish:
            del self._segments[request.rid]
        return row
