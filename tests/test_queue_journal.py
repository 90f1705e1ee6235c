"""The journal: rows, records, its size on disk, and whose it is."""

import pathlib
import sqlite3
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_builders import append, check_rows, state, tidy

from queues import journal as module
from queues.core import Recovered, Tick
from queues.journal import Journal, JournalError, pack, replay, unpack
from queues.records import Ended, Step
from stream_rl import messages as m
from stream_rl import wire


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "journal.db"


# -- what is kept --------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_as_they_were_said(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        journal.append(0.5, "", "Recovered", ())
        journal.append(1.0, "engine-0", "ActorStats", wire.encode(m.ActorStats(counters={"a": 1.5})))
        journal.append(2.0, "", "Tick", ())
        journal.commit()
    with Journal.open(path, "r") as journal:
        data, rows = journal.recover()
        found = list(rows)
    assert data is None
    assert [(row.seq, row.at, row.sender) for row in found] == [(1, 0.5, ""), (2, 1.0, "engine-0"), (3, 2.0, "")]
    assert [type(row.event) for row in found] == [Recovered, m.ActorStats, Tick]
    assert found[1].event.counters == {"a": 1.5}
    assert [row.seq for row in replay(path)] == [1, 2, 3]


def test_nothing_is_durable_before_a_commit_and_all_of_it_after(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 200)
        assert (journal.appended, journal.committed) == (200, 0)
        assert journal.pending_bytes == journal.grown_bytes > 200 * 100
        with Journal.inspect(path) as reader:
            assert list(reader.rows()) == []
        journal.commit()
        assert (journal.committed, journal.pending_bytes) == (200, 0)
        with Journal.inspect(path) as reader:
            assert check_rows(reader) == (0, 200)


def test_a_long_backlog_is_committed_bit_by_bit_and_in_order(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    with Journal.open(path, "r") as journal:
        append(journal, 100)
        steps = []
        while journal.committed < 100:
            journal.commit()
            steps.append(journal.committed)
        assert len(steps) > 10 and steps == sorted(set(steps))
        assert check_rows(journal) == (0, 100)


def test_one_thread_appends_while_another_commits(path: pathlib.Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done = threading.Event()
    try:
        with Journal.open(path, "r", fsync=False) as journal:

            def commit() -> None:
                while not done.is_set() or journal.pending_bytes:
                    journal.commit()

            thread = threading.Thread(target=commit)
            thread.start()
            append(journal, 20_000, 10)
            done.set()
            thread.join(60)
            assert check_rows(journal, 10) == (0, 20_000)
    finally:
        done.set()
        sys.setswitchinterval(interval)


def test_outcomes_and_steps_are_replaced_by_later_ones(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        first = [Ended(1, 0, "applied", "", 0, 4), Ended(1, 1, "dropped", "too_old"), Step(0, 4, "trained", (1,), (0,))]
        journal.append(0.0, "", "Tick", (), first)
        journal.commit()
        again = [Ended(1, 0, "forked", "", 0, 4), Ended(1, 0, "applied", "", 1, 4), Step(1, 4, "skipped", (1,), (0,))]
        journal.append(0.0, "", "Tick", (), again)
        journal.record(first[1:])
        journal.commit()
    with sqlite3.connect(path) as database:
        outcomes = database.execute("SELECT * FROM outcomes ORDER BY member").fetchall()
        steps = database.execute("SELECT * FROM steps").fetchall()
    assert outcomes == [(1, 0, "applied", "", 1, 4), (1, 1, "dropped", "too_old", -1, -1)]
    assert steps == [(0, 4, "trained", "[1]", "[0]"), (1, 4, "skipped", "[1]", "[0]")]


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_frames_are_packed_and_unpacked(frames: list[bytes]) -> None:
    assert [bytes(frame) for frame in unpack(pack(frames))] == frames
    if frames and frames[-1]:
        with pytest.raises(ValueError, match="end within a frame"):
            unpack(pack(frames)[:-1])


# -- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_the_size_is_bounded_by_two_snapshots_and_what_follows_them(path: pathlib.Path, keep: bool) -> None:
    """60 rows of 10 kB between snapshots of 6 MB: 12 MB of snapshots and one being written, 1.2 MB of rows, the log."""
    sizes = []
    with Journal.open(path, "r", fsync=False, keep=keep) as journal:
        for _ in range(40):
            append(journal, 60, 10_000)
            journal.commit()
            if not journal.is_saving:
                journal.snapshot(state(journal.appended))
            tidy(journal)
            sizes.append(journal.bytes_on_disk)
            assert journal.grown_bytes == journal.num_rows == 0
        [(oldest, count)] = journal._database.query("SELECT min(seq), count(*) FROM events")
        whole = journal._database.query("SELECT DISTINCT seq FROM snapshots ORDER BY seq")
        assert whole == [(2340,), (2400,)]
        assert (oldest, count) == ((1, 2400) if keep else (2341, 60))
    assert len(list(replay(path))) == (2400 if keep else 60)
    if not keep:
        assert max(sizes) < 3 * len(state(0)) + 2 * 60 * 10_000 + module.LOG_BYTES + (2 << 20)
        assert max(sizes[20:]) <= max(sizes[:20])


def test_a_reader_sees_one_moment_while_the_run_goes_on(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 5)
        journal.commit()
        journal.snapshot(state(5))
        tidy(journal)
        append(journal, 5)
        journal.commit()
        with Journal.inspect(path) as reader:
            for _ in range(3):
                append(journal, 5)
                journal.commit()
                journal.snapshot(state(journal.appended))
                tidy(journal)
            assert check_rows(reader) == (5, 10)
        with Journal.inspect(path) as reader:
            assert check_rows(reader) == (25, 25)


def test_a_long_log_is_emptied(path: pathlib.Path) -> None:
    longest = 0
    with Journal.open(path, "r", fsync=False) as journal:
        for _ in range(400):
            append(journal, 10, 10_000)
            journal.commit()
            longest = max(longest, journal._database.log_bytes)
            tidy(journal)
    assert module.LOG_BYTES < longest < module.LOG_BYTES + (1 << 20)


def test_a_reader_of_an_old_state_delays_nothing(path: pathlib.Path) -> None:
    with Journal.open(path, "r", fsync=False) as journal, sqlite3.connect(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchall()
        for _ in range(100):
            append(journal, 10, 20_000)
            journal.commit()
            tidy(journal)
        assert journal._database.log_bytes > 2 * module.LOG_BYTES
        reader.execute("COMMIT")
        append(journal, 450, 20_000)
        journal.commit()
        tidy(journal)
        assert journal._database.log_bytes == 0


# -- whose it is ---------------------------------------------------------------------------------------------------


def test_a_journal_of_another_run_format_or_settings_is_refused_by_name(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.open(path, "r", {"min_tokens": 4}).close()
    with pytest.raises(JournalError, match=r"has run 'r', expected 'other'; move it away"):
        Journal.open(path, "other", {"min_tokens": 4})
    with pytest.raises(JournalError, match=r'has settings .*"min_tokens": 4.*expected .*"min_tokens": 5'):
        Journal.open(path, "r", {"min_tokens": 5})
    monkeypatch.setattr(module, "FORMAT", "stream_rl journal 99")
    with pytest.raises(JournalError, match="has format 'stream_rl journal 1', expected 'stream_rl journal 99'"):
        Journal.open(path, "r", {"min_tokens": 4})


def test_what_is_no_journal_is_refused_and_left_alone(path: pathlib.Path) -> None:
    path.write_bytes(b"a diary\n" * 1000)
    with pytest.raises(JournalError, match="file is not a database"):
        Journal.open(path, "r")
    assert path.read_bytes() == b"a diary\n" * 1000
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (title)")
    with pytest.raises(JournalError, match="has format None"):
        Journal.open(path, "r")
    with pytest.raises(JournalError, match="there is no journal"):
        Journal.inspect(path.with_name("nothing.db"))


def test_two_processes_cannot_write_the_same_journal(path: pathlib.Path) -> None:
    with Journal.open(path, "r"), pytest.raises(JournalError, match="in use by another queue process"):
        Journal.open(path, "r")
    Journal.open(path, "r").close()


def test_a_missing_row_is_an_error_not_a_shorter_story(path: pathlib.Path) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 9)
        journal.commit()
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM events WHERE seq = 4")
    with Journal.open(path, "r") as journal, pytest.raises(JournalError, match="expected row 4, the next is 5"):
        check_rows(journal)


@pytest.mark.parametrize("blob", [b"", b"\x05\x00\x00\x00abc", b"\x03\x00\x00\x00abc", b"\xff"])
def test_a_row_that_is_no_message_is_an_error_that_names_it(path: pathlib.Path, blob: bytes) -> None:
    with Journal.open(path, "r") as journal:
        append(journal, 2)
        journal.commit()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE events SET frames = ? WHERE seq = 2", (blob,))
    with Journal.open(path, "r") as journal, pytest.raises(JournalError, match="row 2, a CloseTrajectory, cannot be"):
        check_rows(journal)
