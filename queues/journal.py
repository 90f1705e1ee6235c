"""The queue's journal: every accepted message as a row of a SQLite database, so that the queue survives its process.

    events     one row for each event that changed the queue's state, in order, with its wire frames as they came
    snapshots  the whole state after some row, in parts; the newest two are kept, and the events after the older one
    outcomes   what has become of each trajectory      for people and for proofs; a replay writes the same rows again
    steps      what has become of each step's lease
    meta       whose journal it is

`append` only remembers; `commit` writes what was appended in one transaction, after which it may be acknowledged.
`commit` and `tidy` block: they are for one thread, `append` and `snapshot` for one other.
"""

import contextlib
import json
import logging
import os
import pathlib
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import msgspec

from queues import snapshot
from queues.core import JOURNAL, QueueCore, Recovered, Settings, Tick
from queues.database import Database, JournalError, JournalFull, inserts, lock
from queues.ledger import State
from queues.records import Ended, Step
from stream_rl import wire
from stream_rl.errors import WireError

__all__ = ["Journal", "JournalError", "JournalFull", "Row", "recover_core", "replay"]

log = logging.getLogger(__name__)

FORMAT = "stream_rl journal 1"
PART_BYTES = 4 << 20
"""Of a snapshot, or of what is reclaimed at a time: commits wait for one part, about 15 ms, not for all of them."""
LOG_BYTES = 8 << 20
"""The write-ahead log is copied into the database and emptied when it is longer: 20 to 30 ms."""
BATCH_BYTES = 16 << 20
"""Of one transaction, so that a long backlog is acknowledged bit by bit."""
ROW_BYTES = 64
"""What a row takes beside its frames."""

_BARE = {cls.__name__: cls for cls in (Tick, Recovered)}
"""Events of the shell itself; they have no frames."""
_WHOLE = "SELECT seq FROM snapshots GROUP BY seq HAVING count(*) = max(parts)"


class Row(NamedTuple):
    """One event of the journal."""

    seq: int
    """Counts from 1, without gaps."""
    at: float
    """The core's time."""
    sender: str
    event: Any


class _Pending(NamedTuple):
    rows: Sequence[tuple[int, float, str, str, bytes]]
    """One, or none beside records that are written again."""
    records: Sequence[Any]

    @property
    def num_bytes(self) -> int:
        return sum(len(row[-1]) + ROW_BYTES for row in self.rows)


class Journal:
    def __init__(self, database: Database, descriptor: int = -1, keep: bool = True) -> None:
        """For `open` and `inspect`."""
        self.path = database.path
        self._database = database
        self._lock = descriptor
        self._keep = keep
        self.meta: dict[str, str] = dict(database.query("SELECT key, value FROM meta"))
        """format, run, settings (JSON), created."""
        newest = max((seq for (seq,) in database.query(_WHOLE)), default=0)
        [(last,)] = database.query("SELECT coalesce(max(seq), 0) FROM events")
        self.appended: int = max(last, newest)
        """The last row that was appended."""
        self.committed: int = self.appended
        """The last row that is durable."""
        self._snapshot_seq: int = newest
        after = "SELECT coalesce(sum(length(frames) + ?), 0) FROM events WHERE seq > ?"
        self._bytes_appended: int = database.query(after, ROW_BYTES, newest)[0][0]
        self._bytes_committed: int = self._bytes_appended
        self._bytes_at_snapshot: int = 0
        self._pending: deque[_Pending] = deque()
        self._writing: list[_Pending] = []
        """Taken from `_pending` by a commit that has not succeeded yet."""
        self._saving: tuple[int, bytes, int] | None = None
        """The snapshot that is being written: its row, the state, the next part."""
        self._to_reclaim = True
        self._checkpoint_above = LOG_BYTES
        self.commit_ms: deque[float] = deque(maxlen=1024)
        """Durations of the last commits."""

    @classmethod
    def open(
        cls,
        path: pathlib.Path,
        run: str,
        settings: Mapping[str, object] | None = None,
        *,
        fsync: bool = True,
        keep: bool = False,
    ) -> Self:
        """The journal of `run` at `path`, made if it is not there.  `settings` must be the same each time, since a
        replay under others would lead to another state.  `keep`: never delete events.

        Raises JournalError for a journal of another run or format, one in use, and what is no journal.
        """
        with contextlib.ExitStack() as undo:
            descriptor = lock(path)
            undo.callback(os.close, descriptor)
            database = Database(path, readonly=False)
            undo.callback(database.close)
            database.prepare(fsync)
            database.claim({"format": FORMAT, "run": run, "settings": json.dumps(dict(settings or {}), sort_keys=True)})
            journal = cls(database, descriptor, keep)
            undo.pop_all()
            return journal

    @classmethod
    def inspect(cls, path: pathlib.Path) -> Self:
        """A journal to read only, of a run that is dead or goes on meanwhile: as it is now.  Raises JournalError."""
        if not path.exists():
            raise JournalError(f"there is no journal {path}; has the run started?")
        with contextlib.ExitStack() as undo:
            database = Database(path, readonly=True)
            undo.callback(database.close)
            database.query("BEGIN")  # all that is read is of one moment, whatever the run writes meanwhile
            journal = cls(database)
            undo.pop_all()
            return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What is pending is not written: nobody was told of it."""
        self._database.close()
        if self._lock >= 0:
            os.close(self._lock)

    # -- reading -----------------------------------------------------------------------------------------------

    def recover(self) -> tuple[bytes | None, Iterator[Row]]:
        """The newest whole snapshot, and the events after it.  Raises JournalError, also while iterating, where the
        journal is damaged."""
        for (seq,) in self._database.query(f"{_WHOLE} ORDER BY seq DESC"):
            parts = self._database.query("SELECT crc, data FROM snapshots WHERE seq = ? ORDER BY part", seq)
            if all(zlib.crc32(data) == crc for crc, data in parts):
                return b"".join(data for _, data in parts), self.rows(after=seq)
            log.warning("%s: the snapshot of row %d is damaged; going back to the one before", self.path, seq)
        return None, self.rows(after=0)

    def rows(self, after: int | None = None) -> Iterator[Row]:
        """Events in order: all that are there, or those after row `after` without a gap.  Raises JournalError."""
        expected = None if after is None else after + 1
        query = "SELECT seq, at, sender, kind, frames FROM events WHERE seq > ? ORDER BY seq"
        for seq, at, sender, kind, frames in self._database.each(query, after or 0):
            if expected is not None and seq != expected:
                raise JournalError(f"{self.path}: expected row {expected}, the next is {seq}; nothing can be recovered")
            expected = seq + 1
            try:
                event = _BARE[kind]() if kind in _BARE else wire.decode(unpack(frames))
            except (WireError, ValueError, TypeError) as error:
                raise JournalError(f"{self.path}: row {seq}, a {kind}, cannot be read: {error}") from error
            yield Row(seq, at, sender, event)

    # -- how much ----------------------------------------------------------------------------------------------

    @property
    def pending_bytes(self) -> int:
        """Appended and not durable yet."""
        return self._bytes_appended - self._bytes_committed

    @property
    def grown_bytes(self) -> int:
        """Appended since the newest snapshot was taken."""
        return self._bytes_appended - self._bytes_at_snapshot

    @property
    def num_rows(self) -> int:
        """Events after the newest whole snapshot: what a restart replays."""
        return self.appended - self._snapshot_seq

    @property
    def bytes_on_disk(self) -> int:
        return self._database.total_bytes

    # -- writing -----------------------------------------------------------------------------------------------

    def append(
        self, at: float, sender: str, kind: str, frames: Sequence[wire.Frame], records: Sequence[Any] = ()
    ) -> int:
        """Remember an event, to be written by the next commit together with the records that it led to; its row."""
        self.appended += 1
        pending = _Pending([(self.appended, at, sender, kind, pack(frames))], records)
        self._bytes_appended += pending.num_bytes
        self._pending.append(pending)
        return self.appended

    def record(self, records: Sequence[Any]) -> None:
        """Remember records that a replay has given again."""
        if records:
            self._pending.append(_Pending((), records))

    def commit(self) -> None:
        """Make what was appended durable, at most about BATCH_BYTES of it.

        Raises JournalError, JournalFull among them.  What was to be written is then written by the next commit.
        """
        size = sum(pending.num_bytes for pending in self._writing)
        while self._pending and size < BATCH_BYTES:
            self._writing.append(self._pending.popleft())
            size += self._writing[-1].num_bytes
        if not self._writing:
            return
        started = time.perf_counter()
        rows = [row for pending in self._writing for row in pending.rows]
        records = [record for pending in self._writing for record in pending.records]
        self._database.transact([*inserts("events", rows), *_record_inserts(records)])
        self.commit_ms.append(1000 * (time.perf_counter() - started))
        self._writing.clear()
        self._bytes_committed += size
        if rows:
            self.committed = rows[-1][0]

    # -- housekeeping ------------------------------------------------------------------------------------------

    def snapshot(self, data: bytes) -> None:
        """Remember the state after the last appended row.  `tidy` writes it, part by part, then reclaims what it and
        the one before make superfluous."""
        assert self._saving is None, "a snapshot is being written"
        self.postpone_snapshot()
        if self.appended > self._snapshot_seq:
            self._saving = self.appended, data, 0

    def postpone_snapshot(self) -> None:
        """No state could be had: count the growth from here on."""
        self._bytes_at_snapshot = self._bytes_appended

    @property
    def is_saving(self) -> bool:
        """A snapshot is being written."""
        return self._saving is not None

    @property
    def is_tidy(self) -> bool:
        """`tidy` has nothing to do now."""
        return not (self._to_reclaim or self._may_save() or self._database.log_bytes > self._checkpoint_above)

    def tidy(self) -> None:
        """One part of what is to be done beside commits: empty a long log, write a snapshot, reclaim.

        Raises JournalError; what failed is done by a later call.
        """
        if self._database.log_bytes > self._checkpoint_above:
            self._database.checkpoint()
            self._checkpoint_above = self._database.log_bytes + LOG_BYTES  # it stays long while somebody reads
        elif self._may_save():
            self._save_part()
        elif self._to_reclaim:
            self._to_reclaim = self._reclaim_part()

    def _may_save(self) -> bool:
        return self._saving is not None and self._saving[0] <= self.committed

    def _save_part(self) -> None:
        assert self._saving is not None
        seq, data, part = self._saving
        parts = max(1, -(-len(data) // PART_BYTES))
        piece = memoryview(data)[part * PART_BYTES : (part + 1) * PART_BYTES]
        # Parts of another process's snapshot of the same row must not mix with these.
        forget = [] if part else [("DELETE FROM snapshots WHERE seq = ?", (seq,))]
        self._database.transact([*forget, *inserts("snapshots", [(seq, part, parts, zlib.crc32(piece), piece)])])
        if part + 1 < parts:
            self._saving = seq, data, part + 1
        else:
            self._snapshot_seq, self._to_reclaim = seq, True
            self._saving = None

    def _reclaim_part(self) -> bool:
        """Delete some of what the two newest snapshots make superfluous.  Returns whether there may be more."""
        newest = f"SELECT seq FROM ({_WHOLE} ORDER BY seq DESC LIMIT 2)"
        if old := self._database.query(f"SELECT seq, part FROM snapshots WHERE seq NOT IN ({newest}) LIMIT 1"):
            self._database.transact([("DELETE FROM snapshots WHERE seq = ? AND part = ?", old[0])])
            return True
        [(older, count)] = self._database.query(f"SELECT min(seq), count(*) FROM ({newest})")
        if count < 2 or self._keep:
            return False
        # Lengths are at the beginning of a row: this reads no frames.
        [(first, upto)] = self._database.query(
            "SELECT min(seq), max(seq) FILTER (WHERE total <= ?) FROM (SELECT seq, sum(n) OVER (ORDER BY seq) AS total "
            "FROM (SELECT seq, length(frames) + ? AS n FROM events WHERE seq <= ? ORDER BY seq LIMIT 4096))",
            *(PART_BYTES, ROW_BYTES, older),
        )
        if first is None:
            return False
        self._database.transact([("DELETE FROM events WHERE seq <= ?", (upto or first,))])
        return True


def recover_core(journal: Journal, settings: Settings | None = None) -> QueueCore:
    """The core as it was after the last durable row; its time is that row's.  Without `settings`, those under which
    the journal was written.

    Raises JournalError or SnapshotError if the journal is damaged.
    """
    started = time.perf_counter()
    settings = settings or msgspec.json.decode(journal.meta["settings"], type=Settings)
    data, rows = journal.recover()
    core: QueueCore = QueueCore(settings) if data is None else snapshot.load(data)
    count = 0
    for row in rows:
        count += 1
        actions = core.handle(row.at, row.sender, row.event)
        journal.record([message for recipient, message in actions if recipient == JOURNAL])
    if journal.appended:
        log.info(
            "recovered %s up to row %d in %.2f s: %d rows on a snapshot of %.1f MB; %d trajectories are in flight",
            *(journal.path, journal.appended, time.perf_counter() - started, count, len(data or b"") / 1e6),
            core.ledger.trajectories[State.IN_FLIGHT],
        )
    return core


def replay(path: pathlib.Path) -> Iterator[Row]:
    """The events that a journal still holds, in order: those of the whole run if it was told to keep them.

    Raises JournalError.
    """
    with Journal.inspect(path) as journal:
        yield from journal.rows()


def pack(frames: Sequence[wire.Frame]) -> bytes:
    """Frames in one piece, each behind its length."""
    return b"".join(piece for frame in frames for piece in (struct.pack("<I", len(frame)), frame))


def unpack(blob: bytes) -> list[memoryview]:
    """Inverse of `pack`.  Raises ValueError for what it did not make."""
    frames, at, view = [], 0, memoryview(blob)
    while at < len(view):
        begin = at + 4
        at = begin + int.from_bytes(view[at:begin], "little")
        if begin > len(view) or at > len(view):
            raise ValueError(f"{len(view)} bytes end within a frame")
        frames.append(view[begin:at])
    return frames


def _record_inserts(records: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    ended = [(r.group, r.member, r.outcome, r.reason, r.history, r.step) for r in records if isinstance(r, Ended)]
    yield from inserts("outcomes", ended)
    steps = [
        (r.history, r.step, r.outcome, json.dumps(r.groups), json.dumps(r.members))
        for r in records
        if isinstance(r, Step)
    ]
    yield from inserts("steps", steps)
