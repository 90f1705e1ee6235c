"""Estimators of KL(policy || reference) from tokens that the policy sampled.

Schulman, "Approximating KL Divergence" (2020, joschu.net/blog/kl-approx.html); x is the reference's log-prob of a token
less the policy's, of any shape.  As a loss they pull differently: k1 not at all in expectation (its gradient is a score
function), k2 as the reverse KL, k3 as the forward KL does (Liu et al. 2025, arXiv 2510.01555).
"""

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""exp of it is 5e8, whose square is still far from overflow in float32; verl clamps at the same (core_algos.py)."""


def bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def k1(x: Tensor) -> Tensor:
    """Unbiased; of either sign."""
    return -x


def k2(x: Tensor) -> Tensor:
    """Never negative; biased, with little variance."""
    return 0.5 * x.square()


def k3(x: Tensor) -> Tensor:
    """Unbiased and never negative: GRPO's (arXiv 2402.03300, eq. 4)."""
    return torch.expm1(x) - x


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
