"""`stream-rl queue`: what it says of a queue that runs, of one that was killed or stopped, and where there is none."""

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
from stream_rl.transport import Dealer

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(90)


def command(*words: object, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "150"}
    return subprocess.run(
        [sys.executable, "-m", "scripts.cli", "queue", *map(str, words)],
        capture_output=True, text=True, timeout=30, cwd=cwd, env=environment,
    )  # fmt: skip


def answer(*words: object) -> dict[str, object]:
    done = command(*words, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


def refusal(*words: object, cwd: pathlib.Path = ROOT) -> str:
    """The one line that the command ends with."""
    done = command(*words, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    return line


@pytest.fixture
def queue(tmp_path: pathlib.Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A real queue of a run in `tmp_path`, in which a group of two grows."""
    recipe = config.Recipe(
        run=config.Run(name=tmp_path.name, steps=1, directory=str(tmp_path.parent)),
        model=config.Model(path="none"),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=4, max_tokens=64),
    )
    config.dump(recipe, tmp_path / "recipe.toml")
    read, write = os.pipe()
    words = (tmp_path / "recipe.toml", "--run-id", "r", "--journal", tmp_path / "journal.db", "--ready-fd", write)
    with (tmp_path / "queue.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "queues.process", *map(str, words)],
            cwd=ROOT, pass_fds=[write], stdout=log, stderr=log,
        )  # fmt: skip
    os.close(write)
    try:
        with open(read) as pipe:
            line = pipe.readline()
        assert line, (tmp_path / "queue.log").read_text()
        asyncio.run(asyncio.wait_for(grow(json.loads(line)["address"]), 20))
        yield process
    finally:
        process.kill()
        process.wait()


async def grow(address: str) -> None:
    """Engine and actor say Hello, the actor opens group 0, each of its members gets three tokens."""
    async with Dealer.connect(address, "actor-0@1") as actor, Dealer.connect(address, "engine-0@1") as engine:
        await actor.request(m.Hello(run="r", role="actor", name="actor-0", incarnation=1, pid=1), m.Welcome, 10)
        await engine.request(m.Hello(run="r", role="engine", name="engine-0", incarnation=1, pid=1), m.Welcome, 10)
        prompt = np.array([1, 2], np.int32)
        await actor.send(m.OpenGroup(sequence=0, group=0, task="t", members=2, problem=b"p", prompt_ids=prompt))
        await acknowledged(actor)
        await engine.send(make_chunks([Row(rid(0, member), 0, [5, 6, 7]) for member in range(2)]))
        await acknowledged(engine)


async def acknowledged(dealer: Dealer) -> None:
    while not isinstance(message := await dealer.receive(10), m.Ack):
        pass
    assert (message.next_sequence, message.resend) == (1, False)


def test_a_queue_that_runs_says_what_it_holds_and_waits_for(
    tmp_path: pathlib.Path, queue: "subprocess.Popen[bytes]"
) -> None:
    told = answer("status", tmp_path)
    assert (told["running"], told["run"], told["age_s"]) == (True, "r", 0)
    assert told["status"]["queue"]["trajectories"]["in_flight"] == 2
    assert told["status"]["queue"]["tokens"]["in_flight"] == 6
    assert told["rates"] == {"received_tokens": 0, "trained_tokens": 0}
    assert told["journal_bytes"] > 0
    text = command("status", tmp_path).stdout
    for words in (
        "is running",
        "in flight",
        "trajectories",
        "engine-0",
        "actor-0",
        "tok/s",
        "MB",
        "group 0 waits for",
    ):
        assert words in text, text
    assert "observer" not in text, "it does not show itself"
    lines = command("why", tmp_path).stdout.splitlines()
    [waits] = [line for line in lines if "0/1" in line]
    assert waits.startswith("group 0 waits for trajectory 0/1 on engine-0, last token ")
    assert waits in answer("why", tmp_path)["why"] or "s ago" in waits


def test_an_engine_is_drained_by_name(tmp_path: pathlib.Path, queue: "subprocess.Popen[bytes]") -> None:
    assert "unknown_engine" in (line := refusal("drain", "engine-7", tmp_path))
    assert "engine-0" in line, "it names those that there are"
    done = command("drain", "engine-0", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "told to stop it" in command("why", tmp_path).stdout
    queue.kill()
    queue.wait()
    assert "does not run" in refusal("drain", "engine-0", tmp_path)


def test_a_killed_queue_is_read_from_its_journal(tmp_path: pathlib.Path, queue: "subprocess.Popen[bytes]") -> None:
    queue.kill()
    queue.wait()
    told = answer("status", tmp_path)
    assert told["running"] is False
    assert 0 <= told["age_s"] < 30
    assert told["status"]["queue"]["trajectories"]["in_flight"] == 2
    assert told["rates"] == {}
    text = command("why", tmp_path).stdout
    assert "is not running; this is from its journal" in text
    assert "group 0 waits for trajectory 0/0 on engine-0" in text


def test_a_queue_that_does_not_answer_is_read_from_its_journal(
    tmp_path: pathlib.Path, queue: "subprocess.Popen[bytes]"
) -> None:
    queue.send_signal(signal.SIGSTOP)
    told = answer("status", tmp_path)
    assert told["running"] is False
    assert told["status"]["queue"]["tokens"]["in_flight"] == 6
    queue.send_signal(signal.SIGCONT)
    assert answer("status", tmp_path)["running"] is True, "reading its journal has not disturbed it"


def test_another_run_at_the_address_is_not_taken_for_this_one(
    tmp_path: pathlib.Path, queue: "subprocess.Popen[bytes]"
) -> None:
    path = tmp_path / "queue.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "other"}))
    assert answer("status", tmp_path)["running"] is False
    assert "other_run" in refusal("drain", "engine-0", tmp_path)


def test_the_newest_run_is_meant_when_none_is_named(tmp_path: pathlib.Path) -> None:
    for name, seconds in (("old", 100), ("newest", 300), ("older", 200)):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        (directory / "queue.json").write_text('{"address": "tcp://127.0.0.1:9", "run": "r", "pid": 4194305}')
        os.utime(directory / "queue.json", (seconds, seconds))
    assert "runs/newest/journal.db" in refusal("status", cwd=tmp_path)


def test_where_there_is_no_run_it_says_what_was_looked_for(tmp_path: pathlib.Path) -> None:
    line = refusal("status", cwd=tmp_path)
    assert "runs/*/queue.json" in line
    assert "stream-rl train" in line
    assert f"{tmp_path}/nowhere/queue.json" in refusal("why", tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"address": "x", "run": "r", "pid": "p"}'])
def test_a_broken_queue_file_is_named(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "queue.json").write_text(text)
    assert "queue.json is not what" in refusal("status", tmp_path)
