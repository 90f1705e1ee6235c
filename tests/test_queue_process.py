"""The real queue process, spoken to over ZeroMQ."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from queue_builders import Row, make_chunks, rid

from stream_rl import config
from stream_rl import messages as m
from stream_rl.metrics import unflatten
from stream_rl.transport import Dealer
from stream_rl.types import Version

ROOT = pathlib.Path(__file__).parent.parent


def start(tmp_path: pathlib.Path, **queue: object) -> tuple[subprocess.Popen[bytes], int]:
    recipe = config.Recipe(
        run=config.Run(name="t", steps=1),
        model=config.Model(path="none"),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(**({"min_tokens": 4, "max_tokens": 64} | queue)),
    )
    config.dump(recipe, tmp_path / "recipe.toml")
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "queues.process", tmp_path / "recipe.toml", "--run-id", "r", "--ready-fd", str(write)],
        cwd=ROOT,
        pass_fds=[write],
        stderr=subprocess.PIPE,
    )
    os.close(write)
    return process, read


@pytest.fixture
def address(tmp_path: pathlib.Path) -> Iterator[str]:
    process, read = start(tmp_path)
    with open(read) as pipe:
        line = pipe.readline()
        assert line, process.stderr.read().decode() if process.stderr else ""
        yield json.loads(line)["address"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors.decode()


def hello(role: str, incarnation: int = 1) -> m.Hello:
    return m.Hello(run="r", role=role, name=f"{role}-0", incarnation=incarnation, pid=1)


async def serve_one_step(address: str) -> None:
    async with (
        Dealer.connect(address, "e") as engine,
        Dealer.connect(address, "a") as actor,
        Dealer.connect(address, "l") as learner,
        Dealer.connect(address, "o") as observer,
        Dealer.connect(address, "old") as old,
    ):
        assert isinstance(await observer.request(m.StatusRequest(), m.Refused, 10), m.Refused)
        for dealer, role in ((engine, "engine"), (learner, "learner"), (observer, "observer")):
            await dealer.request(hello(role, 2), m.Welcome, 10)
        assert (await old.request(hello("engine", 1), m.Refused, 10)).reason == "fenced"
        await actor.request(hello("actor"), m.Welcome, 10)
        assert (await actor.receive(10)).groups == 16
        await learner.send(m.LeaseRequest(step=Version(0, 0)))
        await actor.send(m.OpenGroup(group=1, task="t", members=2, prompt_ids=np.array([1, 2], np.int32)))
        for member in range(2):
            close = m.CloseTrajectory(group=1, member=member, status="done", reward=1.0, num_sampled=3)
            await actor.send(close)
        rows = [Row(rid(1, member), 0, [5, 6, 7], finish="stop") for member in range(2)]
        # The actor's messages travel on another connection; chunks of a group nobody opened would be refused.
        while (await status(observer)).fields["queue.admitted"] < 2:
            pass
        ack = await engine.request(make_chunks(rows, incarnation=2), m.ChunksAck, 10)
        assert (ack.next_sequence, ack.resend) == (1, False)
        lease = await learner.receive(10)
        assert lease.token_ids.tolist() == [1, 2, 5, 6, 7] * 2
        applied = m.Applied(step=Version(0, 0), outcome="trained", metrics={"loss": 1.0})
        assert (await learner.request(applied, m.Done, 10)).what == "Applied"
        seen: list[type] = []
        while m.StepRecord not in seen or m.Status not in seen:
            seen.append(type(await observer.receive(10)))
        await observer.send(m.Shutdown(reason="test"))
        while (last := await observer.receive(10)) and "dropped.run_end" not in getattr(last, "fields", {}):
            pass
        summary = unflatten(last.fields, last.texts)
        assert summary["conserved"] is True
        assert summary["trained_tokens"] == 6
        assert summary["dropped"] == {"run_end": 0}
        assert summary["queue"]["trajectories"]["applied"] == 2


async def status(observer: Dealer) -> m.Status:
    await observer.send(m.StatusRequest())
    while not isinstance(answer := await observer.receive(10), m.Status):
        pass
    return answer


def test_the_process_serves_a_step_and_ends_on_sigterm(address: str) -> None:
    asyncio.run(asyncio.wait_for(serve_one_step(address), 30))


def test_a_recipe_that_could_never_fill_a_step_ends_the_process_at_once(tmp_path: pathlib.Path) -> None:
    process, read = start(tmp_path, min_tokens=65)
    os.close(read)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert b"queue.min_tokens is 65 and queue.max_tokens 64" in errors
