"""Processes of a run that die, stall and are started again; the real supervisor over stand-ins for its processes."""

import asyncio
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import fake_processes
import pytest
from fake_processes import is_up, left, lives

from scripts.processes import ProcessDied
from scripts.runs import Run
from scripts.supervisor import Allowance, Processes, Program, Restart
from scripts.train import Stage, supervise
from stream_rl import config

TESTS = pathlib.Path(__file__).parent
pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


def program(name: str, **more: Any) -> Program:
    return Program(name=name, module="fake_processes", arguments=("--role", name), peer=f"{name}-0", **more)


class Household:
    """Some processes that are kept alive, and what was said of their restarts."""

    def __init__(self, directory: pathlib.Path, start_timeout_s: float = 20, **limits: Any) -> None:
        self.directory, self.said = directory, list[Restart]()
        recipe = fake_processes.recipe(directory, **limits)
        words = (str(directory / "recipe.toml"), "--run-id", "r")
        self.processes = Processes(words, directory / "logs", recipe.supervise, start_timeout_s, self.said.append)

    @asynccontextmanager
    async def keeping(self, *programs: Program) -> AsyncIterator[None]:
        try:
            async with asyncio.TaskGroup() as group:
                await self.processes.start(group, programs)
                yield
                self.processes.release()
        finally:
            await self.processes.stop()

    async def run_until_one_ends_it(self, *programs: Program, kill: str = "") -> str:
        """What the run ended with, after each life of the process `kill` was ended."""

        async def run() -> None:
            async with self.keeping(*programs):
                while kill:
                    incarnation = await self.processes[kill].up()
                    self.kill(kill)
                    await until(functools.partial(self.is_past, kill, incarnation))
                await asyncio.Event().wait()

        with pytest.raises(ExceptionGroup) as caught:
            await run()
        [error] = caught.value.exceptions
        assert isinstance(error, ProcessDied)
        return str(error)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(lives(self.directory, name)[-1]["pid"], number)

    def is_past(self, name: str, incarnation: int) -> bool:
        return self.processes[name].incarnation > incarnation

    async def up_again(self, name: str, incarnation: int) -> None:
        await until(lambda: self.processes[name].incarnation == incarnation)
        await self.processes[name].up()


async def until(condition: Callable[[], bool], timeout: float = 30) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  of another process's making
            await asyncio.sleep(0.01)


# -- limits ----------------------------------------------------------------------------------------------------


def test_only_so_many_restarts_fit_into_any_window() -> None:
    allowance = Allowance(2, 10.0)
    assert [allowance.take(now) for now in (0.0, 9.0, 9.9)] == [1, 2, 0]
    assert [allowance.take(now) for now in (10.0, 18.9, 19.0)] == [2, 0, 2], "one leaves the window as it gets too old"


def test_no_restarts_means_none() -> None:
    assert Allowance(0, 10.0).take(0.0) == 0


def test_one_restart_too_many_ends_the_run_and_says_so(directory: pathlib.Path) -> None:
    house = Household(directory, max_restarts=2)
    text = asyncio.run(house.run_until_one_ends_it(program("actor"), kill="actor"))
    assert "actor ended with status -9, after 2 restarts within 600 s (supervise.max_restarts); the end of" in text
    assert "logs/actor.log" in text
    assert [life["incarnation"] for life in lives(directory)] == [1, 2, 3]
    assert left(directory) == set()


def test_a_process_whose_next_incarnation_would_end_in_the_same_way_ends_the_run_in_its_own_words(
    directory: pathlib.Path,
) -> None:
    async def body() -> None:
        house = Household(directory)
        async with house.keeping(program("learner")):
            house.kill("learner", signal.SIGUSR1)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(body())
    [error] = caught.value.exceptions
    assert isinstance(error, ProcessDied) and str(error) == "learner: it would only repeat"
    assert [life["incarnation"] for life in lives(directory)] == [1]
    assert left(directory) == set()


def test_restarts_that_left_the_window_are_forgiven(directory: pathlib.Path) -> None:
    async def body() -> None:
        house = Household(directory, max_restarts=1, restart_window_s=0.01)
        async with house.keeping(program("actor")):
            for incarnation in (2, 3, 4):
                house.kill("actor")
                await house.up_again("actor", incarnation)
        assert [restart.number for restart in house.said] == [1, 1, 1]

    asyncio.run(body())


def test_without_restarts_the_first_end_ends_the_run(directory: pathlib.Path) -> None:
    house = Household(directory, max_restarts=0)
    text = asyncio.run(house.run_until_one_ends_it(program("actor"), kill="actor"))
    assert text.startswith(f"actor ended with status -9; the end of {directory}/logs/actor.log:\n")
    assert "actor says hello" in text
    assert len(lives(directory)) == 1


# -- starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("refuses", "actor: the recipe makes no sense"),
        ("fails", "actor ended with status 3 while starting;"),
    ],
)
def test_a_first_start_that_fails_is_not_tried_again(directory: pathlib.Path, how: str, text: str) -> None:
    (directory / f"actor.{how}.1").touch()
    house = Household(directory)
    assert asyncio.run(house.run_until_one_ends_it(program("actor"))).startswith(text)
    assert len(lives(directory)) == 1
    assert left(directory) == set()


def test_a_first_start_that_hangs_ends_the_run_after_its_time(directory: pathlib.Path) -> None:
    (directory / "actor.hangs.1").touch()
    house = Household(directory, start_timeout_s=1.0)
    assert asyncio.run(house.run_until_one_ends_it(program("actor"))).startswith("actor was not up after 1 s")
    assert left(directory) == set()


def test_a_later_start_that_fails_or_hangs_is_one_more_restart(directory: pathlib.Path) -> None:
    async def body() -> None:
        (directory / "actor.refuses.2").touch()
        (directory / "actor.hangs.3").touch()
        house = Household(directory, start_timeout_s=8.0)
        async with house.keeping(program("actor")):
            house.kill("actor")
            await house.up_again("actor", 4)
            reasons = ["ended with status -9", "ended with status 1 while starting", "was not up after 8 s"]
            assert [restart.reason for restart in house.said] == [f"actor {reason}" for reason in reasons]
            assert left(directory, 0.5) == {lives(directory)[-1][who] for who in ("pid", "grandchild")}

    asyncio.run(body())
    assert left(directory) == set()


def test_one_that_dies_while_others_start_is_started_again(directory: pathlib.Path) -> None:
    async def body() -> None:
        (directory / "engine.hangs.1").touch()
        house = Household(directory)
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(house.processes.start(group, [program("learner"), program("engine")]))
            await until(lambda: bool(lives(directory, "engine") and lives(directory, "learner")))
            await house.processes["learner"].up()
            house.kill("learner")
            await house.up_again("learner", 2)
            assert not starting.done()
            (directory / "engine.hangs.1").unlink()
            starting.cancel()
            house.processes.release()
        await house.processes.stop()

    asyncio.run(body())
    assert left(directory) == set()


# -- restarts --------------------------------------------------------------------------------------------------


def test_a_killed_process_comes_back_where_it_was_and_its_log_goes_on(directory: pathlib.Path) -> None:
    async def body() -> None:
        house = Household(directory)
        async with house.keeping(program("publisher", keeps_address=True)):
            first = lives(directory)[0]
            house.kill("publisher")
            await house.up_again("publisher", 2)
            second = lives(directory)[1]
            assert (first["bind"], second["bind"]) == ("", "of publisher")
            assert left(directory, 0.5) == {second["pid"], second["grandchild"]}, "what the first left behind is gone"
        assert house.said == [Restart("publisher", 2, "publisher ended with status -9", 1)]
        assert house.processes.restarts == {"publisher": 1}

    asyncio.run(body())
    log = (directory / "logs" / "publisher.log").read_text().splitlines()
    hello, line = "publisher says hello", "---- publisher ended with status -9; incarnation 2 ----"
    assert [text for text in log if text in (hello, line)] == [hello, line, hello]
    assert left(directory) == set()


def test_others_are_told_the_address_that_stays(directory: pathlib.Path) -> None:
    async def body() -> None:
        house = Household(directory)
        async with house.keeping(program("queue", keeps_address=True)):
            async with asyncio.TaskGroup() as group:
                await house.processes.start(group, [program("actor", links=("queue",))])
                house.kill("actor")
                await house.up_again("actor", 2)
                house.processes.release(but=["queue"])
            address = house.processes["queue"].address
            assert address.startswith("tcp://127.0.0.1:")
            assert [life["queue"] for life in lives(directory, "actor")] == [address, address]

    asyncio.run(body())


def test_a_stopped_process_that_is_declared_lost_is_killed_and_started_again(directory: pathlib.Path) -> None:
    async def body() -> None:
        house = Household(directory)
        async with house.keeping(program("actor")):
            house.kill("actor", signal.SIGSTOP)
            house.processes.lost("actor-0", 1, "was silent for 31 s and was killed")
            await house.up_again("actor", 2)
            house.processes.lost("actor-0", 1, "was silent for 32 s and was killed")
            house.processes.lost("nobody-0", 2, "was silent")
            house.kill("actor")
            await house.up_again("actor", 3)
        reasons = ["actor was silent for 31 s and was killed", "actor ended with status -9"]
        assert [restart.reason for restart in house.said] == reasons, "the verdict was of the first life alone"

    asyncio.run(body())


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16, 64, 256])
def test_a_stop_at_any_moment_of_a_restart_leaves_nothing_behind(directory: pathlib.Path, turns: int) -> None:
    """The run is cancelled so many turns of the event loop after the death was noticed."""

    async def body() -> None:
        house = Household(directory)

        async def run() -> None:
            async with house.keeping(program("actor")):
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            running = group.create_task(run())
            await until(lambda: "actor" in house.processes._kept)
            await house.processes["actor"].up()
            house.kill("actor")
            log = directory / "logs" / "actor.log"
            await until(lambda: "----" in log.read_text())
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()

    asyncio.run(body())
    assert left(directory) == set()


# -- whole runs ------------------------------------------------------------------------------------------------


def table(recipe: config.Recipe) -> list[Stage]:
    return [
        Stage("starting the queue", [program("queue", keeps_address=True)]),
        Stage("starting the others", [program("learner", links=("queue",)), program("actor", links=("queue",))]),
    ]


Start = Callable[..., "FakeRun"]


class FakeRun:
    """The real supervisor's run over stand-ins, and somebody who does things to it meanwhile."""

    def __init__(self, directory: pathlib.Path, **limits: Any) -> None:
        self.directory, self.recipe = directory, fake_processes.recipe(directory, **limits)
        script = "import sys, pathlib, json, test_supervisor as t; t.run_in_child(*map(pathlib.Path, sys.argv[1:]))"
        (directory / "limits.json").write_text(json.dumps(limits))
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, directory], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def until(self, condition: Callable[[], bool]) -> None:
        asyncio.run(until(lambda: condition() or self.process.poll() is not None))
        assert self.process.poll() is None, self.process.communicate()

    def up(self, name: str, incarnation: int) -> None:
        self.until(lambda: is_up(self.directory, name, incarnation))

    def is_observed(self) -> bool:
        path = self.directory / "metrics.jsonl"
        return path.exists() and '"status"' in path.read_text()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(lives(self.directory, name)[-1]["pid"], number)

    def finish(self) -> tuple[dict[str, object], str]:
        """The summary and what was printed."""
        (self.directory / "queue.finish").touch()
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, output
        assert left(self.directory) == set()
        return json.loads((self.directory / "summary.json").read_text()), output


@pytest.fixture
def start(directory: pathlib.Path) -> Iterator[Start]:
    """Starts a run; one that a failed test leaves behind is ended."""
    runs: list[FakeRun] = []

    def begin(**limits: Any) -> FakeRun:
        runs.append(FakeRun(directory, **limits))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()  # its processes end with it
        run.process.wait()


def run_in_child(directory: pathlib.Path) -> None:
    limits = json.loads((directory / "limits.json").read_text())
    with suppress(KeyboardInterrupt):
        summary = supervise(Run("r", fake_processes.recipe(directory, **limits), "none"), table)
        (directory / "summary.json").write_text(json.dumps(summary))
        return
    sys.exit(130)


def restarts(directory: pathlib.Path) -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["name"], r["incarnation"], r["reason"]) for r in lines if r["kind"] == "restart" and r["wall_s"] > 0]


def test_a_run_outlives_the_loss_of_each_process_and_says_so(directory: pathlib.Path, start: Start) -> None:
    run = start()
    for name in ("actor", "learner", "queue"):
        run.up(name, 1)
    run.until(run.is_observed)
    for name in ("actor", "queue", "learner"):
        run.kill(name)
        run.up(name, 2)
    summary, output = run.finish()
    assert summary["restarts"] == {"queue": 1, "learner": 1, "actor": 1}
    assert restarts(directory) == [(name, 2, f"{name} ended with status -9") for name in ("actor", "queue", "learner")]
    assert "learner ended with status -9; started again (1 of 3)" in output


def test_a_queue_that_is_killed_as_the_books_are_closed_closes_them_later(
    directory: pathlib.Path, start: Start
) -> None:
    (directory / "queue.dies-at-shutdown").touch()
    run = start()
    run.until(run.is_observed)
    summary, _ = run.finish()
    assert summary["restarts"] == {"queue": 1}
    assert (directory / "closed").exists()


def test_a_queue_that_stalls_is_started_again(directory: pathlib.Path, start: Start) -> None:
    run = start(silence_timeout_s=1.0)
    run.until(run.is_observed)
    run.kill("queue", signal.SIGSTOP)
    run.up("queue", 2)
    summary, _ = run.finish()
    assert summary["restarts"] == {"queue": 1}
    assert restarts(directory) == [("queue", 2, "queue was silent for 1 s and was killed")]


def test_a_peer_that_the_queue_declares_lost_is_started_again_once(directory: pathlib.Path, start: Start) -> None:
    run = start()
    run.up("learner", 1)
    run.kill("learner", signal.SIGSTOP)
    (directory / "queue.loses.new").write_text("learner-0 1")
    (directory / "queue.loses.new").rename(directory / "queue.loses")  # whole, whenever the queue looks
    run.up("learner", 2)
    lines = (directory / "metrics.jsonl").read_text().count('"status"')
    run.until(lambda: (directory / "metrics.jsonl").read_text().count('"status"') > lines + 5)
    assert run.finish()[0]["restarts"] == {"learner": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_restart_ends_everything(directory: pathlib.Path, start: Start, number: int) -> None:
    (directory / "actor.hangs.2").touch()
    run = start()
    run.up("actor", 1)
    run.until(run.is_observed)
    run.kill("actor")
    run.until(lambda: len(lives(directory, "actor")) == 2)
    run.process.send_signal(number)
    output, _ = run.process.communicate(timeout=30)
    assert run.process.returncode == 130, output
    assert left(directory) == set()


def test_a_run_whose_output_nobody_reads_any_more_leaves_nothing_behind(directory: pathlib.Path, start: Start) -> None:
    run = start(stop_timeout_s=0.5)
    run.up("actor", 1)
    run.until(run.is_observed)
    run.kill("actor", signal.SIGSTOP)  # or it would end with its parent by itself
    assert run.process.stdout is not None
    run.process.stdout.close()
    run.process.terminate()
    run.process.wait(30)
    assert left(directory) == set()
