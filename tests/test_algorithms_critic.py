import math

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.critic import ValueLoss, explained_variance, make_value_loss
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

CLIPS = pytest.mark.parametrize("clip", [0.0, 0.5])


def batch(seed: int = 0, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = np.random.default_rng(seed)
    weights = np.where(random.random(tokens) < 0.3, 0.0, random.random(tokens))
    columns = [random.normal(size=tokens) for _ in range(3)]
    values, before, targets, weight = (torch.from_numpy(column) for column in [*columns, weights])
    return values, before, targets, weight


def plain(clip: float, values: list[float], before: list[float], targets: list[float], weights: list[float]) -> float:
    total = 0.0
    for value, old, target, weight in zip(values, before, targets, weights, strict=True):
        errors = [(value - target) ** 2]
        if clip:
            errors.append((min(max(value, old - clip), old + clip) - target) ** 2)
        total += 0.5 * weight * max(errors)
    return total


@CLIPS
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_match_the_formula_and_its_finite_differences(clip: float, seed: int) -> None:
    values, *rest = batch(seed)
    live = values.clone().requires_grad_()
    loss, metrics = ValueLoss(clip)(live, *rest)
    loss.backward()
    fields, start, step = [field.tolist() for field in rest], values.tolist(), 1e-6
    assert loss.item() == pytest.approx(plain(clip, start, *fields), rel=1e-10)
    assert live.grad is not None
    for token in range(len(start)):
        moved = [[*start[:token], start[token] + sign * step, *start[token + 1 :]] for sign in (1, -1)]
        up, down = (plain(clip, one, *fields) for one in moved)
        assert live.grad[token].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)
    assert (metrics["value_clipped_share"] > 0) == bool(clip)


@CLIPS
@pytest.mark.parametrize("poison", [-math.inf, math.nan])
def test_nothing_at_weight_zero_reaches_loss_gradient_or_metrics(clip: float, poison: float) -> None:
    clean = batch()
    found = []
    for spoil in (False, True):
        columns = [value.masked_fill(clean[3] == 0.0, poison) if spoil else value.clone() for value in clean[:3]]
        live = columns[0].requires_grad_()
        loss, metrics = ValueLoss(clip)(live, *columns[1:], clean[3])
        loss.backward()
        assert live.grad is not None
        found.append((loss.item(), live.grad.tolist(), {name: metric.item() for name, metric in metrics.items()}))
    assert found[0] == found[1]


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_the_mean() -> None:
    targets, weights = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0])
    for values, expected in ((targets, 1.0), (torch.ones(4), 0.0), (2.0 - targets, -3.0)):
        _, metrics = ValueLoss(0.0)(values, targets, targets, weights)
        assert explained_variance({name: metric.item() for name, metric in metrics.items()}) == pytest.approx(
            expected, abs=1e-6
        )
    assert explained_variance({"target_square_mean": 4.0, "target_mean": 2.0, "value_error_square_mean": 1.0}) == 0.0


def test_a_value_loss_is_made_from_the_recipe() -> None:
    assert make_value_loss(Algorithm(value_clip=0.2)) == ValueLoss(0.2)
    with pytest.raises(ConfigError, match="value_clip"):
        make_value_loss(Algorithm(value_clip=-1.0))
