"""Directories of leases, and steps that are taken again on them: the proof that what a learner's line of training came
to after any loss is what it would have come to without."""

import asyncio
import dataclasses
import json
import pathlib
import random
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_peers import RUN, STEPS, Around, make_lease, run

from actors import learner, leases, replay
from engines.megatron.learner import MegatronLearner
from engines.megatron.saving import Saving
from stream_rl import config
from stream_rl import messages as m
from stream_rl.errors import ConfigError, StreamRLError, WeightsError, WouldOnlyRepeat
from stream_rl.types import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- files -----------------------------------------------------------------------------------------------------


def same(one: m.Lease, other: m.Lease) -> bool:
    fields = [field.name for field in dataclasses.fields(m.Lease)]
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in fields[1:]) and (
        one.step == other.step
    )


def test_a_lease_comes_back_as_it_was(tmp_path: pathlib.Path) -> None:
    lease = make_lease(Version(3, 14), rewards=np.array([np.nan, -0.0, np.inf, 1e-45], np.float32))
    path = leases.write(tmp_path / "leases", lease)
    assert path.name == "3.14.lease" and same(leases.read(path), lease)
    leases.write(path.parent, make_lease(Version(3, 14)))
    assert same(leases.read(path), make_lease(Version(3, 14))), "the newer takes its place"
    assert [each.name for each in path.parent.iterdir()] == ["3.14.lease"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_with_any_damage_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = leases.write(tmp_path_factory.mktemp("damage"), make_lease(Version(0, 3)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "more"]))
    flipped = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    path.write_bytes({"cut": whole[:at], "flip": flipped, "more": whole + whole[at:]}[damage])
    with pytest.raises(ConfigError, match=r"0\.3\.lease"):
        leases.read(path)


def test_a_file_under_another_name_is_refused(tmp_path: pathlib.Path) -> None:
    path = leases.write(tmp_path, make_lease(Version(0, 3)))
    with pytest.raises(ConfigError, match="should hold the lease of its name"):
        leases.read(path.rename(tmp_path / "0.4.lease"))
    with pytest.raises(ConfigError, match="cannot read"):
        leases.read(path)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=6))
def test_the_surviving_line_is_what_a_learner_went_through_last(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int]]
) -> None:
    """Each life goes back to some step of the line and takes so many from there."""
    directory, line = tmp_path_factory.mktemp("line"), list[int]()
    for history, (back, steps) in enumerate(lives):
        line = line[: max(0, len(line) - back)]
        for _ in range(steps):
            (directory / f"{history}.{len(line)}.lease").touch()
            line.append(history)
    if line:
        found = [path.name for path in leases.surviving(directory)]
        assert found == [f"{history}.{step}.lease" for step, history in enumerate(line)]
    else:
        with pytest.raises(ConfigError, match="holds no leases"):
            leases.surviving(directory)


@pytest.mark.parametrize("last", [2, 10**15])
def test_a_step_without_a_lease_is_named(tmp_path: pathlib.Path, last: int) -> None:
    for step in (0, last):
        (tmp_path / f"0.{step}.lease").touch()
    (tmp_path / "0.1.new").touch()
    with pytest.raises(ConfigError, match=rf"no lease of step 1 and has one of step {last}"):
        leases.surviving(tmp_path)


def test_a_disk_that_refuses_ends_the_learner_with_what_to_do(tmp_path: pathlib.Path) -> None:
    (tmp_path / "leases").write_text("no directory")
    with pytest.raises(StreamRLError, match=r"cannot keep .*learner\.leases"):
        leases.write(tmp_path / "leases", make_lease(Version(0, 0)))


# -- steps taken again -----------------------------------------------------------------------------------------


def replayed(recipe: config.Recipe) -> None:
    replay.compare(recipe, RUN, recipe.run_directory / "leases", recipe.run_directory)


async def until_waiting(around: Around, version: str) -> None:
    await around.queue.until(lambda: around.queue.said()[-1:] == [f"LeaseRequest {version}"])
    await around.publisher.until(lambda: str(around.publisher.version) == version)


@pytest.fixture(scope="module")
def lost_twice(tmp_path_factory: pytest.TempPathFactory) -> Around:
    """A run whose learner was lost in its first history after step 2, and in its second after step 3, with a checkpoint
    after each second step; and its directory."""
    found: list[Around] = []

    async def scene() -> None:
        async with Around(tmp_path_factory.mktemp("lost"), leases="record") as around:
            for incarnation, withheld, name in ((1, Version(0, 3), "step-2"), (2, Version(1, 4), "step-4")):
                around.queue.withheld = withheld
                async with around.learner(incarnation):
                    await until_waiting(around, str(withheld))
                    await around.written(name)
            async with around.learner(3):
                await around.until_done()
            found.append(around)

    run(scene())
    return found[0]


def test_the_surviving_line_of_a_learner_that_was_lost_is_that_of_one_that_was_not(
    lost_twice: Around, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lost_twice.log() == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (2, 4)]
    replayed(lost_twice.recipe)
    *steps, verdict = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in steps] == ["0.0", "0.1", "1.2", "1.3", "2.4"]
    assert all(line.endswith("equal") for line in steps)
    assert verdict == "equal to the bit: the loss and gradient of 5 steps; the weights of step-2, step-4, final"


def copy(around: Around, to: pathlib.Path) -> config.Recipe:
    """The run in another directory, to be damaged."""
    import shutil

    shutil.copytree(around.recipe.run_directory, to / "run")
    return dataclasses.replace(around.recipe, run=dataclasses.replace(around.recipe.run, directory=str(to)))


def another_reward(directory: pathlib.Path) -> str:
    lease = leases.read(directory / "leases" / "1.2.lease")
    leases.write(directory / "leases", dataclasses.replace(lease, rewards=lease.rewards[::-1].copy()))
    return r"step 1\.2 differs first: its (loss|gradient_norm) was"


def another_loss(directory: pathlib.Path) -> str:
    path = directory / "learner.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["loss"] = float(np.nextafter(lines[4]["loss"], 1.0))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return r"step 1\.3 differs first: its loss was"


def other_weights(directory: pathlib.Path) -> str:
    """One bit of one weight."""
    from safetensors.torch import load_file, save_file

    path = directory / "checkpoints" / "final" / "model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors.values())).view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(9.0, dtype=first.dtype))
    save_file(tensors, path, metadata={"format": "pt"})
    return r"the weights after step 2\.4 differ: .*final holds"


def without_a_lease(directory: pathlib.Path) -> str:
    (directory / "leases" / "1.2.lease").unlink()
    (directory / "leases" / "0.2.lease").unlink()
    return "no lease of step 2"


@pytest.mark.parametrize("damage", [another_reward, another_loss, other_weights, without_a_lease])
def test_the_first_difference_is_named(tmp_path: pathlib.Path, lost_twice: Around, damage: Any) -> None:
    recipe = copy(lost_twice, tmp_path)
    with pytest.raises(StreamRLError, match=damage(recipe.run_directory)):
        replayed(recipe)


def test_of_a_run_that_goes_on_what_it_has_taken_is_compared(
    tmp_path: pathlib.Path, lost_twice: Around, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copy(lost_twice, tmp_path)
    path = recipe.run_directory / "learner.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"history": 2, "st')
    replayed(recipe)
    told = capsys.readouterr().out
    assert "1 more leased and not taken" in told and "gradient of 4 steps; the weights of step-2, step-4" in told


def test_a_line_that_was_lost_is_passed_over(
    tmp_path: pathlib.Path, lost_twice: Around, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copy(lost_twice, tmp_path)
    path = recipe.run_directory / "learner.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"history": 1, "step": 2' not in line))
    replayed(recipe)
    told = capsys.readouterr().out
    assert "no line of it" in told and "gradient of 4 steps; the weights of step-2, step-4, final" in told


def test_leases_that_were_only_kept_train_to_what_the_run_would_have(
    tmp_path: pathlib.Path, lost_twice: Around, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scene() -> None:
        async with Around(tmp_path, leases="only_record", max_skipped_steps=1) as around:
            async with around.learner():
                await around.until_done()
            assert {applied.outcome for applied in around.queue.all(m.Applied)} == {"skipped"}
            assert len(set(around.publisher.hashes.values())) == 1, "the weights stay"
            assert around.publisher.taken[-1] == (0, STEPS), "and yet there is a version for each step"
            kept = around.recipe.run_directory / "leases"
            alone = dataclasses.replace(around.recipe, run=dataclasses.replace(around.recipe.run, name="alone"))
            alone.run_directory.mkdir()
            replay.train(alone, RUN, kept, alone.run_directory)
            trained = lost_twice.publisher.hashes[Version(2, STEPS)]
            assert capsys.readouterr().out.splitlines()[-1] == f"weights {trained}"
            lines = [json.loads(line) for line in (alone.run_directory / "learner.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(STEPS)) and lines[-1]["metrics"]["lr"] > 0
            MegatronLearner(alone.run_directory / "checkpoints" / "final", alone.learner, 0)

    run(scene())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_learner_killed_at_random_moments_leaves_a_line_that_replays(tmp_path: pathlib.Path, seed: int) -> None:
    async def scene() -> None:
        async with Around(tmp_path, leases="record") as around:
            chance, queue = random.Random(seed), around.queue
            for incarnation in range(1, 6):
                words = (str(around.recipe.run_directory / "recipe.toml"), "--run-id", RUN, "--queue", queue.address,
                         "--publisher", around.publisher.address, "--incarnation", str(incarnation))  # fmt: skip
                queue.heard.clear()
                process = await asyncio.create_subprocess_exec(sys.executable, "-m", "actors.learner", *words, cwd=ROOT)
                if incarnation < 5:
                    said = chance.randrange(2, 12)
                    await queue.until(
                        lambda said=said: len(queue.all(m.Hello, m.LeaseRequest, m.Applied, m.Committed)) >= said
                    )
                    await asyncio.sleep(chance.uniform(0.0, 0.05))
                    process.kill()
                else:
                    await around.until_done()
                    process.terminate()
                assert await process.wait() == (-signal.SIGKILL if incarnation < 5 else 0)
            replayed(around.recipe)

    run(scene(), 250)


# -- the loop --------------------------------------------------------------------------------------------------


def test_a_row_of_skipped_steps_ends_the_learner_with_a_diagnosis(tmp_path: pathlib.Path) -> None:
    async def scene() -> None:
        async with Around(tmp_path, max_skipped_steps=3) as around:
            for step in (0, 2, 3, 4):
                tokens = int(make_lease(Version(0, step)).lengths.sum())
                around.queue.changes[step] = {"trainable": np.zeros(tokens, np.uint8)}
            with pytest.raises(ExceptionGroup) as raised:
                async with around.learner() as task:
                    await asyncio.wait([task])
            expected = r"the last 3 steps, 0\.2 to 0\.4, were skipped .* those of step 0\.2; .*capsules"
            assert raised.group_contains(WouldOnlyRepeat, match=expected, depth=1)
            assert [applied.outcome for applied in around.queue.each(m.Applied)][-3:] == ["skipped"] * 3
            assert around.log()[-1] == (0, 4), "the books know of all of them"

    run(scene())


class Held(MegatronLearner):
    """Its checkpoints are written when they may be."""

    may, fails = threading.Event(), False

    def begin_checkpoint(self, *arguments: Any, **beside: Any) -> Saving:
        saving = super().begin_checkpoint(*arguments, **beside)
        finish = saving.finish

        def held() -> None:
            assert self.may.wait(30)
            finish()
            if self.fails:
                raise WeightsError("the disk is full")

        saving.finish = held  # type: ignore[method-assign]
        return saving


@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_while_a_checkpoint_is_written_and_ends_with_one_that_fails(
    tmp_path: pathlib.Path, lost_twice: Around, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    async def scene() -> None:
        Held.may.clear()
        Held.fails = fails
        monkeypatch.setattr(learner, "MegatronLearner", Held)
        async with Around(tmp_path) as around:
            queue = around.queue
            if fails:

                async def until_it_ends() -> None:
                    async with around.learner() as task:
                        await queue.until(lambda: "Applied 0.3" in queue.said())
                        Held.may.set()
                        await asyncio.wait([task])

                with pytest.raises(ExceptionGroup) as raised:
                    await until_it_ends()
                assert raised.group_contains(WeightsError, match="the disk is full")
                assert not queue.all(m.Committed, m.LearnerDone)
                return
            async with around.learner():
                await queue.until(lambda: "Applied 0.3" in queue.said())
                assert not queue.all(m.Committed), "it is not durable"
                Held.may.set()
                done = await around.until_done()
            assert [message.step.step for message in queue.each(m.Committed)] == [2, 4, 5]
            assert queue.said().index("Applied 0.4") > queue.said().index("Committed 0.2"), "one at a time"
            assert done.weights_hash == lost_twice.publisher.hashes[Version(2, STEPS)]

    run(scene())
