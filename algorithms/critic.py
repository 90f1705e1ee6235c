"""The critic's loss.  It has the shape of a policy loss, so a learner trains a critic as it trains a policy."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms import settings
from algorithms.losses import Loss, trained_only
from stream_rl.config import Algorithm


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """1/2 sum(weight * max((V - R)^2, (clip(V, V_before - c, V_before + c) - R)^2)), as in verl (core_algos.py,
    compute_value_loss) and the original PPO code; with c = 0 1/2 sum(weight * (V - R)^2).

    V_before is the critic's value when the advantages were made, R the target (`estimators.value_targets`).
    """

    clip: float

    def __call__(
        self,
        values: Tensor,
        values_before: Tensor,
        targets: Tensor,
        weights: Tensor,
        sequences: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        /,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All [t]; the metrics are as those of a policy loss."""
        values, before, targets = trained_only(weights, values, values_before, targets)
        error = (values - targets).square()
        larger = error
        if self.clip:
            larger = torch.maximum(error, (before + (values - before).clamp(-self.clip, self.clip) - targets).square())
        return 0.5 * (weights * larger).sum(), {
            "value_mean": (weights * values.detach()).sum(),
            "value_error_square_mean": (weights * error.detach()).sum(),
            "value_clipped_share": (weights * (larger > error)).sum(),
            "target_mean": (weights * targets).sum(),
            "target_square_mean": (weights * targets.square()).sum(),
        }


def explained_variance(metrics: Mapping[str, float]) -> float:
    """1 - mean (V - R)^2 / var R, at most 1; 0 for a critic that knows only the mean, and where the targets are equal.

    metrics: of `ValueLoss` over the whole batch.
    """
    variance = metrics["target_square_mean"] - metrics["target_mean"] ** 2
    return 1.0 - metrics["value_error_square_mean"] / variance if variance > 0.0 else 0.0


def make_value_loss(section: Algorithm) -> Loss:
    """Raises ConfigError for settings that do not fit."""
    settings.check(section)
    return ValueLoss(section.value_clip)
