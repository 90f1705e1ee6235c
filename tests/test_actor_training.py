"""A learner whose algorithm asks other models, or whose batches are not finite, in a run's loop."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_reference import write_random_model
from learner_peers import STEPS, Around, make_lease, run

from actors import capsules
from scripts.learner_cli import learner as command
from stream_rl import config
from stream_rl import messages as m
from stream_rl.config import Algorithm
from stream_rl.types import Version

ALGORITHMS = {
    "gae": Algorithm(advantage="gae", gamma=0.99, kl_coefficient=0.1, kl_in="reward"),
    "distillation": Algorithm(advantage="distillation", kl_coefficient=0.1),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def around_of(directory: pathlib.Path, algorithm: Algorithm, **changes: Any) -> Around:
    """A run whose teacher, if it needs one, is of another family and size."""
    around = Around(directory)
    if algorithm.advantage == "distillation":
        teacher = directory / "teacher"
        write_random_model(teacher, architecture="LlamaForCausalLM", num_hidden_layers=3, head_dim=...)
        changes["teacher"] = config.Teacher(path=str(teacher))
    around.recipe = dataclasses.replace(around.recipe, algorithm=algorithm, **changes)
    config.dump(around.recipe, around.recipe.run_directory / "recipe.toml")
    return around


def metrics_of(around: Around) -> list[dict[str, float]]:
    return [applied.metrics for applied in around.queue.each(m.Applied)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_learner_that_is_lost_goes_on_with_its_critic_and_its_references(tmp_path: pathlib.Path, name: str) -> None:
    """To the bit as one that was not: checkpoints hold the critic, and frozen models are as they were."""

    async def straight() -> str:
        async with around_of(tmp_path / "straight", ALGORITHMS[name]) as around, around.learner():
            done = await around.until_done()
            for metrics in metrics_of(around):
                assert metrics["reference_bytes"] > 0 and metrics["reference_seconds"] > 0
                if name == "gae":
                    assert metrics["critic_loss"] > 0 and metrics["values_seconds"] > 0
                    assert metrics["critic_skipped"] == 0 and metrics["critic_explained_variance"] <= 1
                else:
                    assert metrics["reference_kl"] >= 0 and metrics["teacher_seconds"] > 0
            assert name == "gae" or max(metrics["reference_kl"] for metrics in metrics_of(around)) > 1e-6
            return done.weights_hash

    async def lost() -> str:
        async with around_of(tmp_path / "lost", ALGORITHMS[name]) as around:
            around.queue.withheld = Version(0, 3)
            async with around.learner():
                await around.queue.until(lambda: around.queue.said()[-1:] == ["LeaseRequest 0.3"])
            async with around.learner(2):
                done = await around.until_done()
            assert done.final == (1, STEPS)
            return done.weights_hash

    hashes: list[str] = []

    async def both() -> None:
        hashes.extend([await straight(), await lost()])

    run(both(), 120)
    assert hashes[0] == hashes[1]


def test_measures_of_a_step(tmp_path: pathlib.Path) -> None:
    learner = config.Learner(optimizer={"lr": 1e-3}, peak_flops=1e12)  # of no such machine as this

    async def test() -> None:
        async with around_of(tmp_path, Algorithm(), learner=learner) as around:
            equal = np.full(4, 0.5, np.float32)
            around.queue.changes[2] = {"rewards": equal}
            async with around.learner():
                await around.until_done()
            for step, metrics in enumerate(metrics_of(around)):
                seconds = metrics["forward_backward_seconds"] + metrics["optimizer_seconds"]
                assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / seconds)
                assert 0.0 < metrics["model_flops_utilization"] < 1.0
                assert 0.0 < metrics["effective_sample_size"] <= 1.0
                assert metrics["zero_advantage_share"] == float(step == 2)
                assert metrics["scoring_seconds"] == 0.0 and "critic_loss" not in metrics
                assert {"entropy", "gradient_norm", "lr", "behavior_kl_k3", "wait_seconds", "publish_seconds"} < set(
                    metrics
                )

    run(test())


def poisoned(step: int) -> tuple[dict[str, Any], int]:
    """A lease whose third trajectory has a NaN log-prob; and which of its tokens."""
    lease = make_lease(Version(0, step))
    begin, token = int(lease.lengths[:2].sum()), int(lease.lengths[2]) - 2
    logprobs = lease.logprobs.copy()
    logprobs[begin + token] = math.nan
    return {"logprobs": logprobs}, token


def test_a_step_that_is_not_finite_is_skipped_settled_and_kept(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with around_of(tmp_path, Algorithm()) as around:
            around.queue.changes[1], token = poisoned(1)
            masked = np.zeros(len(make_lease(Version(0, 3)).token_ids), np.uint8)
            around.queue.changes[3] = {"trainable": masked}
            async with around.learner():
                done = await around.until_done()
            applied = around.queue.each(m.Applied)
            assert [one.outcome for one in applied] == ["trained", "skipped", "trained", "skipped", "trained"]
            assert [one.metrics.get("not_finite", 0.0) for one in applied] == [0.0, 1.0, 0.0, 0.0, 0.0]
            hashes = around.publisher.hashes
            assert hashes[Version(0, 1)] == hashes[Version(0, 2)] != hashes[Version(0, 3)]
            assert done.final == (0, STEPS)
        kept = around.recipe.run_directory / "capsules"
        assert [path.name for path in kept.iterdir()] == ["step-0-1"], "nothing to train is not kept"
        lease = make_lease(Version(0, 1))
        place = f"sequence 2 (group {lease.groups[2]}, member 0), token {token} (id "
        for words in ([], ["--weights", around.recipe.model.path]):
            told = CliRunner().invoke(command, ["capsule", str(kept / "step-0-1"), *words], catch_exceptions=False)
            assert told.exit_code == 0
            lines = told.stdout.splitlines()
            assert any(line.startswith(f"behavior_logprobs: {place}") and line.endswith("by 0.1") for line in lines)
            assert all(place in line or line.startswith("loss: sequence 2 ") for line in lines[:-1]), lines
            assert lines[-1].startswith(f"step 0.1 of run-1: 4 sequences, {len(lease.token_ids)} tokens")
        assert json.loads((kept / "step-0-1" / "capsule.json").read_text())["metrics"]["skipped"] == 1.0
        capsule = capsules.read(kept / "step-0-1")
        assert math.isnan(capsule.batch.behavior_logprobs[int(lease.lengths[:2].sum()) + token])

    run(test())


def test_what_is_masked_may_have_any_log_prob(tmp_path: pathlib.Path) -> None:
    """-inf and NaN at masked tokens, a whole member masked, one trajectory left: every step trains, and the same."""
    lease = make_lease(Version(0, 1))
    only = np.where(np.repeat(np.arange(4), lease.lengths) == 2, lease.trainable, 0).astype(np.uint8)
    wild = np.where(only == 1, lease.logprobs, np.where(lease.token_ids % 2, -math.inf, math.nan)).astype(np.float32)

    async def weights_with(logprobs: Any, directory: pathlib.Path) -> str:
        async with around_of(directory, Algorithm(importance="sequence")) as around:
            around.queue.changes[1] = {"trainable": only, "logprobs": logprobs}
            async with around.learner():
                done = await around.until_done()
            assert {one.outcome for one in around.queue.all(m.Applied)} == {"trained"}
            return done.weights_hash

    async def test() -> None:
        assert await weights_with(wild, tmp_path / "a") == await weights_with(lease.logprobs, tmp_path / "b")

    run(test(), 120)


@pytest.mark.parametrize("name", ["reference", "teacher", "critic"])
def test_a_model_that_says_nan_skips_the_step(tmp_path: pathlib.Path, name: str, monkeypatch: Any) -> None:
    from engines.megatron.network import Network

    forward = Network._forward

    def broken(self: Network, token_ids: Any, temperature: float) -> Any:
        answers = forward(self, token_ids, temperature)
        if self.directory.name == "spoiled":
            answers[0][-1] = math.nan
        return answers

    monkeypatch.setattr(Network, "_forward", broken)
    section: Any = {"reference": config.Reference, "teacher": config.Teacher, "critic": config.Critic}[name]
    algorithm = {
        "reference": Algorithm(kl_coefficient=0.1),
        "teacher": Algorithm(advantage="distillation"),
        "critic": Algorithm(advantage="gae"),
    }[name]

    async def test() -> None:
        around = around_of(tmp_path, algorithm)
        write_random_model(tmp_path / "spoiled")
        around.recipe = dataclasses.replace(around.recipe, **{name: section(path=str(tmp_path / "spoiled"))})
        config.dump(around.recipe, around.recipe.run_directory / "recipe.toml")
        async with around:
            async with around.learner():
                await around.until_done()
            assert {one.outcome for one in around.queue.all(m.Applied)} == {"skipped"}
            assert len(set(around.publisher.hashes.values())) == 1

    run(test())
    assert len(list((tmp_path / "run" / "capsules").iterdir())) == 4
