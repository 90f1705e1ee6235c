"""A frozen policy against transformers, and the KL to it in the learner's loss."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from huggingface_reference import (
    CLIP,
    OPTIMIZER,
    largest_logprob_difference,
    reference_logprobs,
    reference_optimizer,
    sequences_of,
    write_random_model,
)
from megatron_builders import TEMPERATURE, make_batch, make_learner

from algorithms.losses import make_loss
from engines.megatron.reference import FrozenPolicy
from stream_rl import config
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

SECTION = config.Learner(micro_batch_tokens=100, optimizer=OPTIMIZER)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_is_another_model_beside_the_policy_and_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "policy")
    sizes = {"num_hidden_layers": 3, "head_dim": ...}
    theirs = write_random_model(tmp_path / "teacher", architecture="Qwen2ForCausalLM", **sizes)
    policy = make_learner(tmp_path / "policy")
    frozen = FrozenPolicy(tmp_path / "teacher", SECTION)
    assert frozen.bytes == sum(parameter.nbytes for parameter in theirs.parameters())
    before = frozen.logprobs(sequences_of(make_batch(9)), TEMPERATURE)
    assert largest_logprob_difference(frozen, theirs, make_batch(9)) < 1e-5
    policy.train_step(make_batch(0), make_loss("ppo_clip", Algorithm()))
    for got, wanted in zip(frozen.logprobs(sequences_of(make_batch(9)), TEMPERATURE), before, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_reference_in_bfloat16_says_what_the_policy_says_that_is_the_same(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "model", dtype="bfloat16")
    policy, frozen = make_learner(tmp_path / "model"), FrozenPolicy(tmp_path / "model", SECTION)
    sequences = sequences_of(make_batch(9))
    for got, wanted in zip(
        frozen.logprobs(sequences, TEMPERATURE), policy.logprobs(sequences, TEMPERATURE), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_matches_transformers(tmp_path: pathlib.Path, estimator: str) -> None:
    """Three steps away from a reference of the same beginning, in any order of micro-batches."""
    model = write_random_model(tmp_path / "model")
    section = Algorithm(kl_coefficient=0.5, kl_estimator=estimator)  # type: ignore[arg-type]
    loss = make_loss("ppo_clip", section)
    policy, frozen = make_learner(tmp_path / "model"), FrozenPolicy(tmp_path / "model", SECTION)
    optimizer = reference_optimizer(model)
    kls = []
    for step in range(3):
        batch = make_batch(step)
        reference = np.concatenate(frozen.logprobs(sequences_of(batch), TEMPERATURE))
        batch = dataclasses.replace(batch, reference_logprobs=reference)
        report = policy.train_step(batch, loss)
        kls.append(report["reference_kl"])
        optimizer.zero_grad()
        logprobs = torch.cat([reference_logprobs(model, ids, TEMPERATURE) for ids in sequences_of(batch)])
        behavior, advantages, weights = (
            torch.from_numpy(field) for field in (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
        )
        value, _ = loss(logprobs, behavior, advantages, weights, None, torch.from_numpy(reference))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        assert report["loss"] == pytest.approx(value.item(), abs=1e-5)
        assert report["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kls[2]) > 1e-5
    assert largest_logprob_difference(policy, model, make_batch(9)) < 1e-4


def test_a_kl_in_the_loss_without_a_reference_stops_the_step(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "model")
    with pytest.raises(ValueError, match="reference policy's log-probs, got None"):
        make_learner(tmp_path / "model").train_step(make_batch(0), make_loss("ppo_clip", Algorithm(kl_coefficient=0.1)))


def test_a_directory_that_is_no_model_is_named(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "model")
    make_learner(tmp_path / "model")
    with pytest.raises(ConfigError, match="nowhere"):
        FrozenPolicy(tmp_path / "nowhere", SECTION)
