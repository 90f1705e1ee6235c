"""Off-policy corrections: factors on a token's objective, for what the behaviour policy was.

All are made from the gap [t]: log-prob of the current policy, detached, less that of the policy that sampled the token.
The behaviour log-prob is each token's own, so a trajectory whose tokens come from several versions needs nothing more
(AReaL, arXiv 2505.24298, section 5.2).  What is said of a sequence is over its trained tokens.

A factor multiplies the objective and leaves the loss weights alone: what a mask drops stays in the denominator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.kl import bounded
from algorithms.sequences import Sequences

Level = Callable[[Tensor, Sequences], Tensor]
Mask = Callable[[Tensor, Sequences, float, float], Tensor]


def no_importance(gap: Tensor, sequences: Sequences) -> Tensor:
    """1: uncorrected, or corrected in the loss's own ratio."""
    return torch.zeros_like(gap)


def token_importance(gap: Tensor, sequences: Sequences) -> Tensor:
    """The token's ratio: decoupled PPO (Hilton et al. 2021, arXiv 2110.00641, eq. 3) where, as here, the proximal
    policy is the one that the step begins with; truncated, it is TIS (Yao et al. 2025, fengyao.notion.site)."""
    return gap


def sequence_importance(gap: Tensor, sequences: Sequences) -> Tensor:
    """The product over the sequence: unbiased before truncation; its variance grows with the length."""
    return sequences.sum(gap)


def geometric_importance(gap: Tensor, sequences: Sequences) -> Tensor:
    """The geometric mean over the sequence."""
    return sequences.mean(gap)


IMPORTANCE: dict[str, Level] = {
    "none": no_importance,
    "ratio": no_importance,
    "token": token_importance,
    "sequence": sequence_importance,
    "geometric": geometric_importance,
}
"""Each gives log-weights [t]."""


def token_mask(gap: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """Tokens whose ratio is within: IcePop (Ling team 2025, arXiv 2510.18855), if the weight is not truncated."""
    return _within(gap, low, high)


def sequence_mask(gap: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """Sequences whose product of ratios is within: masked importance sampling (Liu et al. 2025, richardli.xyz)."""
    return _within(sequences.sum(gap), low, high)


def geometric_mask(gap: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """Sequences whose geometric mean of ratios is within: that of 10,000 tokens is judged as that of 10 (the same)."""
    return _within(sequences.mean(gap), low, high)


def veto(gap: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """Sequences all of whose tokens are within: one token that the policy would hardly sample drops the whole."""
    return sequences.all(_within(gap, low, high))


MASKS: dict[str, Mask] = {"token": token_mask, "sequence": sequence_mask, "geometric": geometric_mask, "veto": veto}
"""Each gives what is kept, [t] bool; bounds included."""


def _within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    ratio = bounded(log_ratio).exp()
    return (low <= ratio) & (ratio <= high)
