"""Environments of the package verifiers, with their own agent, through the real endpoint.

The package cannot be in our virtual environment (it needs another openai), so the tests of it take an interpreter that
has it, and uv, from STREAM_RL_VERIFIERS_PYTHON.
"""

import asyncio
import itertools
import os
import pathlib
import stat
from typing import Any

import endpoint_world
import pytest
from endpoint_world import World, play

from actors.adapters import verifiers
from actors.adapters.verifiers import Verifiers
from stream_rl.episode import EpisodeFailed
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, load_task, plays

PYTHON = os.environ.get("STREAM_RL_VERIFIERS_PYTHON", "")
real = [pytest.mark.long, pytest.mark.skipif(not PYTHON, reason="STREAM_RL_VERIFIERS_PYTHON names no interpreter")]
ENV: dict[str, Any] = {
    "taskset": {"id": "double_it"},
    "agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}},
}
TASKSET = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class DoubleTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)

class DoubleIt(vf.Taskset[DoubleTask, vf.TasksetConfig]):
    def load(self):
        for n in range(40):
            yield DoubleTask(Data(prompt=f"Twice {n}?", answer=str(2 * n)), self.config.task)

__all__ = ["DoubleIt"]
"""
FAKE = """
import json, os, sys, time
line = sys.stdin.readline()
print(json.dumps({"keys": [f"task {n}" for n in range(50)]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("task") == 1: os._exit(3)
    if asked.get("task") == 2: print("not json", flush=True)
    if asked.get("task") == 3: continue
    failed, done = {"failure": "environment_raised", "detail": "x"}, {"reward": 0.5, "metrics": {"m": 1.0}}
    if asked.get("task") == 4: print(json.dumps({"episode": asked["episode"], **failed}), flush=True)
    if asked.get("task") == 5: print(json.dumps({"episode": asked["episode"], **done}), flush=True)
    if "cancel" in asked: open("cancelled", "w").write(line)
"""


class Model:
    base_url = "http://127.0.0.1:9"
    key = "k"


@pytest.fixture
def fake(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Verifiers:
    """Its process is a script that misbehaves by the number of the task."""
    program = tmp_path / "program.py"
    program.write_text(FAKE)
    monkeypatch.setattr(verifiers.verifiers_program, "__file__", str(program))
    monkeypatch.chdir(tmp_path)
    return Verifiers(ENV)


def task(number: int, key: str = "") -> Prompt:
    return Prompt(text="", data={"task": number, "key": key or f"task {number}"})


def test_the_splits_share_no_task_and_train_goes_round(fake: Verifiers) -> None:
    heldout = [prompt.data["task"] for prompt in fake.prompts("heldout", 0)]
    train = [prompt.data["task"] for prompt in itertools.islice(fake.prompts("train", 0), 100)]
    assert heldout and not set(heldout) & set(train) and len(set(heldout) | set(train)) == 50
    once = 50 - len(heldout)
    assert set(train[:once]) == set(train[once : 2 * once]) and train[:once] != train[once : 2 * once]


def test_what_the_process_does_costs_the_episodes_that_it_should(fake: Verifiers) -> None:
    async def scene() -> None:
        assert await fake.play(task(5), Model()) == {"reward": 0.5, "m": 1.0}  # type: ignore[arg-type]
        for number, said in ((4, "environment_raised: x"), (1, "environment_died"), (2, "environment_died")):
            beside = asyncio.ensure_future(fake.play(task(3), Model()))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            with pytest.raises(EpisodeFailed, match=said):
                await fake.play(task(number), Model())  # type: ignore[arg-type]
            if "died" in said:
                with pytest.raises(EpisodeFailed, match="environment_died"):
                    await beside
            beside.cancel()
            assert (await fake.play(task(5), Model()))["reward"] == 0.5  # type: ignore[arg-type]
        with pytest.raises(EpisodeFailed, match="other tasks each time"):
            await fake.play(task(5, "another"), Model())  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await fake.play(task(3), Model())  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while not os.path.exists("cancelled"):  # noqa: ASYNC110, ASYNC240  tests may poll
                await asyncio.sleep(0.01)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("source", "said"),
    [('print(\'{"error": "no such taskset"}\')', "no such taskset"), ("raise SystemExit(1)", "its stderr says why")],
)
def test_an_environment_that_cannot_be_loaded_is_an_error(fake: Verifiers, source: str, said: str) -> None:
    pathlib.Path("program.py").write_text(source)
    with pytest.raises(ConfigError, match=said):
        next(fake.prompts("train", 0))

    async def scene() -> None:
        with pytest.raises(EpisodeFailed, match="environment_died"):
            await fake.play(task(5), Model())  # type: ignore[arg-type]

    asyncio.run(scene())


@pytest.mark.parametrize("options", [{"python": "/no/such/python"}, {"tasks": 0}, {"heldout_share": 1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="verifiers: "):
        load_task("actors.adapters.verifiers:Verifiers", {"env": ENV, **options})


def test_it_plays() -> None:
    assert plays(load_task("actors.adapters.verifiers:Verifiers", {"env": ENV}))


# -- the package itself --------------------------------------------------------------------------------------


@pytest.fixture
def taskset(tmp_path: pathlib.Path) -> Verifiers:
    """Of an interpreter that finds our taskset, too."""
    (tmp_path / "double_it.py").write_text(TASKSET)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPATH={pathlib.Path(PYTHON).parent}:$PATH PYTHONPATH={tmp_path} exec {PYTHON} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Verifiers(ENV, python=str(python), tasks=40)


@pytest.mark.parametrize(("said", "reward"), [("{}", 1.0), ("never", 0.0)])
def test_an_environment_of_verifiers_is_played_by_its_own_agent(
    taskset: Verifiers, said: str, reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_world, "PATIENCE", 250.0)  # uv makes an environment for the agent, once
    prompts = list(itertools.islice(taskset.prompts("train", 0), 3))
    rewards: list[float] = []

    async def scene(world: World) -> None:
        def say(before: list[int]) -> list[int]:
            number = world.text(before).rpartition("Twice ")[2].partition("?")[0]
            return world.ids(said.format(2 * int(number)))

        world.course.say = say
        for group, prompt in enumerate(prompts):
            made = world.episode(group)
            model: Any = Model()
            model.base_url, model.key = world.endpoint.address, made.key
            rewards.append((await taskset.play(prompt, model))["reward"])

    world = play(scene)
    assert rewards == [reward] * 3 and len(world.course.turns) == 3


def test_a_taskset_that_there_is_none_of_is_named(taskset: Verifiers) -> None:
    missing = Verifiers(ENV | {"taskset": {"id": "no_such_thing"}}, python=taskset._command[0])
    with pytest.raises(ConfigError, match="no_such_thing"):
        next(missing.prompts("train", 0))


for _test in (
    test_an_environment_of_verifiers_is_played_by_its_own_agent, test_a_taskset_that_there_is_none_of_is_named
):  # fmt: skip
    for _mark in real:
        _mark(_test)
