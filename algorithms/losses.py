"""Losses over tokens: the sum of weighted token losses, and metrics of the same tokens.

Each loss takes (log-probs, behaviour log-probs, advantages, loss weights), all [t], and where it needs them the
sequence of each token and the reference policy's log-probs.  It returns the sum of the weighted token losses with its
metrics, all scalars.  A metric is a sum over tokens weighted by the loss weights, to be divided by the sum of the
weights over the whole batch, or a maximum if its name ends in `_max`.  Where the weight is 0 nothing else is looked at,
so a NaN or -inf there changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from algorithms import settings
from algorithms.corrections import IMPORTANCE, MASKS
from algorithms.kl import KL_ESTIMATORS, bounded
from algorithms.objectives import OBJECTIVES, Objective, Tokens
from algorithms.sequences import Sequences
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError


class Loss(Protocol):
    def __call__(
        self,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        sequences: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        /,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sequences: [t] int64, the sequence of each token, from 0; a micro-batch holds whole sequences.

        Raises ValueError if one of the last two is None and needed.
        """


def trained_only(weights: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """`values` with 0 where the weight is 0: masked before any arithmetic, since 0 * inf is NaN, also in gradients."""
    untrained = weights == 0.0
    return tuple(value.masked_fill(untrained, 0.0) for value in values)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """-sum(weight * importance * kept * objective) + coefficient * sum(weight * KL to the reference).

    The objective's ratio is to the behaviour policy with `importance = "ratio"`.  Otherwise it is to the policy that
    the step begins with, the proximal one of decoupled PPO; a lease is one step, so that is the current one, detached:
    the ratio is 1, and the importance weight carries the whole correction.
    """

    objective: Objective
    section: Algorithm

    def __call__(
        self,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        sequences: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        /,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        section, whole = self.section, Sequences(sequences, weights != 0.0)
        logprobs, behavior, advantages = trained_only(weights, logprobs, behavior_logprobs, advantages)
        gap = bounded(logprobs.detach() - behavior)
        log_ratio = bounded(logprobs - behavior) if section.importance == "ratio" else logprobs - logprobs.detach()
        tokens = Tokens(logprobs=logprobs, log_ratio=log_ratio, advantages=advantages, sequences=whole)
        objective, clipped = self.objective(tokens, section)
        importance = bounded(IMPORTANCE[section.importance](gap, whole)).exp()
        kept = torch.ones_like(weights, dtype=torch.bool)
        for name, (low, high) in section.masks.items():
            kept &= MASKS[name](gap, whole, low, high)
        factor = importance.clamp(max=section.importance_cap) * kept
        loss = -(weights * (factor * objective)).sum()
        shares = {"clipped": clipped, "truncated": importance > section.importance_cap, "masked": ~kept}
        metrics = {f"{name}_share": (weights * where).sum() for name, where in shares.items()}
        metrics |= _gap_metrics(gap, weights)
        if section.kl_coefficient and section.kl_in == "loss":
            if reference_logprobs is None:
                raise ValueError('kl_in = "loss" needs the reference policy\'s log-probs, got None')
            (reference,) = trained_only(weights, reference_logprobs)
            kl = (weights * KL_ESTIMATORS[section.kl_estimator](bounded(reference - logprobs))).sum()
            loss = loss + section.kl_coefficient * kl
            metrics["reference_kl"] = kl.detach()
        return loss, metrics


def _gap_metrics(gap: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """gap: learner's log-prob minus the engine's.  KL(behaviour || learner) by the estimators k1 = -gap and
    k3 = exp(gap) - 1 - gap of Schulman, "Approximating KL Divergence" (2020); k3 is never negative."""
    ratio = gap.exp()
    return {
        "logprob_gap_abs": (weights * gap.abs()).sum(),
        "behavior_kl_k1": -(weights * gap).sum(),
        "behavior_kl_k3": (weights * (torch.expm1(gap) - gap)).sum(),
        "importance_mean": (weights * ratio).sum(),
        "importance_square_mean": (weights * ratio.square()).sum(),
        "importance_max": ratio.masked_fill(weights == 0.0, 0.0).max(),
    }


def cross_entropy(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    sequences: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    /,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum(weight * logp), for demonstrations: nothing else is looked at."""
    (logprobs,) = trained_only(weights, logprobs)
    return -(weights * logprobs).sum(), {}


def effective_sample_size(metrics: Mapping[str, float]) -> float:
    """(mean rho)^2 / mean(rho^2), in (0, 1]: the share of tokens that are worth as much as on-policy ones.

    rho is the token's untruncated ratio, its moments weighted by the loss weights (Kong 1992; per token as in
    PipelineRL, arXiv 2509.19128).  metrics: of `PolicyLoss` over the whole batch.
    """
    return metrics["importance_mean"] ** 2 / metrics["importance_square_mean"]


def make_loss(name: str, section: Algorithm) -> Loss:
    """The loss of that name with the recipe's settings.  Raises ConfigError for an unknown name or bad settings."""
    if name not in OBJECTIVES:
        raise ConfigError(f"the loss must be one of {sorted(OBJECTIVES)}, got {name!r}")
    settings.check(section)
    return PolicyLoss(OBJECTIVES[name], section)
