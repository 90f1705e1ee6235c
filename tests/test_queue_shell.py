"""The shell around the core, with a journal that is slow or fails: what may leave when, and what is taken."""

import asyncio
import contextlib
import pathlib
import threading
from collections.abc import AsyncIterator

import pytest
from queue_builders import RUN, Row, make_chunks, make_core, rid
from queue_dialogue import hello, next_of, run, until

from queues import process as module
from queues.journal import Journal, JournalFull
from queues.process import QueueProcess
from stream_rl import messages as m
from stream_rl.errors import PeerTimeout
from stream_rl.transport import Dealer, Router


class SlowJournal(Journal):
    """Commits only while the gate is open."""

    gate: threading.Event
    full = False

    def commit(self) -> None:
        self.gate.wait(30)
        if self.full:
            raise JournalFull("full")
        super().commit()


@contextlib.asynccontextmanager
async def shell(path: pathlib.Path) -> AsyncIterator[tuple[str, SlowJournal]]:
    """A QueueProcess in this process, and its journal."""
    core = make_core()
    with SlowJournal.open(path / "journal.db", RUN, fsync=False) as journal:
        journal.gate = threading.Event()
        journal.gate.set()
        async with Router.bind("tcp://127.0.0.1:0") as router, asyncio.TaskGroup() as group:
            process = QueueProcess(core, router, journal, core.settings.queue)
            tasks = [group.create_task(loop) for loop in (process.serve(), process.commit(), process.tick())]
            try:
                yield router.address, journal
            finally:
                journal.gate.set()
                for task in tasks:
                    task.cancel()


def test_no_answer_overtakes_a_row_that_is_not_durable_but_observers_are_told(tmp_path: pathlib.Path) -> None:
    async def play() -> None:
        async with (
            shell(tmp_path) as (address, journal),
            Dealer.connect(address, "engine-0@1") as engine,
            Dealer.connect(address, "observer-0@1") as observer,
        ):
            await engine.request(hello("engine"), m.Welcome, 10)
            await observer.request(hello("observer"), m.Welcome, 10)
            journal.gate.clear()
            chunks = make_chunks([Row(rid(9), 0, [1])])
            await engine.send(chunks)
            await engine.send(chunks)
            # The second changed nothing.  Its answer would acknowledge the first, all the same.
            await until(observer, lambda s: s.fields.get("refused.message_again") == 1)
            with pytest.raises(PeerTimeout):
                await engine.receive(0.1)
            assert journal.pending_bytes > 0
            journal.gate.set()
            assert [(await engine.receive(10)).next_sequence for _ in range(2)] == [1, 1]

    run(play())


def test_what_answers_an_old_incarnation_does_not_reach_the_new_one(tmp_path: pathlib.Path) -> None:
    async def play() -> None:
        async with (
            shell(tmp_path) as (address, journal),
            Dealer.connect(address, "engine-0@1") as old,
            Dealer.connect(address, "engine-0@2") as new,
            Dealer.connect(address, "observer-0@1") as observer,
        ):
            await old.request(hello("engine"), m.Welcome, 10)
            await observer.request(hello("observer"), m.Welcome, 10)
            journal.gate.clear()
            await old.send(make_chunks([Row(rid(9), 0, [1])]))
            await until(observer, lambda s: s.fields.get("refused.unknown_rid") == 1)
            await new.send(hello("engine", 2))
            await asyncio.sleep(0.1)
            journal.gate.set()
            welcome = await new.receive(10)
            assert isinstance(welcome, m.Welcome) and welcome.next_sequence == 0
            assert (await old.receive(10)).next_sequence == 1

    run(play())


def test_senders_wait_while_too_much_is_not_durable(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 20 * module.HELD_BYTES)

    async def play() -> None:
        async with (
            shell(tmp_path) as (address, journal),
            Dealer.connect(address, "engine-0@1") as engine,
            Dealer.connect(address, "observer-0@1") as observer,
        ):
            await engine.request(hello("engine"), m.Welcome, 10)
            await observer.request(hello("observer"), m.Welcome, 10)
            journal.gate.clear()
            for sequence in range(100):
                await engine.send(make_chunks([Row(rid(9), 0, [1])], sequence))
            with pytest.raises(PeerTimeout):
                await engine.receive(0.3)
            assert 0 < journal.appended < 30
            journal.gate.set()
            for sequence in range(100):
                assert (await engine.receive(10)).next_sequence == sequence + 1

    run(play())


def test_while_the_journal_fails_only_observers_are_heard_when_too_much_waits(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 20 * module.HELD_BYTES)

    async def play() -> None:
        async with (
            shell(tmp_path) as (address, journal),
            Dealer.connect(address, "engine-0@1") as engine,
            Dealer.connect(address, "observer-0@1") as observer,
        ):
            await engine.request(hello("engine"), m.Welcome, 10)
            journal.full = True
            for sequence in range(100):
                await engine.send(make_chunks([Row(rid(9), 0, [1])], sequence))
            await observer.request(hello("observer"), m.Welcome, 10)
            answer = await until(observer, lambda s: s.fields.get("refused.journal_failing", 0) > 0)
            assert answer.texts["queue.journal"] == "full"
            left = 100 - int(answer.fields["refused.unknown_rid"])
            assert 60 < left < 100
            await until(observer, lambda s: s.fields["refused.journal_failing"] == left)
            journal.full = False
            acked = 0
            while acked < 100 - left:
                acked = (await engine.receive(10)).next_sequence
            await engine.send(make_chunks([Row(rid(9), 0, [1])], 100))
            answer = await next_of(engine, m.Ack)
            assert (answer.next_sequence, answer.resend) == (100 - left, True)

    run(play())


def test_a_message_that_no_row_can_hold_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 10_000)

    async def play() -> None:
        async with shell(tmp_path) as (address, _), Dealer.connect(address, "engine-0@1") as engine:
            await engine.request(hello("engine"), m.Welcome, 10)
            refused = await engine.request(make_chunks([Row(rid(9), 0, range(2000))]), m.Refused, 10)
            assert refused.reason == "too_large"
            assert "at most 10000" in refused.detail
            ack = await engine.request(make_chunks([Row(rid(9), 0, range(200))]), m.Ack, 10)
            assert ack.next_sequence == 1

    run(play())
