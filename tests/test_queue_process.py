"""The real queue process, spoken to over ZeroMQ, killed and started again."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from queue_builders import RUN, Row, make_chunks, rid
from queue_dialogue import close, hello, next_of, open_group, run, status, until

from queues.core import Recovered
from queues.journal import replay
from stream_rl import config
from stream_rl import messages as m
from stream_rl.errors import PeerTimeout
from stream_rl.metrics import unflatten
from stream_rl.transport import Dealer
from stream_rl.types import Version

ROOT = pathlib.Path(__file__).parent.parent


class Queue:
    """A queue process that can be killed and started again where it was."""

    def __init__(self, directory: pathlib.Path, **queue: Any) -> None:
        self.directory = directory
        recipe = config.Recipe(
            run=config.Run(name="t", steps=1, directory=str(directory)),
            model=config.Model(path="none"),
            task=config.TaskChoice(use="none:None"),
            queue=config.Queue(**({"min_tokens": 4, "max_tokens": 64, "in_flight": "fixed"} | queue)),
        )
        config.dump(recipe, directory / "recipe.toml")
        self.address = "tcp://127.0.0.1:0"
        self.process: subprocess.Popen[bytes]

    @property
    def journal(self) -> pathlib.Path:
        return self.directory / "t" / "journal.db"

    def start(self, *more: str) -> None:
        read, write = os.pipe()
        command = [sys.executable, "-m", "queues.process", str(self.directory / "recipe.toml"), "--run-id", RUN]
        command += ["--ready-fd", str(write), "--bind", self.address, *more]
        self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[write], stderr=subprocess.PIPE)
        os.close(write)
        with open(read) as pipe:
            line = pipe.readline()
        assert line, self.process.communicate(timeout=10)[1].decode()
        self.address = json.loads(line)["address"]

    def kill(self) -> str:
        """kill -9; what it had logged."""
        self.process.kill()
        return self.process.communicate(timeout=10)[1].decode()

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        errors = self.process.communicate(timeout=10)[1].decode()
        assert self.process.returncode == 0, errors
        return errors


@pytest.fixture
def queue(tmp_path: pathlib.Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    queue.start()
    yield queue
    if queue.process.poll() is None:
        queue.stop()


# -- a run ---------------------------------------------------------------------------------------------------------


def test_the_process_serves_a_step_and_ends_on_sigterm(queue: Queue) -> None:
    async def serve_one_step() -> None:
        async with (
            Dealer.connect(queue.address, "e") as engine,
            Dealer.connect(queue.address, "a") as actor,
            Dealer.connect(queue.address, "l") as learner,
            Dealer.connect(queue.address, "o") as observer,
            Dealer.connect(queue.address, "old") as old,
        ):
            refused = await observer.request(m.StatusRequest(), m.Refused, 10)
            assert refused.reason == "not_registered"
            for dealer, role in ((engine, "engine"), (learner, "learner"), (observer, "observer")):
                await dealer.request(hello(role, 2), m.Welcome, 10)
            assert (await old.request(hello("engine", 1), m.Refused, 10)).reason == "fenced"
            await actor.request(hello("actor"), m.Welcome, 10)
            assert len((await next_of(actor, m.Admit)).groups) == 16
            await learner.send(m.LeaseRequest(step=Version(0, 0)))
            await actor.send(open_group(0, 0))
            for member in range(2):
                await actor.send(close(1 + member, 0, member, 3))
            rows = [Row(rid(0, member), 0, [5, 6, 7], finish="stop") for member in range(2)]
            # The actor's messages travel on another connection; chunks of a group nobody opened would be refused.
            await until(observer, lambda answer: answer.fields["queue.admitted"] >= 2)
            ack = await engine.request(make_chunks(rows, incarnation=2), m.Ack, 10)
            assert (ack.next_sequence, ack.resend) == (1, False)
            lease = await next_of(learner, m.Lease)
            assert lease.token_ids.tolist() == [1, 2, 5, 6, 7] * 2
            applied = m.Applied(step=Version(0, 0), outcome="trained", metrics={"loss": 1.0})
            assert (await learner.request(applied, m.Done, 10)).what == "Applied"
            await next_of(observer, m.StepRecord)
            await next_of(observer, m.Status)
            await observer.send(m.Shutdown(reason="test"))
            while (last := await observer.receive(10)) and "dropped.run_end" not in getattr(last, "fields", {}):
                pass
            summary = unflatten(last.fields, last.texts)
            assert summary["conserved"] is True
            assert summary["trained_tokens"] == 6
            assert summary["queue"]["trajectories"]["applied"] == 2
            assert summary["queue"]["journal"] == "ok"
            assert 0 < summary["queue"]["journal_rows"] < 100
            assert summary["queue"]["journal_bytes"] == summary["journal_bytes"] > 100_000

    run(serve_one_step())
    place = json.loads((queue.directory / "t" / "queue.json").read_text())
    assert place == {"address": queue.address, "run": RUN, "pid": queue.process.pid}
    queue.stop()
    kinds = [type(row.event).__name__ for row in replay(queue.journal)]
    assert {"Hello", "OpenGroup", "CloseTrajectory", "Chunks", "LeaseRequest", "Applied", "Shutdown"} <= set(kinds)
    assert not {"StatusRequest"} & set(kinds)


def test_a_recipe_that_could_never_fill_a_step_ends_the_process_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"queue.min_tokens is 65 and queue.max_tokens 64"):
        Queue(tmp_path, min_tokens=65).start()


def test_a_journal_of_another_run_ends_the_process_at_once_and_is_left_alone(queue: Queue) -> None:
    queue.stop()
    before = queue.journal.read_bytes()
    with pytest.raises(AssertionError, match=r"queue: .*journal.db has run 'r', expected 'q'; move it away"):
        queue.start("--run-id", "q")
    assert queue.journal.read_bytes() == before
    queue.start("--run-id", "q", "--journal", str(queue.directory / "other.db"))


def test_a_second_queue_on_the_same_journal_ends_at_once(queue: Queue) -> None:
    second = Queue(queue.directory)
    with pytest.raises(AssertionError, match="in use by another queue process"):
        second.start()


# -- kill -9 -------------------------------------------------------------------------------------------------------


def test_kill_9_between_a_chunk_and_its_acknowledgement_loses_and_doubles_nothing(queue: Queue) -> None:
    """The engine sends a token at a time and the queue is killed right after some of them; it comes back at the same
    address, and the engine goes on from where the Welcome says."""
    chance, tokens, kills = random.Random(3), 40, 5

    async def greet(dealer: Dealer, role: str) -> m.Welcome:
        await dealer.send(hello(role))
        welcome: m.Welcome = await next_of(dealer, m.Welcome)
        return welcome

    async def play() -> None:
        async with (
            Dealer.connect(queue.address, "engine-0@1") as engine,
            Dealer.connect(queue.address, "actor-0@1") as actor,
            Dealer.connect(queue.address, "learner-0@1") as learner,
        ):
            for dealer, role in ((engine, "engine"), (actor, "actor"), (learner, "learner")):
                await greet(dealer, role)
            await actor.send(open_group(0, 0, 1))
            await next_of(actor, m.Ack)
            killed_at = set(chance.sample(range(tokens), kills))
            sequence = 0
            while sequence < tokens:
                finish = "stop" if sequence == tokens - 1 else ""
                await engine.send(make_chunks([Row(rid(0), sequence, [100 + sequence], finish=finish)], sequence))
                if sequence not in killed_at:
                    answer = await engine.receive(10)
                    assert answer == m.Ack(next_sequence=sequence + 1) or answer.next_sequence == sequence + 1
                    sequence += 1
                    continue
                killed_at.remove(sequence)
                await asyncio.sleep(chance.choice([0, 0.001, 0.003, 0.01]))
                queue.kill()
                queue.start()
                refused = None
                while not isinstance(refused, m.Refused):  # an Ack may have left in time
                    await engine.send(m.Alive())
                    with contextlib.suppress(PeerTimeout):
                        refused = await engine.receive(0.2)
                assert refused.reason == "not_registered"
                welcome = await greet(engine, "engine")
                assert welcome.next_sequence in (sequence, sequence + 1)
                sequence = welcome.next_sequence
            assert (await greet(actor, "actor")).next_sequence == 1
            await actor.send(close(1, 0, 0, tokens))
            await greet(learner, "learner")
            await learner.send(m.LeaseRequest(step=Version(0, 0)))
            lease = await next_of(learner, m.Lease)
            assert lease.token_ids.tolist() == [1, 2, *range(100, 100 + tokens)]

    run(play())
    log = queue.stop()
    assert "recovered" in log and "1 trajectories are in flight" in log
    rows = list(replay(queue.journal))
    assert [row.event.sequence for row in rows if isinstance(row.event, m.Chunks)] == list(range(tokens))
    assert sum(isinstance(row.event, Recovered) for row in rows) == kills
    times = [row.at for row in rows]
    assert times == sorted(times) and 0 <= times[0] < times[-1] < 60  # of the queue's life, over all its processes


def test_a_snapshot_is_taken_and_the_next_process_starts_from_it(tmp_path: pathlib.Path) -> None:
    queue = Queue(tmp_path, snapshot_bytes=100_000, fsync=False)
    queue.start()

    async def fill() -> None:
        async with (
            Dealer.connect(queue.address, "engine-0@1") as engine,
            Dealer.connect(queue.address, "observer-0@1") as observer,
        ):
            for dealer, role in ((engine, "engine"), (observer, "observer")):
                await dealer.request(hello(role), m.Welcome, 10)
            for sequence in range(400):
                await engine.send(make_chunks([Row(rid(9), sequence, range(100))], sequence))
                if sequence % 200 == 199:
                    while (await next_of(engine, m.Ack)).next_sequence <= sequence:
                        pass
                    await until(observer, lambda s: s.fields["queue.journal_rows"] < 150)
            await until(observer, lambda s: next(replay(queue.journal)).seq > 1)

    run(fill())
    queue.kill()
    queue.start()
    log = queue.stop()
    assert "rows on a snapshot of 0.0 MB" in log
    rows = [row.seq for row in replay(queue.journal)]
    assert len(rows) < 400 < rows[-1]


# -- a full disk ---------------------------------------------------------------------------------------------------


def test_on_a_full_disk_nothing_is_acknowledged_and_the_queue_says_so_and_goes_on_when_there_is_room(
    queue: Queue,
) -> None:
    async def play() -> None:
        async with (
            Dealer.connect(queue.address, "engine-0@1") as engine,
            Dealer.connect(queue.address, "observer-0@1") as observer,
            Dealer.connect(queue.address, "late") as late,
        ):
            for dealer, role in ((engine, "engine"), (observer, "observer")):
                await dealer.request(hello(role), m.Welcome, 10)
            log = queue.journal.with_name("journal.db-wal").stat().st_size
            limit(queue.process.pid, log + 50_000)
            for sequence in range(3):
                await engine.send(make_chunks([Row(rid(9), sequence, range(20_000))], sequence))
            answer = await until(observer, lambda s: s.texts["queue.journal"] != "ok")
            assert "cannot write" in answer.texts["queue.journal"]
            acked = 0
            with contextlib.suppress(PeerTimeout):
                while True:
                    acked = (await engine.receive(0.3)).next_sequence
            assert acked < 3
            request = dataclasses.replace(hello("observer"), name="observer-1")
            await late.request(request, m.Welcome, 10)
            assert (await status(late)).texts["queue.journal"] != "ok"
            limit(queue.process.pid, resource.RLIM_INFINITY)
            while acked < 3:
                acked = (await engine.receive(10)).next_sequence
            await until(observer, lambda s: s.texts["queue.journal"] == "ok")

    run(play())
    log = queue.stop()
    assert log.count("nothing is acknowledged until it can be written") == 1
    assert "the journal can be written again" in log
    events = [row.event for row in replay(queue.journal) if isinstance(row.event, m.Chunks)]
    assert [event.sequence for event in events] == [0, 1, 2]


def limit(pid: int, size: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
