"""What a trajectory is scored with: its reward, shaped by its length, less the KL that it cost.

Shape letters: T tokens, S sequences.  A sequence's siblings are the others of its group (one prompt).  Where an
episode has several sequences, they count once in a group's mean and standard deviation, with their mean score, and have
one advantage.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from algorithms.denominators import TokenKinds
from algorithms.kl import KL_ESTIMATORS, bounded
from stream_rl.config import Algorithm
from stream_rl.types import Float32Array, Int64Array

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A step's sequences, back to back, and all that an advantage can be made from."""

    kinds: TokenKinds
    rewards: Float32Array
    """[S]"""
    groups: Int64Array
    """[S] group of each sequence; its episodes are in `kinds`."""
    behavior_logprobs: Float32Array | None = None
    """[T] of the policy that sampled the token."""
    reference_logprobs: Float32Array | None = None
    """[T] of the policy to stay near."""
    teacher_logprobs: Float32Array | None = None
    """[T] of the policy to learn from."""
    values: Float32Array | None = None
    """[T] the critic's value of the state that the token was sampled in, before it."""

    def __post_init__(self) -> None:
        """Raises ValueError for rewards that are not finite and for shapes that do not fit."""
        if self.rewards.ndim != 1 or self.rewards.shape != self.groups.shape:
            raise ValueError(
                f"expected one group id for each reward, got shapes {self.rewards.shape} and {self.groups.shape}"
            )
        if not np.isfinite(self.rewards).all():
            bad = self.rewards[~np.isfinite(self.rewards)][:5]
            raise ValueError(f"rewards must be finite, got {bad}; fix the task's reward")
        for name, shape in (
            ("rewards", self.kinds.lengths.shape),
            ("behavior_logprobs", self.kinds.sampled.shape),
            ("reference_logprobs", self.kinds.sampled.shape),
            ("teacher_logprobs", self.kinds.sampled.shape),
            ("values", self.kinds.sampled.shape),
        ):
            if (value := getattr(self, name)) is not None and value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {value.shape}")

    def tokens(self, name: str, whom: str) -> Float64Array:
        """The field `name`, [T].  Raises ValueError if it is missing: `whom` needs it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{whom} needs {name}, got None")
        return np.asarray(value, dtype=np.float64)


def overlong(sampled: npt.ArrayLike, longest: int, buffer: int, penalty: float) -> Float64Array:
    """What a sequence of so many sampled tokens [S] loses: 0 up to longest - buffer, from there linearly to -penalty at
    `longest`, and no more beyond.  DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13)."""
    into_buffer = np.asarray(sampled, dtype=np.float64) - (longest - buffer)
    return -penalty * np.clip(into_buffer / buffer, 0.0, 1.0)


def shaped_rewards(data: Scored, section: Algorithm) -> Float64Array:
    """[S] rewards with what overlong answers lose."""
    rewards = data.rewards.astype(np.float64)
    if not section.overlong_buffer:
        return rewards
    sampled = np.bincount(data.kinds.sequence[data.kinds.sampled], minlength=len(rewards))
    return rewards + overlong(sampled, section.overlong_length, section.overlong_buffer, section.overlong_penalty)


def kl_rewards(data: Scored, section: Algorithm) -> Float64Array:
    """[T] -coefficient * KL(behaviour || reference) of each trainable token; 0 of others, and unless `kl_in` is reward.

    A token that is masked for its age is the sampling policy's past: it costs nothing, and may have any log-prob.
    """
    rewards = np.zeros(len(data.kinds.sampled))
    if section.kl_coefficient and section.kl_in == "reward":
        trained, whom = data.kinds.trainable, 'kl_in = "reward"'
        x = data.tokens("reference_logprobs", whom)[trained] - data.tokens("behavior_logprobs", whom)[trained]
        kl = KL_ESTIMATORS[section.kl_estimator](bounded(torch.from_numpy(x)))
        rewards[trained] = -section.kl_coefficient * kl.numpy()
    return rewards


def scores(data: Scored, section: Algorithm) -> Float64Array:
    """[S] shaped reward plus the sum of the tokens' KL rewards."""
    kl = np.bincount(data.kinds.sequence, kl_rewards(data, section), len(data.rewards))
    return shaped_rewards(data, section) + kl
