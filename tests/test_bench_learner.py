"""`stream-rl bench learner`: all trainers do the same work, what is ours counts as ours, and a tiny run is whole."""

import dataclasses
import gc
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithms.losses import make_loss
from engines.megatron import specimen
from engines.megatron.learner import MegatronLearner
from engines.megatron.packing import cut
from engines.megatron.step_costs import MODEL, StepSplit
from engines.transformers.trainer import LYING, Lying, TransformersTrainer
from scripts.bench.cli import bench
from scripts.bench.learner import (
    INCLUDES,
    OPTIMIZER,
    SAME,
    TARGETS,
    Plan,
    apart,
    long_tailed_batch,
    long_tailed_lengths,
    measure,
)
from scripts.bench.learner_gap import gap_statistics
from stream_rl.config import Algorithm, Learner
from stream_rl.errors import ConfigError

VOCAB, TOKENS, BUDGET = 96, 512, 160
LOSS = make_loss("ppo_clip", Algorithm())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("model")
    specimen.write(directory, dataclasses.replace(specimen.sized(64, 2, VOCAB), dtype="float32"))
    return directory


def make_learner(model: pathlib.Path) -> MegatronLearner:
    return MegatronLearner(model, Learner(micro_batch_tokens=BUDGET, optimizer=OPTIMIZER), seed=0)


def make_plan(**changes: Any) -> Plan:
    plan: dict[str, Any] = {"model": None, "size": "small", "tokens": TOKENS, "micro_batch_tokens": BUDGET, "pairs": 3}
    return Plan(**(plan | {"threads": 1, "alone": False, "without": (), "profile": None, "options": {}} | changes))


# -- the same work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lying", LYING)
def test_every_trainer_has_the_learners_losses_and_norms(model: pathlib.Path, lying: Lying) -> None:
    learner, trainer = make_learner(model), TransformersTrainer(model, lying, OPTIMIZER)
    for seed in range(4):
        batch = long_tailed_batch(TOKENS, VOCAB, seed)
        cuts = cut(batch.lengths, BUDGET)
        assert len(cuts) > 2 and max(map(len, cuts)) > 2  # or nothing is told apart
        assert apart(learner.train_step(batch, LOSS), trainer.train_step(batch, cuts, LOSS)) <= SAME


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-3}, {"weight_decay": 50.0}, {"clip_grad": 1e-3}, {"adam_beta2": 0.1}], ids=str
)
def test_another_optimizer_is_noticed(model: pathlib.Path, changes: dict[str, float]) -> None:
    """Planted: the comparison would not see it from the first step."""
    learner, trainer = make_learner(model), TransformersTrainer(model, "by_sequence", OPTIMIZER | changes)
    worst = 0.0
    for seed in range(4):
        batch = long_tailed_batch(TOKENS, VOCAB, seed)
        report = trainer.train_step(batch, cut(batch.lengths, BUDGET), LOSS)
        worst = max(worst, apart(learner.train_step(batch, LOSS), report))
    assert worst > SAME


def test_a_step_that_is_not_finite_is_not_the_same_work() -> None:
    fine = {"loss": 1.0, "gradient_norm": 1.0}
    assert apart(fine, fine) == 0.0
    assert apart(fine, {"loss": math.nan, "gradient_norm": 1.0}) == math.inf
    assert apart(fine | {"gradient_norm": math.inf}, fine) == math.inf


# -- what is counted -----------------------------------------------------------------------------------------


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """What is measured is the CPU time of the process; a full collection of this one is longer than a step."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def burned(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.usefixtures("_no_collection")
def test_what_a_loss_burns_is_not_the_models_work(model: pathlib.Path) -> None:
    split, batch = StepSplit(make_learner(model)), long_tailed_batch(TOKENS, VOCAB, 0)

    def slow(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        burned(0.1)
        return LOSS(*arguments)

    count = len(cut(batch.lengths, BUDGET))
    split.train_step(batch, LOSS)
    _, plain = split.train_step(batch, LOSS)
    _, burning = split.train_step(batch, slow)
    assert set(plain) == {*MODEL, "finding", "other"}
    assert all(seconds > 0.0 for seconds in plain.values()), plain
    assert 0.09 * count < burning["other"] - plain["other"] < 0.2 * count
    assert burning["forward"] + burning["backward"] < 0.1 * count


@pytest.mark.usefixtures("_no_collection")
def test_what_the_models_passes_burn_is_not_ours(model: pathlib.Path) -> None:
    learner, batch = make_learner(model), long_tailed_batch(TOKENS, VOCAB, 0)
    split = StepSplit(learner)
    split.train_step(batch, LOSS)
    _, plain = split.train_step(batch, LOSS)

    class Burning(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            burned(0.1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            burned(0.1)
            return gradients[0]

    layer = learner.network.gpt.decoder.layers[0].mlp
    handle = layer.register_forward_hook(lambda module, inputs, output: (Burning.apply(output[0]), *output[1:]))
    _, burning = split.train_step(batch, LOSS)
    handle.remove()
    count = len(cut(batch.lengths, BUDGET))
    for part in ("forward", "backward"):
        assert burning[part] - plain[part] > 0.09 * count
    assert burning["other"] < 0.05 * count


# -- the data ------------------------------------------------------------------------------------------------


@given(tokens=st.integers(256, 40_000), seed=st.integers(0, 1000))
def test_lengths_fill_a_step_and_have_a_long_tail(tokens: int, seed: int) -> None:
    lengths = long_tailed_lengths(tokens, np.random.default_rng(seed))
    assert lengths.sum() == tokens
    assert lengths.min() >= 2 and lengths.max() <= tokens // 4


def test_most_sequences_are_short_and_a_few_hold_many_of_the_tokens() -> None:
    lengths = np.concatenate([long_tailed_lengths(8192, np.random.default_rng(seed)) for seed in range(20)])
    assert 100 < np.median(lengths) < 156
    longest = np.sort(lengths)[-len(lengths) // 10 :]
    assert longest.sum() > 0.3 * lengths.sum()


# -- a tiny run ----------------------------------------------------------------------------------------------


def test_a_tiny_run_is_whole(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["learner", "--model", str(model), "--tokens", str(TOKENS), "--micro-batch-tokens", str(BUDGET)]
    path = tmp_path / "learner.json"
    done = CliRunner().invoke(bench, [*words, "--pairs", "3", "--json", str(path)], catch_exceptions=False)
    result = json.loads(path.read_text())
    assert done.output.rstrip().endswith(path.read_text().rstrip())
    assert result["over"].keys() == result["cpu_over"].keys() == set(LYING)
    assert all(
        found["low"] <= found["mean"] <= found["high"] and found["pairs"] == 3 for found in result["over"].values()
    )
    assert sum(result["cpu_shares"].values()) == pytest.approx(1.0)
    assert result["outside_share"] == pytest.approx(result["cpu_shares"]["finding"] + result["cpu_shares"]["other"])
    assert result["met"].keys() == {*TARGETS, "same_work"} and result["met"]["same_work"]
    assert 0.0 < result["padding_share_of_padded"] < 1.0
    assert INCLUDES.keys() - result.keys() == {"padded", "packed", "by_sequence", "model_flops"}


def test_alone_it_says_its_rate_work_and_memory(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    profile = tmp_path / "profile.txt"
    result = measure(make_plan(model=model, alone=True, options=options, profile=profile), lambda line: None)
    assert "aten::mm" in profile.read_text()
    assert result["steps"] == 3 and result["skipped"] == 0
    assert result["tokens_per_second"] > 0 and result["peak_memory_gib"] > 0
    # two for each multiplied weight and token, three passes, and attention on top
    multiplied = result["parameters"] - 64 - 2 * (2 * 64 + 2 * 64)
    assert result["model_flops_per_step"] > 6 * TOKENS * multiplied
    assert result["model_flops_per_step"] < 12 * TOKENS * multiplied
    assert result["peak_flops"] == 0.0 and result["model_flops_utilization"] is None


def test_alone_it_runs_in_bfloat16_as_on_a_gpu(tmp_path: pathlib.Path) -> None:
    specimen.write(tmp_path, specimen.sized(64, 2, VOCAB))
    result = measure(make_plan(model=tmp_path, alone=True), lambda line: None)
    assert result["dtype"] == "bfloat16" and result["skipped"] == 0 and result["of_them"]["find_seconds"] > 0.0
    assert 0.0 < result["changed_share"] < 0.5


@pytest.mark.parametrize("changes", [{"pairs": 2}, {"tokens": 255}])
def test_a_plan_that_says_nothing_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected 3 pairs or more and 256 tokens or more"):
        measure(make_plan(**changes), lambda line: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is for a GPU runs on one")
def test_what_is_for_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="--without attention is for a GPU"):
        measure(make_plan(without=("attention",)), lambda line: None)


def test_options_of_the_model_reach_megatron_core(model: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.model\.recompute is not known to megatron-core"):
        measure(make_plan(model=model, alone=True, options={"recompute": True}), lambda line: None)


# -- the gap to SGLang ---------------------------------------------------------------------------------------


def test_the_gap_is_said_as_a_distribution() -> None:
    engine = np.zeros((2, 500), np.float32)
    learner = np.zeros((2, 500), np.float32)
    learner[0, :10], learner[1, 0] = -0.5, 1.0
    found = gap_statistics(learner, engine)
    assert found["mean"] == pytest.approx(-4e-3)
    assert found["abs"]["mean"] == pytest.approx(6e-3)
    assert (found["abs"]["p50"], found["abs"]["p90"], found["abs"]["max"]) == (0.0, 0.0, 1.0)
    assert found["abs"]["p99"] == pytest.approx(0.5)
    ratios = [math.exp(-0.5)] * 10 + [math.e] + [1.0] * 989
    assert found["kl_k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 1000)
    square = sum(r * r for r in ratios) / 1000
    assert found["effective_sample_size"] == pytest.approx((sum(ratios) / 1000) ** 2 / square)


@pytest.mark.parametrize("engine", [np.full((2, 3), np.nan, np.float32), np.zeros((3, 2), np.float32)])
def test_a_gap_that_is_none_is_refused(engine: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected finite log-probs of one shape"):
        gap_statistics(np.zeros((2, 3), np.float32), engine)


@pytest.mark.long
def test_the_learner_and_sglang_agree_on_a_tiny_model(model: pathlib.Path) -> None:
    words = ["learner-gap", "--model", str(model), "--prompts", "4", "--prompt-tokens", "8", "--new-tokens", "12"]
    done = CliRunner().invoke(bench, words, catch_exceptions=False)
    result = json.loads(done.output[done.output.index("\n{") :])
    assert result["tokens"] == 48
    assert -2 * math.log(VOCAB) < result["logprob_mean"] < 0
    assert result["met"] == {"float32_max_abs": True}
