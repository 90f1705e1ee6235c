import math

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.losses import PPOClip, cross_entropy, effective_sample_size, make_loss
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

PPO = PPOClip(clip_low=0.2, clip_high=0.28, importance_cap=2.0)


def batch(seed: int = 0, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = np.random.default_rng(seed)
    logprobs = -random.exponential(1.5, tokens)
    behavior = logprobs + random.normal(0, 0.8, tokens)  # some importance weights beyond the cap
    weights = np.where(random.random(tokens) < 0.3, 0.0, random.random(tokens))
    values = (logprobs, behavior, random.normal(size=tokens), weights)
    first, second, third, fourth = (torch.from_numpy(value) for value in values)
    return first, second, third, fourth


def reference_ppo(logprobs: np.ndarray, proximal: np.ndarray, behavior: np.ndarray, advantages, weights) -> float:  # type: ignore[no-untyped-def,type-arg]
    total = 0.0
    for token, weight in enumerate(weights):
        if weight:
            ratio = math.exp(logprobs[token] - proximal[token])
            importance = min(math.exp(proximal[token] - behavior[token]), 2.0)
            clipped = min(max(ratio, 0.8), 1.28)
            total -= weight * importance * min(ratio * advantages[token], clipped * advantages[token])
    return total


@pytest.mark.parametrize("seed", range(3))
def test_ppo_matches_a_plain_reference_in_value_and_finite_differences(seed: int) -> None:
    logprobs, behavior, advantages, weights = batch(seed)
    current = logprobs.clone().requires_grad_()
    loss, _ = PPO(current, behavior, advantages, weights)
    loss.backward()
    arrays = [value.numpy() for value in (behavior, advantages, weights)]
    proximal = logprobs.numpy()
    assert loss.item() == pytest.approx(reference_ppo(proximal, proximal, *arrays), rel=1e-9)

    step = 1e-6
    for token in range(len(logprobs)):
        moved = []
        for sign in (1, -1):
            shifted = proximal.copy()
            shifted[token] += sign * step
            moved.append(reference_ppo(shifted, proximal, *arrays))
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert current.grad is not None
        assert current.grad[token].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_on_policy_ppo_has_the_policy_gradient() -> None:
    logprobs, _, advantages, weights = batch()
    current = logprobs.clone().requires_grad_()
    PPO(current, logprobs, advantages, weights)[0].backward()
    torch.testing.assert_close(current.grad, -weights * advantages)


@pytest.mark.parametrize("poison", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("loss", [PPO, cross_entropy])
def test_nothing_at_weight_zero_reaches_loss_gradient_or_metrics(loss, poison: float) -> None:  # type: ignore[no-untyped-def]
    clean = batch()
    untrained = clean[3] == 0
    current = clean[0].clone().requires_grad_()
    expected, expected_metrics = loss(current, *clean[1:])
    expected.backward()

    poisoned_input = clean[0].masked_fill(untrained, poison).requires_grad_()
    poisoned = [value.masked_fill(untrained, poison) for value in clean[1:3]]
    got, metrics = loss(poisoned_input, *poisoned, clean[3])
    got.backward()
    assert got.item() == expected.item()
    torch.testing.assert_close(poisoned_input.grad, current.grad)
    assert {name: value.item() for name, value in metrics.items()} == {
        name: value.item() for name, value in expected_metrics.items()
    }


@pytest.mark.parametrize("loss", [PPO, cross_entropy])
def test_a_fully_masked_batch_has_zero_loss_and_gradient(loss) -> None:  # type: ignore[no-untyped-def]
    logprobs, _, advantages, weights = batch()
    current = logprobs.clone().requires_grad_()
    value, metrics = loss(current, torch.full_like(logprobs, -math.inf), advantages, torch.zeros_like(weights))
    value.backward()
    assert value.item() == 0.0
    assert current.grad is not None
    assert current.grad.abs().max().item() == 0.0
    assert all(metric.item() == 0.0 for metric in metrics.values())


def test_a_token_that_its_sampler_thought_impossible_stays_finite() -> None:
    one = torch.ones(1)
    value, metrics = PPO(torch.tensor([-1.0]), torch.tensor([-math.inf]), one, one)
    assert value.item() == -2.0  # the cap
    assert all(math.isfinite(metric.item()) for metric in metrics.values())


def test_metrics_are_weighted_sums_of_known_estimators() -> None:
    logprobs, behavior, advantages, weights = batch()
    weights = weights / weights.sum()
    _, tensors = PPO(logprobs, behavior, advantages, weights)
    metrics = {name: value.item() for name, value in tensors.items()}
    gap, weight = (logprobs - behavior).numpy(), weights.numpy()
    ratio = np.exp(gap)
    assert metrics["logprob_gap_abs"] == pytest.approx(np.sum(weight * np.abs(gap)))
    assert metrics["behavior_kl_k1"] == pytest.approx(np.sum(-weight * gap))
    assert metrics["behavior_kl_k3"] == pytest.approx(np.sum(weight * (ratio - 1 - gap)))
    assert metrics["truncated_share"] == pytest.approx(np.sum(weight * (ratio > 2.0)))
    assert metrics["truncated_share"] > 0
    assert metrics["importance_max"] == pytest.approx(ratio[weight > 0].max())
    effective = np.sum(weight * ratio) ** 2 / np.sum(weight * ratio**2)
    assert effective_sample_size(metrics) == pytest.approx(effective)
    assert effective_sample_size({"importance_mean": 1.0, "importance_square_mean": 1.0}) == 1.0


def test_cross_entropy_is_the_weighted_sum() -> None:
    logprobs, behavior, advantages, weights = batch()
    current = logprobs.clone().requires_grad_()
    value, metrics = cross_entropy(current, behavior, advantages, weights)
    value.backward()
    assert value.item() == pytest.approx(-(weights * logprobs).sum().item())
    torch.testing.assert_close(current.grad, -weights)
    assert metrics == {}


def test_losses_are_made_by_name() -> None:
    assert make_loss("ppo_clip", Algorithm()) == PPOClip(clip_low=0.2, clip_high=0.2, importance_cap=2.0)
    assert make_loss("cross_entropy", Algorithm()) is cross_entropy
    with pytest.raises(ConfigError, match=r"one of \['cross_entropy', 'ppo_clip'\], got 'dpo'"):
        make_loss("dpo", Algorithm())
    with pytest.raises(ConfigError, match="importance_cap > 0"):
        make_loss("ppo_clip", Algorithm(importance_cap=0.0))
