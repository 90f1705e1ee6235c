"""A run's directory: begun, moved aside, gone on with; and the real supervisor's resume over stand-ins."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fake_processes
import pytest
from fake_processes import is_up, left, lives
from test_supervisor import table, until

from queues.store import OF_THE_PROCESS, Settings
from scripts import runs
from scripts.records import read
from scripts.train import supervise
from stream_rl import config
from stream_rl.errors import ConfigError, StreamRLError

TESTS = pathlib.Path(__file__).parent
pytestmark = pytest.mark.timeout(90)


def recipe(directory: pathlib.Path, **changes: dict[str, Any]) -> config.Recipe:
    """Of a run in `directory`/run; `changes` by section."""
    made = fake_processes.recipe(directory / "run", stop_timeout_s=0.5)
    return dataclasses.replace(
        made, **{name: dataclasses.replace(getattr(made, name), **fields) for name, fields in changes.items()}
    )


# -- directories -----------------------------------------------------------------------------------------------


def test_an_earlier_run_of_the_name_is_kept_and_one_that_had_not_ended_is_spoken_of(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    first = runs.begin(recipe(tmp_path), said.append)
    first.write_summary({"steps": 3})
    second = runs.begin(recipe(tmp_path), said.append)
    assert first.id != second.id and not said
    assert (tmp_path / "run.1" / "summary.json").exists()
    assert sorted(path.name for path in second.directory.iterdir()) == [
        "checkpoints",
        "logs",
        "recipe.toml",
        "run.json",
    ]
    runs.begin(recipe(tmp_path), said.append)
    [line] = said
    assert f"it is {tmp_path / 'run.2'} now" in line and "--resume" in line


def test_a_run_is_found_again_with_all_that_it_was(tmp_path: pathlib.Path) -> None:
    begun = runs.begin(recipe(tmp_path))
    lines = [
        {"kind": "restart", "wall_s": 3.5, "name": "learner"},
        {"kind": "resume", "wall_s": 7.0, "number": 1},
        {"kind": "restart", "wall_s": 9.5, "name": "learner"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (begun.directory / "metrics.jsonl").write_text(text + '{"kind": "sta')
    again = runs.resume(recipe(tmp_path))
    assert (again.id, again.model, again.recipe) == (begun.id, "none", begun.recipe)
    assert (again.lives, again.seconds, again.restarts) == (2, 9.5, {"learner": 2})
    assert runs.is_unfinished(begun.directory) and runs.summary_of(begun.directory) is None
    again.write_summary({"steps": 3})
    assert not runs.is_unfinished(begun.directory) and runs.summary_of(begun.directory) == {"steps": 3}


def test_after_a_warm_start_a_run_goes_on_with_the_model_that_it_made(tmp_path: pathlib.Path) -> None:
    begun = runs.begin(recipe(tmp_path))
    warmed = dataclasses.replace(begun.recipe, model=config.Model(path="none-warm-1"))
    dataclasses.replace(begun, recipe=warmed).write_recipe()
    for given in (begun.recipe, warmed):
        again = runs.resume(given)
        assert (again.model, again.recipe.model.path) == ("none", "none-warm-1")
    with pytest.raises(ConfigError, match=r"model\.path was 'none-warm-1', is 'other'"):
        runs.resume(dataclasses.replace(begun.recipe, model=config.Model(path="other")))


def test_what_may_not_change_is_refused_by_name_and_all_at_once(tmp_path: pathlib.Path) -> None:
    runs.begin(recipe(tmp_path))
    held = (tmp_path / "run" / "recipe.toml").read_text()
    with pytest.raises(ConfigError) as raised:
        runs.resume(
            recipe(
                tmp_path,
                run={"seed": 3, "steps": 9},
                rollout={"group_size": 2},
                learner={"optimizer": {"lr": 0.1}, "threads": 2, "model": {"tensor_model_parallel_size": 2}},
                supervise={"silence_timeout_s": 9.0, "retry_s": 0.1},
                queue={"max_token_age_of": {"a.b:C": 1}, "fsync": False},
            )
        )
    text = str(raised.value)
    expected = [
        "learner.optimizer.lr was 'not set', is 0.1",
        "queue.max_token_age_of.a.b:C was 'not set', is 1",
        "rollout.group_size was 8, is 2",
        "run.seed was 0, is 3",
        "supervise.silence_timeout_s was 30.0, is 9.0",
    ]
    assert f": {'; '.join(expected)}.  " in text
    assert (tmp_path / "run" / "recipe.toml").read_text() == held, "what was refused changed nothing"


def test_every_key_of_a_recipe_is_fixed_unless_it_is_listed() -> None:
    """A new key is fixed until somebody thinks about it; a listed one exists."""
    made = config.Recipe(
        run=config.Run(name="n", steps=1),
        model=config.Model(path="m"),
        task=config.TaskChoice(use="t"),
        queue=config.Queue(min_tokens=1, max_tokens=1),
    )
    sections = dataclasses.asdict(made)
    listed = {f"{table}.{name}" for table, names in runs.MAY_CHANGE.items() for name in names}
    unknown = {
        key
        for key in listed
        if key.partition(".")[0] not in sections
        or (key.count(".") == 1 and not key.endswith("*") and key.split(".")[1] not in sections[key.split(".")[0]])
    }
    assert not unknown - {"learner.processes"}, "which the parallel learner brings"
    assert runs.differences(made, dataclasses.replace(made, engine=config.Engine(count=7))) == []


def test_the_settings_that_a_journal_is_bound_to_leave_out_what_only_its_process_reads(tmp_path: pathlib.Path) -> None:
    bound = Settings.of(recipe(tmp_path), "r")
    other: dict[str, Any] = {"lease_timeout_s": 1.0, "commit_seconds": 1.0, "fsync": False, "snapshot_bytes": 1 << 20}
    other["keep_journal"] = True
    assert set(other) == set(OF_THE_PROCESS)
    assert Settings.of(recipe(tmp_path, queue=other), "r") == bound
    assert Settings.of(recipe(tmp_path, queue={"max_token_age": 3}), "r") != bound
    readers = {
        path.name
        for path in (TESTS.parent / "queues").glob("*.py")
        for name in OF_THE_PROCESS
        if f"queue.{name}" in path.read_text()
    }
    assert readers == {"process.py", "admission.py"}, "admission.py checks them only"


@pytest.mark.parametrize("left_behind", [None, "", "{}", "[]", '{"run": "r"}'])
def test_what_holds_no_run_is_not_gone_on_with(tmp_path: pathlib.Path, left_behind: str | None) -> None:
    if left_behind is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(left_behind)
    expected = r"there is no run in .*begin it without --resume" if left_behind is None else "run.json is not what"
    with pytest.raises(ConfigError, match=expected):
        runs.resume(recipe(tmp_path))
    runs.begin(recipe(tmp_path))
    assert (tmp_path / "run.1").exists() == (left_behind is not None), "it does not stand in the way of another"


def test_a_run_whose_processes_live_is_neither_gone_on_with_nor_moved_aside(tmp_path: pathlib.Path) -> None:
    begun = runs.begin(recipe(tmp_path))
    words = [sys.executable, "-c", "import signal; signal.pause()", "--run-id", begun.id, "--ready-fd", "7"]
    with subprocess.Popen(words) as living:
        try:
            for again in (runs.resume, runs.begin):
                with pytest.raises(ConfigError, match=f"still goes on: its processes {living.pid} live"):
                    again(begun.recipe)
            os.kill(living.pid, signal.SIGKILL)  # not reaped yet: a zombie is no process that lives
            assert runs.resume(begun.recipe).id == begun.id
        finally:
            living.kill()


# -- lives -----------------------------------------------------------------------------------------------------

Live = Callable[..., "Life"]


class Life:
    """One life of a run, under the real supervisor, whose processes are stand-ins."""

    def __init__(self, directory: pathlib.Path, resume: bool, steps: int) -> None:
        self.directory = directory / "run"
        script = "import sys, pathlib, test_runs as t; t.live(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, directory, str(int(resume)), str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def up(self, name: str, incarnation: int) -> None:
        self.until(lambda: is_up(self.directory, name, incarnation))

    def until(self, condition: Callable[[], bool]) -> None:
        asyncio.run(until(lambda: condition() or self.process.poll() is not None))
        assert self.process.poll() is None, self.process.communicate()

    def kill(self) -> None:
        """kill -9 of the supervisor.  Its processes end with it; what they started does not, and nobody is there to
        sweep it."""
        self.process.kill()
        self.end()
        for each in lives(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each["grandchild"], signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it went on: {error.output!r}; {lives(self.directory)}") from None
        return self.process.returncode, output


def live(directory: pathlib.Path, resume: int, steps: int) -> None:
    given = recipe(directory, run={"steps": steps})
    run = runs.resume(given) if resume else runs.begin(given)
    run.write_summary(supervise(run, table))


@pytest.fixture
def life(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    lived: list[Life] = []

    def begin(resume: bool = False, steps: int = 3) -> Life:
        lived.append(Life(tmp_path, resume, steps))
        return lived[-1]

    yield begin
    for each in lived:
        each.kill()


@pytest.mark.parametrize("end", [lambda first: first.kill(), lambda first: (first.process.terminate(), first.end())])
def test_a_run_whose_supervisor_ended_goes_on_as_what_it_was(life: Live, end: Callable[["Life"], object]) -> None:
    first = life()
    for name in ("learner", "actor"):
        first.up(name, 1)
    first.until(lambda: len(read(first.directory)["status"]) > 1)
    os.kill(lives(first.directory, "learner")[-1]["pid"], signal.SIGKILL)
    first.up("learner", 2)
    first.until(lambda: bool(read(first.directory)["restart"]))
    end(first)
    until_gone = read(first.directory)
    told = json.loads((first.directory / "run.json").read_text())

    second = life(resume=True)
    second.up("learner", 3)
    second.up("actor", 2)
    os.kill(lives(second.directory, "actor")[-1]["pid"], signal.SIGKILL)
    second.up("actor", 3)
    second.until(lambda: len(read(second.directory)["restart"]) == 2)
    (second.directory / "queue.finish").touch()
    code, output = second.end()
    assert code == 0, output
    assert f"going on with {told['run']} from version 0.2" in output
    assert "actor ended with status -9; started again (1 of 3)" in output
    summary = json.loads((second.directory / "summary.json").read_text())
    assert summary["restarts"] == {"learner": 1, "actor": 1} and summary["resumes"] == 1
    records = read(second.directory)
    assert records["status"][: len(until_gone["status"])] == until_gone["status"], "what was written stays"
    walls = [record["wall_s"] for record in records["status"]]
    assert walls == sorted(walls) and summary["wall_s"] >= round(walls[-1], 1), "time goes on where it stopped"
    assert [record["number"] for record in records["resume"]] == [1]
    assert left(second.directory) == set()


def test_of_a_run_whose_end_was_not_written_down_only_the_books_are_closed(life: Live) -> None:
    first = life()
    first.up("learner", 1)
    first.up("actor", 1)
    first.kill()
    (first.directory / "queue.finish").touch()
    second = life(resume=True)
    code, output = second.end()
    assert code == 0, output
    assert [each["incarnation"] for each in lives(second.directory, "learner")] == [1], "nothing was left to learn"
    assert (second.directory / "closed").exists()


def test_a_first_start_that_fails_after_a_resume_ends_the_run(life: Live) -> None:
    """As in a run's first life: what is wrong with it stays wrong."""
    first = life()
    first.up("learner", 1)
    first.up("actor", 1)
    first.until(lambda: bool(read(first.directory)["status"]))
    first.kill()
    (first.directory / "learner.fails.2").touch()
    code, output = life(resume=True).end()
    assert code == 1
    assert "learner ended with status 3 while starting" in output
    assert left(first.directory) == set()


def test_steps_cannot_be_raised_when_the_last_was_taken(life: Live) -> None:
    first = life()
    first.up("learner", 1)
    first.up("actor", 1)
    first.until(lambda: bool(read(first.directory)["status"]))
    first.kill()
    (first.directory / "learner.done").touch()
    code, output = life(resume=True, steps=5).end()
    assert code == 1 and StreamRLError.__name__ in output
    assert "this one has taken all 2" in output and "go on with run.steps=2" in output
    assert left(first.directory) == set()
