"""Group-relative advantages: how much better a trajectory did than its siblings from the same prompt."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from stream_rl.errors import ConfigError
from stream_rl.types import Float32Array

AdvantageFunction = Callable[[npt.ArrayLike, npt.ArrayLike], Float32Array]
"""(rewards [S], group id of each [S]) -> advantages [S]."""


def centered(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> Float32Array:
    """r - mean of the group: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2).

    Every member counts in the mean, also one of which no token is trained.  Raises ValueError for rewards that are not
    finite or do not match `groups`.
    """
    return _center(rewards, groups)[0].astype(np.float32)


def grpo(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> Float32Array:
    """(r - mean) / (std + 1e-6) within the group: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The std has ddof = 1, as in verl (core_algos.py, compute_grpo_outcome_advantage); a group of one has advantage 0.
    Raises ValueError for rewards that are not finite or do not match `groups`.
    """
    difference, group, counts = _center(rewards, groups)
    variance = np.bincount(group, difference**2, len(counts)) / np.maximum(counts - 1, 1)
    return (difference / (np.sqrt(variance)[group] + 1e-6)).astype(np.float32)


def _center(
    rewards: npt.ArrayLike, groups: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rewards less their group's mean [S], the index of each one's group [S], members of each group [G]."""
    reward, ids = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if reward.ndim != 1 or reward.shape != ids.shape:
        raise ValueError(f"expected one group id for each reward, got shapes {reward.shape} and {ids.shape}")
    if not np.isfinite(reward).all():
        raise ValueError(f"rewards must be finite, got {reward[~np.isfinite(reward)][:5]}; fix the task's reward")
    _, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return reward - (np.bincount(group, reward, len(counts)) / counts)[group], group, counts


ADVANTAGES: dict[str, AdvantageFunction] = {"grpo": grpo, "centered": centered}


def get_advantage(name: str) -> AdvantageFunction:
    """The function of that name.  Raises ConfigError for an unknown one."""
    if name not in ADVANTAGES:
        raise ConfigError(f"algorithm.advantage must be one of {sorted(ADVANTAGES)}, got {name!r}")
    return ADVANTAGES[name]
