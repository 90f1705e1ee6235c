"""What a policy loss maximizes for each token.  A new one is one function and one line in `OBJECTIVES`.

Each takes (tokens, section) and returns the objective [t] and where the clip cuts its gradient, or in `cispo` its
weight [t].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.sequences import Sequences
from stream_rl.config import Algorithm


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The t tokens of a micro-batch; what has no loss weight is 0 everywhere."""

    logprobs: Tensor
    """[t] of the current policy, with its gradient."""
    log_ratio: Tensor
    """[t] log-prob of the current policy less that of the one it is compared with, with its gradient."""
    advantages: Tensor
    """[t]"""
    sequences: Sequences


Objective = Callable[[Tokens, Algorithm], tuple[Tensor, Tensor]]


def ppo_clip(tokens: Tokens, section: Algorithm) -> tuple[Tensor, Tensor]:
    """min(r * A, clip(r) * A): PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with separate bounds as in DAPO
    (Yu et al. 2025, arXiv 2503.14476, eq. 8)."""
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, section)


def dual_clip(tokens: Tokens, section: Algorithm) -> tuple[Tensor, Tensor]:
    """`ppo_clip`, but at least c * A where A < 0: dual-clip PPO (Ye et al. 2019, arXiv 1912.09729, eq. 5)."""
    objective, clipped = ppo_clip(tokens, section)
    floor = section.dual_clip * tokens.advantages
    raised = (tokens.advantages < 0.0) & (objective < floor)
    return torch.where(raised, floor, objective), clipped | raised


def gspo(tokens: Tokens, section: Algorithm) -> tuple[Tensor, Tensor]:
    """`ppo_clip` of the sequence's ratio s = exp(mean log r): GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7).

    In its token form (eq. 14), s_t = detach(s) * pi / detach(pi), so a token may have its own advantage; averaged by
    `aggregation = "sequence_mean"` over wholly trained sequences its gradient is that of the sequence form.
    """
    own = tokens.logprobs - tokens.logprobs.detach()
    log_ratio = own + tokens.sequences.mean(tokens.log_ratio.detach())
    return _clipped(log_ratio.exp(), tokens.advantages, section)


def cispo(tokens: Tokens, section: Algorithm) -> tuple[Tensor, Tensor]:
    """detach(clip(r)) * A * log pi: CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4, 5).  No token loses its gradient."""
    ratio = tokens.log_ratio.detach().exp()
    clipped = ratio.clamp(1.0 - section.clip_low, 1.0 + section.clip_high)
    return clipped * tokens.advantages * tokens.logprobs, clipped != ratio


OBJECTIVES: dict[str, Objective] = {"ppo_clip": ppo_clip, "dual_clip": dual_clip, "gspo": gspo, "cispo": cispo}


def _clipped(ratio: Tensor, advantages: Tensor, section: Algorithm) -> tuple[Tensor, Tensor]:
    free = ratio * advantages
    bound = ratio.clamp(1.0 - section.clip_low, 1.0 + section.clip_high) * advantages
    return torch.minimum(free, bound), bound < free
