"""Losses over tokens: the sum of weighted token losses, and metrics of the same tokens.

Each loss takes (log-probs, behaviour log-probs, advantages, loss weights), all [T], and returns the sum of the weighted
token losses with its metrics, all scalars.  A metric is a sum over tokens weighted by the loss weights, to be divided
by the sum of the weights over the whole batch, or a maximum if its name ends in `_max`.  Where the weight is 0 nothing
else is looked at, so a NaN or -inf there changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]

_LARGEST_LOG_RATIO = 20.0
"""exp of it is 5e8, whose square is still far from overflow in float32; verl clamps at the same (core_algos.py)."""


def _trained(weights: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """`values` with 0 where the weight is 0: masked before any arithmetic, since 0 * inf is NaN, also in gradients."""
    untrained = weights == 0.0
    return tuple(value.masked_fill(untrained, 0.0) for value in values)


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOClip:
    """PPO's clipped objective with a truncated importance weight for what the behaviour policy was.

    Clip: Schulman et al. 2017 (arXiv 1707.06347, eq. 7), with separate bounds as in DAPO (arXiv 2503.14476, eq. 8).
    The weight w = exp(proximal - behaviour), detached, is decoupled PPO (Hilton et al. 2021, arXiv 2110.00641, eq. 3),
    per token as in AReaL (arXiv 2505.24298, section 5.2), truncated at `importance_cap` (Espeholt et al. 2018,
    arXiv 1802.01561, section 4.1).  One lease is one step, so the proximal policy is the current one, detached:

        r = exp(logp - detach(logp)),  w = min(exp(detach(logp) - behaviour), cap)
        loss = -sum(weight * w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A))
    """

    clip_low: float
    clip_high: float
    importance_cap: float

    def __call__(
        self, logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, behavior, advantages = _trained(weights, logprobs, behavior_logprobs, advantages)
        proximal = logprobs.detach()
        gap = (proximal - behavior).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        importance = gap.exp()
        ratio = (logprobs - proximal).exp()
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        objective = importance.clamp(max=self.importance_cap) * torch.minimum(ratio * advantages, clipped * advantages)
        return -(weights * objective).sum(), self._metrics(gap, importance, weights)

    def _metrics(self, gap: Tensor, importance: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """gap: learner's log-prob minus the engine's.  KL(behaviour || learner) by the estimators k1 = -gap and
        k3 = exp(gap) - 1 - gap of Schulman, "Approximating KL Divergence" (2020); k3 is never negative."""
        truncated = (importance > self.importance_cap).to(weights.dtype)
        return {
            "logprob_gap_abs": (weights * gap.abs()).sum(),
            "behavior_kl_k1": -(weights * gap).sum(),
            "behavior_kl_k3": (weights * (torch.expm1(gap) - gap)).sum(),
            "truncated_share": (weights * truncated).sum(),
            "importance_mean": (weights * importance).sum(),
            "importance_square_mean": (weights * importance.square()).sum(),
            "importance_max": importance.masked_fill(weights == 0.0, 0.0).max(),
        }


def cross_entropy(
    logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum(weight * logp), for demonstrations: behaviour log-probs and advantages are not looked at."""
    (logprobs,) = _trained(weights, logprobs)
    return -(weights * logprobs).sum(), {}


def effective_sample_size(metrics: Mapping[str, float]) -> float:
    """(mean rho)^2 / mean(rho^2), in (0, 1]: the share of tokens that are worth as much as on-policy ones.

    rho is the untruncated importance weight, its moments weighted by the loss weights (Kong 1992; per token as in
    PipelineRL, arXiv 2509.19128).  metrics: of `PPOClip` over the whole batch.
    """
    return metrics["importance_mean"] ** 2 / metrics["importance_square_mean"]


def _ppo_clip(section: Algorithm) -> Loss:
    if not (0.0 < section.clip_low < 1.0 and section.clip_high > 0.0 and section.importance_cap > 0.0):
        raise ConfigError(
            f"algorithm needs 0 < clip_low < 1, clip_high > 0 and importance_cap > 0, got {section.clip_low}, "
            f"{section.clip_high} and {section.importance_cap}"
        )
    return PPOClip(clip_low=section.clip_low, clip_high=section.clip_high, importance_cap=section.importance_cap)


LOSSES: dict[str, Callable[[Algorithm], Loss]] = {"ppo_clip": _ppo_clip, "cross_entropy": lambda section: cross_entropy}


def make_loss(name: str, section: Algorithm) -> Loss:
    """The loss of that name with the recipe's settings.  Raises ConfigError for an unknown name or bad settings."""
    if name not in LOSSES:
        raise ConfigError(f"the loss must be one of {sorted(LOSSES)}, got {name!r}")
    return LOSSES[name](section)
