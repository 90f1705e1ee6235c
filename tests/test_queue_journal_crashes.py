"""What was acknowledged survives kill -9, a torn log and a full disk; what was not is written later or never told."""

import os
import pathlib
import random
import resource
import select
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator

import pytest
from journal_builders import append, check_rows, state, tidy

from queues import journal as module
from queues.journal import Journal, JournalError, JournalFull


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "journal.db"


# -- kill -9 -------------------------------------------------------------------------------------------------------


def child(path: pathlib.Path, acknowledged: int) -> None:
    """Commit for ever, with snapshots and reclaiming, saying the number of each durable row."""
    with Journal.open(path, "r") as journal:
        check_rows(journal)
        while True:
            append(journal, random.randrange(1, 40))
            if not journal.is_saving and random.random() < 0.02:
                journal.snapshot(state(journal.appended))
            journal.commit()
            os.write(acknowledged, journal.committed.to_bytes(8, "little"))
            if not journal.is_tidy:
                journal.tidy()


def forked(act: Callable[[], None]) -> int:
    """The pid of a child that acts and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(1)
    return pid


def test_whatever_was_acknowledged_survives_kill_9_at_any_moment(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 32 << 10)
    monkeypatch.setattr(module, "LOG_BYTES", 64 << 10)
    chance = random.Random(0)
    rows = snapshots = 0
    for _ in range(40):
        read, write = os.pipe()
        pid = forked(lambda: child(path, write))  # noqa: B023  it acts at once
        os.close(write)
        with open(read, "rb") as pipe:
            told = pipe.read(8 * chance.randrange(1, 30))
            os.kill(pid, signal.SIGKILL)
            told += pipe.read()
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        last = int.from_bytes(told[len(told) // 8 * 8 - 8 : len(told) // 8 * 8], "little")
        with Journal.open(path, "r") as journal:
            first, rows = check_rows(journal)
            assert rows >= last > 0
            snapshots = max(snapshots, first)
    assert rows > 1000
    assert snapshots > 500


def test_a_journal_may_be_killed_while_it_is_made(tmp_path: pathlib.Path) -> None:
    chance, beginnings = random.Random(0), set()
    for number in range(25):
        path = tmp_path / f"{number}" / "journal.db"
        read, write = os.pipe()
        pid = forked(lambda: child(path, write))  # noqa: B023  it acts at once
        os.close(write)
        # at once, when it has said something, and at any moment in between
        patience = (0.0, 30.0)[number] if number < 2 else chance.uniform(0, 0.02)
        select.select([read], [], [], patience)
        os.kill(pid, signal.SIGKILL)
        with open(read, "rb") as pipe:
            told = pipe.read()
        os.waitpid(pid, 0)
        beginnings.add((path.exists(), bool(told)))
        with Journal.open(path, "r") as journal:
            assert check_rows(journal)[1] >= (int.from_bytes(told[-8:], "little") if told else 0)
    assert len(beginnings) > 1


def test_a_snapshot_of_which_parts_are_missing_is_never_used(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 5)
        journal.commit()
        journal.snapshot(state(5))
        tidy(journal)
        append(journal, 5)
        journal.commit()
        journal.snapshot(state(10))
        journal.tidy()
        assert journal.is_saving
        with Journal.inspect(path) as reader:
            assert check_rows(reader) == (5, 10)
        with sqlite3.connect(path) as database:
            assert {seq for (seq,) in database.execute("SELECT seq FROM snapshots")} == {5, 10}
    with Journal.open(path, "r") as journal:
        assert check_rows(journal) == (5, 10)
        tidy(journal)
        assert journal._database.query("SELECT DISTINCT seq FROM snapshots") == [(5,)]
        journal.snapshot(state(10))
        tidy(journal)
        assert check_rows(journal) == (10, 10)
        journal.snapshot(b"of the same row; its parts must not mix with the others")
        assert not journal.is_saving


def test_a_snapshot_waits_for_the_rows_that_it_holds(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 5)
        journal.snapshot(state(5))
        tidy(journal)
        assert journal.is_saving
        journal.commit()
        tidy(journal)
        assert not journal.is_saving and journal.num_rows == 0


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        for _ in range(2):
            append(journal, 5)
            journal.commit()
            journal.snapshot(state(journal.appended))
            tidy(journal)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE snapshots SET data = zeroblob(length(data)) WHERE seq = 10 AND part = 1")
    with Journal.open(path, "r") as journal:
        assert check_rows(journal) == (5, 10)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE snapshots SET data = zeroblob(length(data)) WHERE part = 0")
    with Journal.open(path, "r") as journal, pytest.raises(JournalError, match="expected row 1, the next is 6"):
        check_rows(journal)


# -- torn logs -----------------------------------------------------------------------------------------------------


def mutilations(size: int, chance: random.Random) -> Iterator[Callable[[bytes], bytes]]:
    """Ways in which the tail of a log may be lost."""
    for _ in range(10):
        at = chance.randrange(size)
        noise = chance.randbytes(chance.randrange(1, 40_000))
        yield lambda log, at=at: log[:at]  # type: ignore[misc]
        yield lambda log, at=at, noise=noise: log[:at] + noise  # type: ignore[misc]
        yield lambda log, at=at: log[:at] + bytes(len(log) - at)  # type: ignore[misc]
    yield lambda log: log + chance.randbytes(100_000)


def test_a_torn_log_loses_a_tail_and_nothing_else(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 50)
        journal.commit()
        journal.snapshot(state(50))
        tidy(journal)
        journal._database.checkpoint()
        for _ in range(40):
            append(journal, 5, 100)
            journal.commit()
        database, log = path.read_bytes(), path.with_name("journal.db-wal").read_bytes()
    torn = tmp_path / "torn" / "journal.db"
    lengths = set()
    for mutilate in mutilations(len(log), random.Random(1)):
        shutil.rmtree(torn.parent, ignore_errors=True)
        torn.parent.mkdir()
        torn.write_bytes(database)
        broken = mutilate(log)
        torn.with_name("journal.db-wal").write_bytes(broken)
        with Journal.open(torn, "r") as journal:
            first, last = check_rows(journal)
            assert first == 50 and last % 5 == 0
            assert last == 250 or broken[: len(log)] != log
            append(journal, 7)
            journal.commit()
        with Journal.open(torn, "r") as journal:
            assert check_rows(journal) == (50, last + 7)
        lengths.add(last)
    assert len(lengths) > 10


def test_a_log_without_its_database_or_a_new_file_begins_anew(path: pathlib.Path) -> None:
    path.touch()
    with Journal.open(path, "r") as journal:
        append(journal, 3)
        journal.commit()
    with Journal.open(path, "r") as journal:
        assert check_rows(journal) == (0, 3)


# -- full disks ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_everything_is_written_when_there_is_room(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 10)
        journal.commit()
        [(pages,)] = journal._database.query("PRAGMA page_count")
        journal._database.query(f"PRAGMA max_page_count = {pages + 2}")
        append(journal, 1000)
        for _ in range(3):
            with pytest.raises(JournalFull, match=r"disk is full \(\d+ MiB free\); nothing is lost, make room"):
                journal.commit()
            append(journal, 1)
            assert (journal.committed, journal.appended - 1010) == (10, _ + 1)
        with Journal.inspect(path) as reader:
            assert check_rows(reader) == (0, 10)
        journal._database.query("PRAGMA max_page_count = 1000000")
        while journal.committed < journal.appended:
            journal.commit()
        assert journal.pending_bytes == 0
        assert check_rows(journal) == (0, 1013)


def test_a_snapshot_that_finds_no_room_is_written_later(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 10)
        journal.commit()
        [(pages,)] = journal._database.query("PRAGMA page_count")
        journal._database.query(f"PRAGMA max_page_count = {pages + 300}")
        journal.snapshot(state(10))
        with pytest.raises(JournalFull):
            tidy(journal)
        assert journal.is_saving
        append(journal, 10)
        journal.commit()
        assert check_rows(journal) == (0, 20)
        journal._database.query("PRAGMA max_page_count = 1000000")
        tidy(journal)
        assert check_rows(journal) == (10, 20)


def test_a_file_that_cannot_grow_is_an_error_until_it_can(path: pathlib.Path) -> None:
    """The kernel's own refusal, in the middle of a write, in another process."""

    def act() -> None:
        with Journal.open(path, "r") as journal:
            append(journal, 10)
            journal.commit()
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
            failures = 0
            for _ in range(20):
                append(journal, 1000)
                try:
                    journal.commit()
                except JournalError:
                    failures += 1
            assert failures > 10 and 10 <= journal.committed < 20_010
            with Journal.inspect(path) as reader:
                assert reader.appended == journal.committed
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            while journal.committed < journal.appended:
                journal.commit()
            check_rows(journal)
        os._exit(0)

    assert os.waitpid(forked(act), 0)[1] == 0
    with Journal.open(path, "r") as journal:
        assert check_rows(journal) == (0, 20_010)


def test_a_queue_that_was_killed_on_a_full_disk_comes_back_on_it(path: pathlib.Path) -> None:
    """Nothing but the log's index may be written to open a journal; there is room for that, it was there before."""

    def killed() -> None:
        journal = Journal.open(path, "r")
        append(journal, 50)
        journal.commit()
        journal.snapshot(state(50))
        journal.tidy()
        append(journal, 2000)
        journal.commit()
        os.kill(os.getpid(), signal.SIGKILL)

    def back() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
        with Journal.open(path, "r") as journal:
            check_rows(journal)
            append(journal, 10)
            for step in (journal.commit, journal.tidy):
                with pytest.raises(JournalError, match="cannot write"):
                    step()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            journal.commit()
            tidy(journal)
        os._exit(0)

    assert os.waitpid(forked(killed), 0)[1] == signal.SIGKILL
    assert os.waitpid(forked(back), 0)[1] == 0
    with Journal.open(path, "r") as journal:
        assert check_rows(journal) == (0, 2060)
        assert journal._database.query("SELECT count(*) FROM snapshots") == [(0,)]
