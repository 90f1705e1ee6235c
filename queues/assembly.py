"""Chunk messages in, whole streams out.

A row is taken only if it continues its request's stream exactly; what is wrong with one is counted by reason and
touches nothing but its own trajectory.  The message's sequence advances all the same: the engine could only send the
same bytes again, and everything behind them would wait for ever.  The refused part of the stream is remembered in
`Trajectory.lost` instead, so that a trajectory that can never be whole is dropped when it closes.

About 2.5 microseconds a row: values are checked for the whole message at once, and the loop does no numpy.
"""

from collections.abc import Mapping

import numpy as np

from queues.ledger import Ledger, State
from queues.tallies import Tallies
from queues.trajectories import Group, Trajectory
from queues.versions import Histories
from stream_rl.messages import Chunks
from stream_rl.types import Finish, parse_rid

_FINISHES = frozenset(Finish)
_MAX_LOGPROB = 1e-3
"""Rounding puts the log-prob of a certain token this far above 0 at most."""


class Assembly:
    def __init__(
        self,
        run: str,
        max_new_tokens: int,
        histories: Histories,
        ledger: Ledger,
        tallies: Tallies,
        groups: Mapping[int, Group],
    ) -> None:
        self._run = run
        self._groups = groups
        self._max_new_tokens = max_new_tokens
        self._histories = histories
        self._ledger = ledger
        self._tallies = tallies
        self.by_rid: dict[str, Trajectory] = {}
        """By the request id of the current segment."""

    def take(self, now: float, chunks: Chunks) -> tuple[list[Trajectory], bool]:
        """Take every row that fits.  Returns the trajectories whose stream ended or turned out to have a hole, and
        whether to ask the engine to send again (once for each hole: it may not know better)."""
        if detail := _column_problem(chunks):
            return self._refuse_all(chunks, detail), False
        engine, refused, by_rid = chunks.engine, self._tallies.refused, self.by_rid
        published = self._histories.published
        problems = _row_problems(chunks)
        ids, logprobs = chunks.token_ids.tobytes(), chunks.logprobs.tobytes()
        starts, counts, spans = chunks.starts.tolist(), chunks.counts.tolist(), chunks.spans.tolist()
        spans.append((-1, 0, 0, 0))
        touched: list[Trajectory] = []
        resend = False
        offset = cursor = fresh_total = streamed = 0
        for row, (rid, finish, start, count) in enumerate(
            zip(chunks.rids, chunks.finishes, starts, counts, strict=True)
        ):
            begin, offset = offset, offset + count
            first = cursor
            while spans[cursor][0] == row:
                cursor += 1
            trajectory = by_rid.get(rid)
            if trajectory is None:
                refused[self._unknown(rid)] += 1
                continue
            if trajectory.state is State.DROPPED:
                self._late(trajectory, finish)
                continue
            start += trajectory.base
            end, have = start + count, trajectory.received
            if trajectory.finish or trajectory.complete:
                refused["after_finish" if end > have or start < trajectory.base else "duplicate"] += 1
                continue
            if trajectory.engine and trajectory.engine != engine:
                refused["not_its_engine"] += 1
                continue
            fresh = end - have
            problem = problems.get(row, "") if problems else ""
            if not problem:
                for _, history, step, _ in spans[first:cursor]:
                    if not 0 <= step <= published.get(history, -1):
                        problem = "unknown_version"
                        break
            if problem:
                pass
            elif finish not in _FINISHES:
                problem = "bad_finish"
            elif start > have:
                problem = "gap"
                resend = resend or trajectory.lost <= have
            elif fresh < 0 and finish:
                problem = "short_finish"
            elif fresh <= 0 and not finish:
                refused["duplicate"] += 1
                continue
            elif end > self._max_new_tokens:
                problem = "too_long"
            elif (trajectory.closed or trajectory.appending) and end > trajectory.num_sampled:
                problem = "after_close"
            if problem:
                refused[problem] += 1
                # Clamped because a hostile start would otherwise promise a stream that no honest row can catch up with.
                trajectory.lost = max(trajectory.lost, have + 1, min(end + bool(finish), self._max_new_tokens + 1))
                touched.append(trajectory)
                continue
            trajectory.engine = engine
            trajectory.seen = now
            if fresh > 0:
                skip = count - fresh
                trajectory.ids += ids[4 * (begin + skip) : 4 * offset]
                trajectory.logprobs += logprobs[4 * (begin + skip) : 4 * offset]
                trajectory.received = end
                _extend(trajectory.spans, spans, first, cursor, skip)
                fresh_total += fresh
                if not finish:
                    streamed += fresh
            trajectory.finish = finish
            if finish or trajectory.interrupted:
                touched.append(trajectory)
        self._ledger.receive(fresh_total)
        self._tallies.streamed_before_end += streamed
        return touched, resend

    def _refuse_all(self, chunks: Chunks, detail: str) -> list[Trajectory]:
        """No row of a message with inconsistent columns can be told from its neighbours; all its requests have a
        hole from here on."""
        self._tallies.refused["bad_columns"] += 1
        self._tallies.last_refusal = f"chunks {chunks.sequence} of {chunks.engine}: {detail}"
        touched = []
        for rid in chunks.rids:
            trajectory = self.by_rid.get(rid)
            if trajectory is None or trajectory.state is not State.IN_FLIGHT or trajectory.finish:
                continue
            if trajectory.engine in ("", chunks.engine):
                trajectory.lost = max(trajectory.lost, trajectory.received + 1)
                touched.append(trajectory)
        return touched

    def _late(self, trajectory: Trajectory, finish: str) -> None:
        """A row of a dropped trajectory: its engine had not heard yet."""
        self._tallies.refused["after_drop"] += 1
        if finish == Finish.ABORT and not trajectory.finish:
            trajectory.finish = finish
            self._tallies.explain_abort(trajectory)

    def _unknown(self, rid: str) -> str:
        try:
            run, group, member, segment = parse_rid(rid)
        except ValueError:
            return "bad_rid"
        if run != self._run:
            return "other_run"
        known = self._groups.get(group)
        if known is not None and member < len(known.members) and segment < known.members[member].segment:
            return "old_segment"
        return "unknown_rid"


def _extend(
    held: list[tuple[int, int, int]], spans: list[tuple[int, int, int, int]], first: int, end: int, skip: int
) -> None:
    """Append the row's runs spans[first:end] without its first `skip` tokens, which are held already."""
    for _, history, step, count in spans[first:end]:
        if skip >= count:
            skip -= count
            continue
        count -= skip
        skip = 0
        if held and held[-1][0] == history and held[-1][1] == step:
            held[-1] = (history, step, held[-1][2] + count)
        else:
            held.append((history, step, count))


def _column_problem(chunks: Chunks) -> str:
    """Why the columns of a message do not fit together, or ""."""
    rows, tokens = len(chunks.rids), len(chunks.token_ids) if chunks.token_ids.ndim == 1 else -1
    if len(chunks.finishes) != rows or chunks.starts.shape != (rows,) or chunks.counts.shape != (rows,):
        return (
            f"{rows} rids, {len(chunks.finishes)} finishes, starts {chunks.starts.shape}, counts {chunks.counts.shape}"
        )
    if tokens < 0 or chunks.logprobs.shape != (tokens,):
        return f"token_ids {chunks.token_ids.shape}, logprobs {chunks.logprobs.shape}"
    if rows and int(chunks.counts.min()) < 0:
        return f"a count is {int(chunks.counts.min())}"
    if int(chunks.counts.sum(dtype=np.int64)) != tokens:
        return f"counts sum to {int(chunks.counts.sum(dtype=np.int64))}, {tokens} tokens came"
    if chunks.spans.ndim != 2 or chunks.spans.shape[1] != 4:
        return f"spans must be [spans, 4], got {chunks.spans.shape}"
    if len(chunks.spans):
        row, count = chunks.spans[:, 0], chunks.spans[:, 3]
        if int(row[0]) < 0 or int(row[-1]) >= rows or bool((row[1:] < row[:-1]).any()):
            return "spans must name existing rows in order"
        if int(count.min()) < 1 or int(count.max()) > tokens:
            return "every span must have 1 token at least and no more than the message"
    return ""


def _row_problems(chunks: Chunks) -> dict[int, str]:
    """Rows with impossible values, by reason; nearly always empty."""
    problems: dict[int, str] = {}
    bad = {
        "bad_token": chunks.token_ids < 0,
        "bad_logprob": ~((chunks.logprobs <= _MAX_LOGPROB) & (chunks.logprobs > -np.inf)),
    }
    for reason, where in bad.items():
        if where.any():
            ends = np.cumsum(chunks.counts, dtype=np.int64)
            rows = np.searchsorted(ends, np.flatnonzero(where), side="right")
            problems.update(dict.fromkeys(rows.tolist(), reason))
    covered = np.bincount(chunks.spans[:, 0], weights=chunks.spans[:, 3], minlength=len(chunks.rids))
    if (covered != chunks.counts).any():
        problems.update(dict.fromkeys(np.flatnonzero(covered != chunks.counts).tolist(), "bad_spans"))
    if len(chunks.starts) and int(chunks.starts.min()) < 0:
        problems.update(dict.fromkeys(np.flatnonzero(chunks.starts < 0).tolist(), "bad_start"))
    return problems
