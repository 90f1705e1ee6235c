"""No way of dying while a learner saves costs more than that save."""

import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from huggingface_reference import write_random_model
from megatron_builders import PPO, make_batch, make_learner

from actors.checkpoints import recover
from engines.megatron import resume
from engines.megatron.checkpoint import sweep
from stream_rl.types import Version

RUN = "run-1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    write_random_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


FORKS = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot be forked")
WATCHED = ("open", "os.", "shutil.", "pathlib.")


def forked(act: Callable[[], object]) -> int:
    """The pid of a copy of this process that does `act` and ends."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return pid


def die_at(event: int) -> Callable[[], int]:
    """Be killed at the `event`th touch of the file system from now on; returns how many there have been."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name.startswith(WATCHED):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: seen


@pytest.mark.long
@FORKS
def test_a_kill_at_any_touch_of_the_file_system_leaves_a_whole_checkpoint(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A save under a new name, one over an old one, and the end of those before."""
    learner = make_learner(model)
    learner.train_step(make_batch(0), PPO)
    start = tmp_path / "start"
    for step in (10, 20, 30):
        learner.save_checkpoint(start / f"step-{step}", Version(0, step), RUN)

    def act(checkpoints: pathlib.Path) -> None:
        learner.save_checkpoint(checkpoints / "step-40", Version(0, 40), RUN)
        learner.save_checkpoint(checkpoints / "step-30", Version(1, 30), RUN)
        resume.retire(checkpoints, 30)

    killed, outcomes = 0, set()
    for event in range(1, 1000):
        checkpoints = tmp_path / f"checkpoints-{event}"
        shutil.copytree(start, checkpoints)
        pid = forked(lambda event=event, checkpoints=checkpoints: (die_at(event), act(checkpoints)))
        status = os.waitpid(pid, 0)[1]
        version = recover(learner, checkpoints, RUN)
        assert version in [(0, 30), (0, 40), (1, 30)]
        assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")], "the rest is swept"
        assert {path.name for path in checkpoints.iterdir()} >= {"step-20", "step-30"}
        outcomes.add(version)
        shutil.rmtree(checkpoints)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed > 50
    assert len(outcomes) == 3


@FORKS
def test_kills_at_random_moments_lose_at_most_the_save_under_way(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Between the touches that Python sees, too: while bytes are written, hashed and synced."""
    learner, checkpoints = make_learner(model), tmp_path / "checkpoints"
    learner.train_step(make_batch(0), PPO)
    chance = random.Random(0)
    done = 0

    def save_on(first: int, said: int) -> None:
        for step in range(first, first + 1000):
            learner.save_checkpoint(checkpoints / f"step-{step}", Version(0, step), RUN)
            os.write(said, step.to_bytes(4, "little"))
            resume.retire(checkpoints, step)

    for trial in range(15):
        hears, says = os.pipe()
        pid = forked(lambda first=done + 1, says=says: save_on(first, says))
        os.close(says)
        with os.fdopen(hears, "rb") as file:
            said = file.read(4 * (trial % 3))  # waits for so many saves
            time.sleep(chance.uniform(0.0, 0.1))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            said += file.read()
        done = int.from_bytes(said[-4:], "little") if said else done
        version = recover(learner, checkpoints, RUN)
        assert (version is None and done == 0) or version.step in (done, done + 1)
        done = version.step if version else 0
    assert done >= 15
    resume.retire(checkpoints, done)
    assert len(list(checkpoints.iterdir())) == 2


def test_a_sweep_leaves_alone_what_is_being_written(tmp_path: pathlib.Path) -> None:
    pid = forked(lambda: signal.pause())
    try:
        for name in (f".step-1.writing-{pid}", f".step-2.replaced-{pid}", ".step-3.other-1", ".hidden"):
            (tmp_path / name).mkdir()
        before = sorted(tmp_path.iterdir())
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sweep(tmp_path, "step-1")
    assert {path.name for path in tmp_path.iterdir()} == {f".step-2.replaced-{pid}", ".step-3.other-1", ".hidden"}
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", ".step-3.other-1", ".hidden"}
