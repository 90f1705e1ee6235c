"""The critic against transformers' body with a linear head and torch's AdamW, and what its checkpoints bring back."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_reference import CLIP, OPTIMIZER, reference_optimizer, sequences_of, write_random_model
from megatron_builders import make_batch, make_learner
from torch import Tensor

from algorithms.critic import ValueLoss
from engines.megatron.critic import Critic
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.types import TrainingBatch, Version

LOSS = ValueLoss(0.1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    write_random_model(tmp_path / "model")
    return tmp_path / "model"


def make_critic(directory: pathlib.Path, **changes: Any) -> Critic:
    learner = config.Learner(micro_batch_tokens=100, optimizer=OPTIMIZER)
    return Critic(directory, learner, config.Critic(**changes), seed=0)


class ReferenceCritic(torch.nn.Module):
    """transformers' model with one number a token."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.body = policy.model
        self.head = torch.nn.Linear(policy.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def values(self, token_ids: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        hidden = self.body(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).last_hidden_state[0, :-1]
        return torch.cat([torch.zeros(1), self.head(hidden)[:, 0]])


def largest_difference(critic: Critic, reference: ReferenceCritic, batch: TrainingBatch) -> float:
    with torch.no_grad():
        wanted = [reference.values(ids).numpy() for ids in sequences_of(batch)]
    got = critic.values(sequences_of(batch))
    return max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_three_steps_match_transformers_and_adamw(tmp_path: pathlib.Path, tied: bool) -> None:
    reference = ReferenceCritic(write_random_model(tmp_path / "model", tie_word_embeddings=tied))
    critic, optimizer = make_critic(tmp_path / "model"), reference_optimizer(reference)
    assert not any(values.any() for values in critic.values(sequences_of(make_batch(9)))), "the head begins at 0"
    losses = []
    for step in range(3):
        batch = make_batch(step)
        before = np.concatenate(critic.values(sequences_of(batch)))
        batch = dataclasses.replace(batch, behavior_logprobs=before, advantages=batch.advantages + 2.0)
        report = critic.train_step(batch, LOSS)
        optimizer.zero_grad()
        values = torch.cat([reference.values(ids) for ids in sequences_of(batch)])
        fields = (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
        loss, metrics = LOSS(values, *(torch.from_numpy(field) for field in fields))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        optimizer.step()
        losses.append(report["loss"])
        assert report["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert report["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for name, metric in metrics.items():
            assert report[name] == pytest.approx(metric.item(), abs=1e-5), name
    assert largest_difference(critic, reference, make_batch(9)) < 1e-4
    assert max(np.abs(values).max() for values in critic.values(sequences_of(make_batch(9)))) > 1e-2


def test_a_value_does_not_see_its_own_token(directory: pathlib.Path) -> None:
    critic = make_critic(directory)
    for step in range(3):
        critic.train_step(make_batch(step), ValueLoss(0.0))
    ids = make_batch(0, [12]).token_ids
    changed = ids.copy()
    changed[7] = (changed[7] + 1) % 64
    got, wanted = critic.values([changed])[0], critic.values([ids])[0]
    np.testing.assert_array_equal(got[:8], wanted[:8])
    assert np.abs(got[8:] - wanted[8:]).min() > 0.0


def test_a_critic_learns_what_is_always_the_same(directory: pathlib.Path) -> None:
    critic = make_critic(directory, optimizer={"lr": 1e-2, "weight_decay": 0.0, "clip_grad": 1.0})
    batch = make_batch(0)
    targets = np.where(batch.loss_weights > 0, np.float32(0.7), np.float32(0))
    batch = dataclasses.replace(batch, advantages=targets)
    reports = [critic.train_step(batch, ValueLoss(0.0)) for _ in range(40)]
    assert reports[0]["value_error_square_mean"] == pytest.approx(0.49, rel=1e-4)
    assert reports[-1]["value_error_square_mean"] < 0.01


def test_its_options_are_the_policys_where_it_says_nothing(directory: pathlib.Path) -> None:
    assert make_critic(directory).train_step(make_batch(0), LOSS)["lr"] == OPTIMIZER["lr"]
    own = make_critic(directory, optimizer={"lr": 3e-4}, schedule={"lr_warmup_steps": 2})
    assert [own.train_step(make_batch(0), LOSS)["lr"] for _ in range(3)] == pytest.approx([0.0, 1.5e-4, 3e-4])


def test_it_trains_beside_a_policy_without_touching_it(directory: pathlib.Path) -> None:
    alone = make_learner(directory)
    policy, critic = make_learner(directory), make_critic(directory)
    batch = make_batch(0)
    for _ in range(2):
        critic.train_step(batch, LOSS)
        reports = [learner.train_step(batch, lambda logprobs, *_: (logprobs.sum(), {})) for learner in (policy, alone)]
        assert reports[0]["gradient_norm"] == reports[1]["gradient_norm"]
    for (_, got), (_, wanted) in zip(policy.named_weights(), alone.named_weights(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_back_the_next_step_to_the_bit(tmp_path: pathlib.Path, tied: bool, dtype: str) -> None:
    directory, saved = tmp_path / "model", tmp_path / "saved"
    write_random_model(directory, tie_word_embeddings=tied, dtype=dtype)
    policy, critic = make_learner(directory), make_critic(directory)
    for step in range(2):
        critic.train_step(make_batch(step), LOSS)
    policy.save_checkpoint(saved, Version(1, 2), "run-1", critic=critic)
    other_policy, other = make_learner(directory), make_critic(directory)
    assert other_policy.load_checkpoint(saved, critic=other) == (1, 2)
    from_path = make_critic(directory, path=str(saved / "critic"))
    for one in (critic, other, from_path):
        one.train_step(make_batch(5), LOSS)
    batch = sequences_of(make_batch(9))
    for wanted, got in zip(critic.values(batch), other.values(batch), strict=True):
        np.testing.assert_array_equal(got, wanted)
    # a critic that begins from these weights has a fresh optimizer
    assert any((got != wanted).any() for got, wanted in zip(from_path.values(batch), critic.values(batch), strict=True))


def test_a_checkpoint_without_the_critic_is_refused_with_it(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    policy, critic = make_learner(directory), make_critic(directory)
    policy.save_checkpoint(tmp_path / "alone", Version(0, 1), "run-1")
    policy.save_checkpoint(tmp_path / "both", Version(0, 1), "run-1", critic=critic)
    before = [values.copy() for values in critic.values(sequences_of(make_batch(9)))]
    with pytest.raises(WeightsError):
        policy.load_checkpoint(tmp_path / "alone", critic=critic)
    with pytest.raises(WeightsError):
        critic.load_checkpoint(tmp_path / "alone")
    for got, wanted in zip(critic.values(sequences_of(make_batch(9))), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
