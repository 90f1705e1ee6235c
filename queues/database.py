"""The journal's SQLite database: its tables, how it is opened, and its errors in our words."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stream_rl.errors import StreamRLError

ROWS_PER_STATEMENT = 64
"""Statements are prepared once for each number of rows, and kept."""
BUSY_MS = 1000
"""Longest wait for somebody else's transaction; nobody else should write."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, at REAL, sender TEXT, kind TEXT, frames BLOB);
CREATE TABLE snapshots (seq INTEGER, part INTEGER, parts INTEGER, crc INTEGER, data BLOB, PRIMARY KEY (seq, part));
CREATE TABLE outcomes (group_id INTEGER, member INTEGER, outcome TEXT, reason TEXT, history INTEGER, step INTEGER,
    PRIMARY KEY (group_id, member)) WITHOUT ROWID;
CREATE TABLE steps (history INTEGER, step INTEGER, outcome TEXT, groups TEXT, members TEXT,
    PRIMARY KEY (history, step)) WITHOUT ROWID;
"""


class JournalError(StreamRLError, OSError):
    """The journal cannot be opened, read or written."""


class JournalFull(JournalError):
    """The journal's disk is full; what is pending stays so until there is room."""


Statement = tuple[str, Sequence[Any]]


class Database:
    """One connection.  Any thread may use it, one at a time."""

    def __init__(self, path: pathlib.Path, readonly: bool) -> None:
        """Raises JournalError if there is nothing that SQLite can open."""
        self.path = path
        with self.errors("open"):
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={'ro' if readonly else 'rwc'}",
                uri=True,
                timeout=BUSY_MS / 1000,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=4 * ROWS_PER_STATEMENT,
            )

    def close(self) -> None:
        self._connection.close()

    def prepare(self, fsync: bool) -> None:
        """Settings of a database that is written."""
        for setting, value in (
            ("page_size", 16384),  # fits what is written: about 20 kB a row
            ("journal_mode", "WAL"),
            ("synchronous", "FULL" if fsync else "NORMAL"),
            # The log is emptied by `checkpoint` only, and wholly: then no tail of it that is lost holds pages which
            # the database has in a newer state already.
            ("wal_autocheckpoint", 0),
            ("secure_delete", 0),
            ("busy_timeout", BUSY_MS),
        ):
            self.query(f"PRAGMA {setting} = {value}")

    def claim(self, meta: Mapping[str, str]) -> None:
        """Make the tables of a new journal, or check that an old one has this `meta`: nothing is written then, so that
        a queue can be started again on a full disk.  Raises JournalError."""
        if not self.query("SELECT count(*) FROM sqlite_master")[0][0]:
            schema: list[Statement] = [(table, ()) for table in _SCHEMA.split(";") if table.strip()]
            created = ("created", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            self.transact([*schema, *inserts("meta", [*meta.items(), created])])
            self.checkpoint()
        tables = {name for (name,) in self.query("SELECT name FROM sqlite_master")}
        held = dict(self.query("SELECT key, value FROM meta")) if "meta" in tables else {}
        for key, expected in meta.items():
            if held.get(key) != expected:
                raise JournalError(
                    f"{self.path} has {key} {held.get(key)!r}, expected {expected!r}; "
                    "move it away, or give another --journal"
                )

    def query(self, sql: str, *values: Any) -> list[Any]:
        """All rows.  Raises JournalError."""
        with self.errors("read"):
            return self._connection.execute(sql, values).fetchall()

    def each(self, sql: str, *values: Any) -> Iterator[Any]:
        """Row by row.  Raises JournalError."""
        with self.errors("read"):
            yield from self._connection.execute(sql, values)

    def transact(self, statements: Sequence[Statement]) -> None:
        """All of them or none, durably.  Raises JournalError."""
        if len(statements) > 1:  # one is a transaction by itself
            statements = [("BEGIN IMMEDIATE", ()), *statements, ("COMMIT", ())]
        try:
            with self.errors("write"):
                for sql, values in statements:
                    self._connection.execute(sql, values)
        except JournalError:
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            raise

    def checkpoint(self) -> None:
        """Copy the log into the database and empty it; not while somebody is reading an old state."""
        with self.errors("write"):
            self._connection.execute("PRAGMA busy_timeout = 0")
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")

    @property
    def log_bytes(self) -> int:
        """Length of the write-ahead log."""
        return _size(self.path.with_name(self.path.name + "-wal"))

    @property
    def total_bytes(self) -> int:
        """On disk, the log included."""
        return _size(self.path) + self.log_bytes

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                free = shutil.disk_usage(self.path.parent).free >> 20
                raise JournalFull(
                    f"cannot {what} {self.path}: its disk is full ({free} MiB free); nothing is lost, make room"
                ) from error
            raise JournalError(f"cannot {what} {self.path}: {error}") from error


def inserts(table: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[Statement]:
    """Statements that put `rows` in; a row of the same key is replaced.

    A statement takes many rows because sqlite3 gives the GIL away for each statement: with an event loop busy beside
    it, 20 rows of 20 kB took 90 ms one by one and 6 ms together.
    """
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        some = rows[start : start + ROWS_PER_STATEMENT]
        row = f"({', '.join('?' * len(some[0]))})"
        yield f"INSERT OR REPLACE INTO {table} VALUES {', '.join([row] * len(some))}", [v for r in some for v in r]


def lock(path: pathlib.Path) -> int:
    """Keep other queues off this journal: two of them would each acknowledge what the other lacks.

    The lock is a descriptor and ends with this process.  Raises JournalError if another has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise JournalError(f"cannot make {path}.lock: {error.strerror}; give another --journal") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise JournalError(f"{path} is in use by another queue process; wait for its end, or kill it") from None
    return descriptor


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
