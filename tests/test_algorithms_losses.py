import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_builders import RATIO, SECTIONS, MicroBatch, micro_batch, plain_loss
from torch import Tensor

from algorithms.losses import cross_entropy, effective_sample_size, make_loss
from algorithms.objectives import OBJECTIVES
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

SEEDS = st.integers(0, 2**32 - 1)
every_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
few = settings(max_examples=25, deadline=None)


def run(section: Algorithm, batch: MicroBatch) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient, metrics."""
    logprobs = batch.logprobs.clone().requires_grad_()
    value, metrics = make_loss(section.loss, section)(logprobs, *batch.fields)
    value.backward()
    assert logprobs.grad is not None
    return value.item(), logprobs.grad, {name: metric.item() for name, metric in metrics.items()}


def assert_same(got: tuple[float, Tensor, dict[str, float]], wanted: tuple[float, Tensor, dict[str, float]]) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-10, abs=1e-12)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-10, atol=1e-12)
    assert got[2] == pytest.approx(wanted[2], rel=1e-10, abs=1e-12)


@every_section
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_match_the_formula_and_its_finite_differences(section: Algorithm, seed: int) -> None:
    batch, step = micro_batch(seed), 1e-6
    value, gradient, _ = run(section, batch)
    start = batch.logprobs.tolist()
    assert value == pytest.approx(plain_loss(section, batch, start), rel=1e-9)
    for token in range(len(start)):
        moved = [[*start[:token], start[token] + sign * step, *start[token + 1 :]] for sign in (1, -1)]
        up, down = (plain_loss(section, batch, logprobs) for logprobs in moved)
        assert gradient[token].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


def test_the_batches_of_these_tests_reach_every_bound() -> None:
    """Or agreement would say nothing about clips, caps and masks."""
    metrics = {name: [run(section, micro_batch(seed))[2] for seed in range(3)] for name, section in SECTIONS.items()}
    for name in ("ppo_clip", "dual_clip", "gspo", "cispo", "masks_together"):
        assert any(one["clipped_share"] > 0 for one in metrics[name]), name
    for name in ("token_tis", "sequence_tis", "geometric_tis"):
        assert any(one["truncated_share"] > 0 for one in metrics[name]), name
    for name in ("icepop", "masked_is", "geometric_mask", "veto", "masks_together"):
        assert any(one["masked_share"] > 0 for one in metrics[name]), name
        assert any(one["masked_share"] < 0.9 * micro_batch(i).weights.sum() for i, one in enumerate(metrics[name])), (
            name
        )
    pairs = [[run(SECTIONS[name], micro_batch(seed))[1] for name in ("ppo_clip", "dual_clip")] for seed in range(3)]
    assert any(not torch.equal(*pair) for pair in pairs)


@every_section
@few
@given(seed=SEEDS, cuts=st.lists(st.integers(1, 5), max_size=5), order=st.permutations(range(6)))
def test_no_cut_into_micro_batches_and_no_order_of_sequences_changes_anything(
    section: Algorithm, seed: int, cuts: list[int], order: list[int]
) -> None:
    batch = micro_batch(seed)
    value, gradient, metrics = run(section, batch)
    bounds = sorted({0, *cuts, 6})
    parts = [order[start:end] for start, end in itertools.pairwise(bounds)]
    done = [run(section, batch.only(part)) for part in parts]
    merged = {
        name: max(one[2][name] for one in done) if name.endswith("_max") else sum(one[2][name] for one in done)
        for name in metrics
    }
    placed = torch.empty_like(gradient)
    placed[torch.cat([torch.nonzero(batch.sequences == sequence)[:, 0] for sequence in order])] = torch.cat(
        [one[1] for one in done]
    )
    assert_same((sum(one[0] for one in done), placed, merged), (value, gradient, metrics))


@every_section
@few
@given(seed=SEEDS, poison=st.sampled_from([-math.inf, math.inf, math.nan]))
def test_nothing_at_weight_zero_reaches_loss_gradient_or_metrics(section: Algorithm, seed: int, poison: float) -> None:
    batch = micro_batch(seed)
    names = ("logprobs", "behavior", "advantages", "reference")
    spoiled = {name: getattr(batch, name).masked_fill(batch.weights == 0.0, poison) for name in names}
    got, wanted = run(section, dataclasses.replace(batch, **spoiled)), run(section, batch)
    assert got[0] == wanted[0] and got[2] == wanted[2]
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("name", [name for name in SECTIONS if not name.startswith("kl")])
@few
@given(seed=SEEDS)
def test_on_policy_every_loss_has_the_policy_gradient(name: str, seed: int) -> None:
    batch = micro_batch(seed)
    _, gradient, metrics = run(SECTIONS[name], dataclasses.replace(batch, behavior=batch.logprobs))
    torch.testing.assert_close(gradient, -batch.weights * batch.advantages)
    assert metrics["clipped_share"] == metrics["truncated_share"] == metrics["masked_share"] == 0.0
    assert effective_sample_size(metrics) == pytest.approx(batch.weights.sum().item())


@pytest.mark.parametrize("mask", [{}, dict.fromkeys(("token", "sequence", "geometric", "veto"), (0.0, math.inf))])
@pytest.mark.parametrize(("loss", "importance"), [*((loss, "ratio") for loss in OBJECTIVES), ("ppo_clip", "token")])
@few
@given(seed=SEEDS)
def test_without_bounds_what_is_left_is_the_ratio(
    loss: str, importance: str, mask: dict[str, tuple[float, float]], seed: int
) -> None:
    free = Algorithm(clip_low=1.0, clip_high=1e12, dual_clip=1e12, importance_cap=math.inf, masks=mask)
    section = dataclasses.replace(free, loss=loss, importance=importance)  # type: ignore[arg-type]
    batch = micro_batch(seed)
    gap = batch.logprobs - batch.behavior
    if loss == "gspo":
        for sequence in batch.sequences.unique():
            here = (batch.sequences == sequence) & (batch.weights != 0.0)
            gap[here] = gap[here].mean()
    expected = -batch.weights * gap.exp() * batch.advantages
    torch.testing.assert_close(run(section, batch)[1], torch.where(batch.weights != 0.0, expected, 0.0))


@every_section
def test_a_fully_masked_batch_has_zero_loss_and_gradient(section: Algorithm) -> None:
    batch = micro_batch(0)
    value, gradient, metrics = run(section, dataclasses.replace(batch, weights=torch.zeros_like(batch.weights)))
    assert value == 0.0 and gradient.abs().max() == 0.0
    assert set(metrics.values()) == {0.0}


@every_section
def test_a_token_that_its_sampler_thought_impossible_stays_finite(section: Algorithm) -> None:
    one = torch.ones(1)
    batch = MicroBatch(-one, -math.inf * one, one, one, torch.zeros(1, dtype=torch.int64), -one)
    value, gradient, metrics = run(section, batch)
    assert all(math.isfinite(number) for number in (value, gradient.item(), *metrics.values()))
    assert run(Algorithm(), batch)[0] == -2.0  # the cap


def test_metrics_are_weighted_sums_of_known_estimators() -> None:
    batch = micro_batch(5)
    batch = dataclasses.replace(batch, weights=batch.weights / batch.weights.sum())
    _, _, metrics = run(SECTIONS["token_tis"], batch)
    gap, weight = (batch.logprobs - batch.behavior).numpy(), batch.weights.numpy()
    ratio = torch.from_numpy(gap).exp().numpy()
    assert metrics["logprob_gap_abs"] == pytest.approx((weight * abs(gap)).sum())
    assert metrics["behavior_kl_k1"] == pytest.approx((-weight * gap).sum())
    assert metrics["behavior_kl_k3"] == pytest.approx((weight * (ratio - 1 - gap)).sum())
    assert metrics["truncated_share"] == pytest.approx((weight * (ratio > 2.0)).sum())
    assert metrics["importance_max"] == pytest.approx(ratio[weight > 0].max())
    effective = (weight * ratio).sum() ** 2 / (weight * ratio**2).sum()
    assert effective_sample_size(metrics) == pytest.approx(effective)
    x = (batch.reference - batch.logprobs).numpy()
    assert run(SECTIONS["kl_k2"], batch)[2]["reference_kl"] == pytest.approx((weight * x * x / 2).sum())


def test_a_sequence_is_judged_by_its_trained_tokens_only() -> None:
    """Two sequences of ratio e and 1/e on two tokens each; of the second only the tail is trained."""
    gap = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    weights, ids = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    section = Algorithm(importance="none", masks={"geometric": (0.9, 1.1)})
    batch = MicroBatch(torch.zeros(4, dtype=torch.float64), -gap, torch.ones(4), weights, ids, gap)
    assert run(section, batch)[1].tolist() == [-1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["gspo", "sequence_tis", "geometric_tis", "masked_is", "geometric_mask", "veto"])
def test_a_loss_over_sequences_needs_to_know_them(name: str) -> None:
    section, batch = SECTIONS[name], micro_batch(0)
    with pytest.raises(ValueError, match="sequences = None"):
        make_loss(section.loss, section)(batch.logprobs, *batch.fields[:3])
    with pytest.raises(ValueError, match="one id for each"):
        make_loss(section.loss, section)(batch.logprobs, *batch.fields[:3], batch.sequences[1:])


def test_a_kl_in_the_loss_needs_the_reference() -> None:
    batch = micro_batch(0)
    with pytest.raises(ValueError, match="reference policy"):
        make_loss("ppo_clip", SECTIONS["kl_k3"])(batch.logprobs, *batch.fields[:3])


def test_cross_entropy_is_the_weighted_sum() -> None:
    batch = micro_batch(0)
    logprobs = batch.logprobs.masked_fill(batch.weights == 0.0, math.nan).requires_grad_()
    value, metrics = cross_entropy(logprobs, *batch.fields)
    value.backward()
    assert value.item() == pytest.approx(-(batch.weights * batch.logprobs).sum().item())
    torch.testing.assert_close(logprobs.grad, -batch.weights)
    assert metrics == {}


def test_losses_are_made_by_name() -> None:
    assert make_loss("ppo_clip", RATIO) == make_loss("ppo_clip", RATIO)
    with pytest.raises(ConfigError, match=r"one of \['cispo', 'dual_clip', 'gspo', 'ppo_clip'\], got 'dpo'"):
        make_loss("dpo", Algorithm())
    with pytest.raises(ConfigError, match="importance_cap >= 1"):
        make_loss("ppo_clip", Algorithm(importance_cap=0.0))
