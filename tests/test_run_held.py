"""A run that waits for its turn (`stream-rl train --hold`), and GPUs that its processes see."""

import asyncio
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import fake_processes
import pytest
from fake_processes import left, lives
from test_supervisor import Household, directory, program, until

from scripts.runs import Run
from scripts.train import HELD, Stage, stages, supervise
from stream_rl import config
from stream_rl.errors import StreamRLError

__all__ = ["directory"]
pytestmark = pytest.mark.timeout(90)


def table(recipe: config.Recipe) -> list[Stage]:
    return [
        Stage("starting the queue", [program("queue", keeps_address=True)]),
        Stage("starting the actor", [program("actor", links=("queue",))], held=True),
    ]


def run_in_child(path: pathlib.Path) -> None:
    try:
        supervise(Run("r", fake_processes.recipe(path), "none"), table, hold=True)
    except StreamRLError as error:
        sys.exit(f"ended: {error}")


@pytest.fixture
def held(directory: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    script = "import sys, pathlib, test_run_held as t; t.run_in_child(pathlib.Path(sys.argv[1]))"
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", script, directory],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    said: Callable[[], str] = (directory / "output").read_text
    asyncio.run(until(lambda: HELD in said() or process.poll() is not None))
    assert process.poll() is None, said()
    yield process
    process.kill()
    process.wait()


def test_a_held_run_begins_with_a_line(directory: pathlib.Path, held: "subprocess.Popen[str]") -> None:
    assert [life["name"] for life in lives(directory)] == ["queue"]
    assert held.stdin is not None
    held.stdin.write("\n")
    held.stdin.flush()
    asyncio.run(until(lambda: bool(lives(directory, "actor"))))
    (directory / "queue.finish").touch()
    assert held.wait(60) == 0, (directory / "output").read_text()
    assert left(directory) == set()


def test_a_held_run_ends_with_whoever_held_it(directory: pathlib.Path, held: "subprocess.Popen[str]") -> None:
    assert held.stdin is not None
    held.stdin.close()
    assert held.wait(60) == 1
    assert "standard input ended while the run was held" in (directory / "output").read_text()
    assert not lives(directory, "actor") and left(directory) == set()


def test_a_process_sees_its_devices_and_so_does_its_next_incarnation(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def sees(pid: int) -> str | None:
        pairs = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair).get("CUDA_VISIBLE_DEVICES")

    async def body() -> None:
        house = Household(directory)
        async with house.keeping(program("actor", devices=(2, 5)), program("learner")):
            assert [sees(lives(directory, name)[0]["pid"]) for name in ("actor", "learner")] == ["2,5", None]
            house.kill("actor")
            await house.up_again("actor", 2)
            assert sees(lives(directory, "actor")[1]["pid"]) == "2,5"

    asyncio.run(body())
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("count", "ranks", "devices", "expected"),
    [
        (2, 1, (), [(), ()]),
        (3, 1, (4, 2), [(4,), (2,), (4,)]),
        (2, 2, (0, 1, 2, 3), [(0, 1), (2, 3)]),
        (2, 2, (0, 1, 2), [(0, 1), (2, 0)]),
    ],
)
def test_engines_take_their_devices_in_turn(
    tmp_path: pathlib.Path, count: int, ranks: int, devices: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    recipe = dataclasses.replace(
        fake_processes.recipe(tmp_path), engine=config.Engine(count=count, devices=devices), sglang={"tp_size": ranks}
    )
    recipe = dataclasses.replace(recipe, learner=config.Learner(processes=2, devices=(6, 7, 0)))
    programs = {program.name: program for stage in stages(recipe) for program in stage.programs}
    assert [programs[f"engine-{i}"].devices for i in range(count)] == expected
    assert programs["learner"].devices == (6, 7) and programs["queue"].devices == ()
    assert [program.name for stage in stages(recipe) if stage.held for program in stage.programs] == ["actor"]
