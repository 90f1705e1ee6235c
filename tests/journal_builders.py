"""Rows that tell their own number, for the journal's tests."""

from queues import journal as module
from queues.journal import Journal
from stream_rl import messages as m
from stream_rl import wire


def frames_of(number: int, size: int = 100) -> list[wire.Frame]:
    """A message that tells its own row."""
    return wire.encode(m.CloseTrajectory(sequence=number, group=number, member=0, status="x" * size))


def append(journal: Journal, count: int, size: int = 100) -> None:
    for _ in range(count):
        number = journal.appended + 1
        journal.append(number / 8, f"actor-{number % 3}", "CloseTrajectory", frames_of(number, size))


def tidy(journal: Journal) -> None:
    while not journal.is_tidy:
        journal.tidy()


def check_rows(journal: Journal, size: int = 100) -> tuple[int, int]:
    """(row of the snapshot, last row) after asserting that everything between is there and whole."""
    data, rows = journal.recover()
    last = first = int.from_bytes(data[:8], "little") if data else 0
    assert not data or data == state(first)
    for row in rows:
        assert row.seq == last + 1
        assert (row.at, row.sender) == (row.seq / 8, f"actor-{row.seq % 3}")
        assert (row.event.sequence, row.event.status) == (row.seq, "x" * size)
        last = row.seq
    assert last == journal.appended == journal.committed
    return first, last


def state(row: int) -> bytes:
    """A snapshot of a few parts that tells its row."""
    return row.to_bytes(8, "little") * (3 * module.PART_BYTES // 16)
