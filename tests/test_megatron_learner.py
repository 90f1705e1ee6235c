"""What the learner promises of a step.  test_megatron_families.py compares its steps with transformers' and AdamW's."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_reference import (
    OPTIMIZER,
    largest_logprob_difference,
    reference_logprobs,
    sequences_of,
    write_random_model,
)
from megatron_builders import LENGTHS, PPO, TEMPERATURE, make_batch, make_learner
from torch import Tensor

from algorithms.losses import cross_entropy
from stream_rl.errors import ConfigError, WeightsError
from stream_rl.types import TrainingBatch


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    write_random_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_leave_as_they_came_and_transformers_loads_them(tmp_path: pathlib.Path, tied: bool, dtype: str) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    write_random_model(source, tie_word_embeddings=tied, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    learner = make_learner(source)
    stored = safetensors.torch.load_file(source / "model.safetensors")
    weights = dict(learner.named_weights())
    assert weights.keys() == stored.keys()
    assert all(weights[n].dtype == stored[n].dtype and torch.equal(weights[n], stored[n]) for n in stored)

    metrics = learner.train_step(make_batch(0), PPO)
    assert metrics["skipped"] == 0.0
    learner.save(target)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype))
    assert all(torch.equal(loaded.state_dict()[n], tensor) for n, tensor in learner.named_weights())
    # A norm near 1 does not move in bfloat16 by one step of 1e-3; small weights do.
    moved = [name for name, tensor in learner.named_weights() if not torch.equal(tensor, stored[name])]
    assert {name for name in stored if "_proj" in name or "embed" in name} <= set(moved)
    assert (target / "tokenizer.json").exists()
    assert (target / "config.json").read_text() == (source / "config.json").read_text()
    if dtype == "float32":
        assert largest_logprob_difference(learner, loaded, make_batch(9)) < 1e-5
    else:
        assert largest_logprob_difference(learner, loaded.float(), make_batch(9)) < 0.3


def test_the_step_does_not_depend_on_the_cut(directory: pathlib.Path) -> None:
    def after(micro_batch_tokens: int, order: np.ndarray) -> tuple[dict[str, Tensor], dict[str, float]]:
        batch, sequences = make_batch(0), np.arange(len(LENGTHS))
        indices = np.concatenate([np.split(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])[s] for s in order])
        fields = ("token_ids", "behavior_logprobs", "advantages", "loss_weights")
        shuffled = {name: getattr(batch, name)[indices] for name in fields}
        assert sorted(order) == sequences.tolist()
        # SGD, so that a weight's change is its gradient and not the gradient's sign.
        plain = {"optimizer": "sgd", "lr": 1.0, "clip_grad": 0.0, "weight_decay": 0.0, "sgd_momentum": 0.0}
        learner = make_learner(directory, micro_batch_tokens, optimizer=plain)
        metrics = learner.train_step(
            TrainingBatch(**shuffled, lengths=batch.lengths[order], temperature=batch.temperature), PPO
        )
        return dict(learner.named_weights()), metrics

    random = np.random.default_rng(0)
    wanted, wanted_metrics = after(10_000, np.arange(len(LENGTHS)))
    for micro_batch_tokens in (1, 50, 64, 130):
        got, metrics = after(micro_batch_tokens, random.permutation(len(LENGTHS)))
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
        for name in metrics.keys() - {"forward_backward_seconds", "optimizer_seconds"}:
            assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-4, abs=1e-6), name


def test_entropy_and_loss_metrics_are_means_by_weight(directory: pathlib.Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
    batch = make_batch(0)
    doubled = TrainingBatch(
        **{name: getattr(batch, name) for name in ("token_ids", "lengths", "behavior_logprobs", "advantages")},
        loss_weights=batch.loss_weights * 2,
        temperature=batch.temperature,
    )
    entropies = []
    with torch.no_grad():
        for ids in sequences_of(batch):
            logits = reference(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1] / TEMPERATURE
            entropies += [0.0, *torch.distributions.Categorical(logits=logits).entropy().tolist()]
        gap = torch.cat([reference_logprobs(reference, ids, TEMPERATURE) for ids in sequences_of(batch)])
    gap -= torch.from_numpy(batch.behavior_logprobs)
    metrics = make_learner(directory).train_step(doubled, PPO)
    assert metrics["entropy"] == pytest.approx(float(np.sum(batch.loss_weights * entropies)), rel=1e-4)
    assert metrics["logprob_gap_abs"] == pytest.approx(float(np.sum(batch.loss_weights * gap.abs().numpy())), rel=1e-4)
    assert metrics["importance_max"] == pytest.approx(float(gap[batch.loss_weights > 0].max().exp()), rel=1e-4)
    assert metrics["tokens"] == sum(LENGTHS)
    assert metrics["trained_tokens"] == np.count_nonzero(batch.loss_weights)
    assert metrics["lr"] == OPTIMIZER["lr"]


def spoiled(batch: TrainingBatch, **changes: Any) -> TrainingBatch:
    fields = {name: getattr(batch, name) for name in TrainingBatch.__dataclass_fields__}
    return TrainingBatch(**(fields | changes))


def test_a_step_that_is_not_finite_or_has_nothing_to_train_changes_nothing(directory: pathlib.Path) -> None:
    learner, untouched = make_learner(directory), make_learner(directory)
    batch = make_batch(0)

    def infinite_gradient(logprobs: Tensor, *_: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (logprobs - logprobs.detach()).abs().sqrt().sum(), {}  # value 0, gradient NaN

    advantages = np.where(batch.loss_weights > 0, np.float32(np.nan), np.float32(0))
    for bad, loss in (
        (spoiled(batch, advantages=advantages), PPO),
        (batch, infinite_gradient),
        (spoiled(batch, loss_weights=np.zeros_like(batch.loss_weights)), PPO),
    ):
        before = {name: tensor.clone() for name, tensor in learner.named_weights()}
        metrics = learner.train_step(bad, loss)
        assert metrics["skipped"] == 1.0
        assert all(np.isfinite(list(metrics.values())))
        assert all(torch.equal(before[name], tensor) for name, tensor in learner.named_weights())
    for one in (learner, untouched):
        assert one.train_step(batch, PPO)["skipped"] == 0.0
    for (_, got), (_, wanted) in zip(learner.named_weights(), untouched.named_weights(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_supervised_steps_learn_their_demonstrations(directory: pathlib.Path) -> None:
    learner = make_learner(directory)
    learner.reset_optimizer({"lr": 1e-2}, {"lr_warmup_steps": 2}, section="warm_start")
    batch = spoiled(make_batch(0, [20, 30]), advantages=np.ones(50, np.float32), temperature=1.0)
    reports = [learner.train_step(batch, cross_entropy) for _ in range(40)]
    assert [report["lr"] for report in reports[:4]] == [0.0, 5e-3, 1e-2, 1e-2]
    assert reports[-1]["loss"] < 0.2 * reports[0]["loss"]


def test_logprobs_come_in_the_order_of_the_sequences_beyond_the_first_rotary_table(tmp_path: pathlib.Path) -> None:
    reference = write_random_model(tmp_path / "model", max_position_embeddings=4096)
    learner = make_learner(tmp_path / "model")
    batch = make_batch(3, [5, 1100, 1, 90, 2])
    assert learner.logprobs([], 1.0) == []
    assert [len(values) for values in learner.logprobs(sequences_of(batch), 1.0)] == [5, 1100, 1, 90, 2]
    assert largest_logprob_difference(learner, reference, batch) < 3e-5


@pytest.mark.parametrize("lengths", [[16, 16, 16], [1], [64, 3, 3, 3], [40, 39, 20, 19, 2, 1], [1, 1, 1]])
def test_padding_is_out_of_sight(directory: pathlib.Path, lengths: list[int]) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
    learner = make_learner(directory, micro_batch_tokens=1000)
    assert largest_logprob_difference(learner, reference, make_batch(1, lengths)) < 1e-5


def test_recomputing_activations_changes_nothing(directory: pathlib.Path) -> None:
    plain = make_learner(directory)
    recomputing = make_learner(
        directory, model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    )
    batch = make_batch(0)
    assert plain.train_step(batch, PPO)["loss"] == recomputing.train_step(batch, PPO)["loss"]
    for (_, got), (_, wanted) in zip(plain.named_weights(), recomputing.named_weights(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"recompute_granularit": "full"}}, "learner.model.recompute_granularit is not known .*did you mean"),
        ({"model": {"num_layers": 3}}, r"num_layers cannot be set: it comes from the model's config\.json"),
        ({"model": {"tensor_model_parallel_size": 2}}, r"processes = 1 must be a multiple of .* = 2 \* 1"),
        ({"model": {"pipeline_model_parallel_size": 0}}, "pipeline_model_parallel_size must be a positive int, got 0"),
        ({"model": {"context_parallel_size": 2}}, "cannot be set: it needs TransformerEngine's attention"),
        ({"model": {"expert_model_parallel_size": 2}}, "cannot be set: the learner has dense models only"),
        ({"model": {"virtual_pipeline_model_parallel_size": 2}}, "cannot be set: all pipeline stages"),
        ({"model": {"sequence_parallel": True}}, "megatron-core refuses"),
        ({"processes": 2}, "processes is 2 and torch.distributed has 1"),
        ({"ddp": {"overlap_param_gather": True}}, "needs learner.ddp.use_distributed_optimizer"),
        ({"ddp": {"use_distributed_optimiser": True}}, "did you mean use_distributed_optimizer"),
        ({"ddp": {"average_in_collective": True}}, "whole normalization is in the batch's loss weights"),
        ({"optimizer": {"lr": 1e-3, "use_distributed_optimizer": True}}, "cannot be set: set it in learner.ddp"),
        ({"model": {"recompute_granularity": "full"}}, "megatron-core refuses"),
        ({"model": {"recompute_num_layers": "1"}}, "recompute_num_layers: Expected `int | null`, got `str`, got '1'"),
        ({"optimizer": {"lr": 1e-3, "beta1": 0.9}}, r"learner\.optimizer\.beta1 is not known .*'adam_beta1'"),
        ({"optimizer": {}}, r"learner\.optimizer\.lr must be a positive number, got None"),
        ({"schedule": {"max_lr": 1e-3}}, r"learner\.schedule\.max_lr cannot be set: the peak .* optimizer\.lr"),
        ({"schedule": {"lr_warmup": 3}}, r"did you mean lr_warmup_steps\?"),
        ({"schedule": {"lr_decay_style": "cosine"}}, r"lr_decay_steps is needed"),
        ({"schedule": {"lr_warmup_steps": 9, "lr_decay_steps": 3}}, "megatron-core refuses"),
    ],
)
def test_options_that_megatron_core_does_not_take_are_refused(
    directory: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_learner(directory, **changes)


def test_weights_of_another_dtype_than_the_config_says_are_refused(directory: pathlib.Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"float32"', '"bfloat16"'))
    with pytest.raises(WeightsError, match=r"says torch\.bfloat16 .* has torch\.float32"):
        make_learner(directory)


def test_a_batch_that_is_not_well_formed_is_refused(directory: pathlib.Path) -> None:
    learner, batch = make_learner(directory), make_batch(0)
    for changes, message in (
        ({"lengths": batch.lengths[:-1]}, "lengths must be positive and sum to"),
        ({"token_ids": batch.token_ids + 64}, r"token ids must be in \[0, 64\)"),
        ({"advantages": batch.advantages[:-1]}, "advantages must have one value"),
        ({"loss_weights": np.ones_like(batch.loss_weights)}, "first token"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.train_step(spoiled(batch, **changes), PPO)
    short = make_learner(directory, max_sequence_tokens=63)
    with pytest.raises(ValueError, match=r"64 tokens and learner\.max_sequence_tokens is 63; raise it"):
        short.train_step(batch, PPO)
    with pytest.raises(ValueError, match="256 positions"):
        learner.logprobs([np.zeros(257, np.int32)], 1.0)
