"""Loss weights: how the losses of a batch's tokens are averaged into the loss of a step.

The weights hold the whole normalization over the batch, so the learner only sums, and no cut of the batch into
micro-batches can change the result.  A token that is not trainable has weight 0; if none is, all weights are 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream_rl.errors import ConfigError
from stream_rl.types import Float32Array, Int32Array, Int64Array

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenKinds:
    """What the tokens of a batch are.  T tokens of S sequences, back to back."""

    lengths: Int32Array
    """[S] tokens of each sequence; they sum to T."""
    sampled: BoolArray
    """[T] the policy sampled it."""
    trainable: BoolArray
    """[T] it was sampled and is not masked (for its age, for instance)."""
    episodes: Int64Array | None = None
    """[S] episode of each sequence, by any number that is its own within the batch; None: each is one."""

    def __post_init__(self) -> None:
        """Raises ValueError for kinds that do not fit."""
        if self.episodes is not None and self.episodes.shape != self.lengths.shape:
            raise ValueError(f"episodes must have shape {self.lengths.shape}, got {self.episodes.shape}")
        tokens = int(self.lengths.sum(dtype=np.int64))
        if self.sampled.shape != (tokens,) or self.trainable.shape != (tokens,):
            raise ValueError(
                f"lengths sum to {tokens} tokens, but sampled has {self.sampled.shape} and trainable "
                f"{self.trainable.shape}"
            )
        if np.any(self.trainable & ~self.sampled):
            raise ValueError("only sampled tokens can be trainable")

    @property
    def sequence(self) -> npt.NDArray[np.int64]:
        """[T] which sequence each token is of, from 0."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int64), self.lengths)

    @property
    def episode(self) -> npt.NDArray[np.int64]:
        """[S] which episode each sequence is of, from 0."""
        if self.episodes is None:
            return np.arange(len(self.lengths), dtype=np.int64)
        return np.unique(self.episodes, return_inverse=True)[1].astype(np.int64)


def token_mean(kinds: TokenKinds, constant: float = 0.0) -> Float32Array:
    """1 / N on each of N trainable tokens: DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.3)."""
    return np.float32(1.0 / max(int(np.count_nonzero(kinds.trainable)), 1)) * kinds.trainable.astype(np.float32)


def sequence_mean(kinds: TokenKinds, constant: float = 0.0) -> Float32Array:
    """The mean over sequences of the mean over a sequence's tokens: GRPO (arXiv 2402.03300, eq. 3).

    The sequences of one episode are as one, in which each token counts alike: one that forked ten times weighs no more
    than its siblings.  Over those with a trainable token; each is divided by all its sampled tokens, masked ones too,
    so that a long trajectory whose old head is masked does not have its young tail weighted up.
    """
    episode = kinds.episode[kinds.sequence]
    sampled = np.bincount(episode[kinds.sampled], minlength=len(kinds.lengths))
    episodes = max(len(np.unique(episode[kinds.trainable])), 1)
    weights: Float32Array = (kinds.trainable / (episodes * np.maximum(sampled, 1)[episode])).astype(np.float32)
    return weights


def constant_sum(kinds: TokenKinds, constant: float = 0.0) -> Float32Array:
    """1 / constant on each trainable token: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, listing 1).

    Raises ConfigError unless the constant is positive.
    """
    if not constant > 0.0:
        raise ConfigError(f'algorithm.constant must be positive with aggregation = "constant", got {constant}; set it')
    return np.float32(1.0 / constant) * kinds.trainable.astype(np.float32)


DENOMINATORS: dict[str, Callable[[TokenKinds, float], Float32Array]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant_sum,
}


def loss_weights(aggregation: str, kinds: TokenKinds, constant: float = 0.0) -> Float32Array:
    """[T] the weight of each token's loss.

    Raises ConfigError for an unknown aggregation or its missing constant.
    """
    if aggregation not in DENOMINATORS:
        raise ConfigError(f"algorithm.aggregation must be one of {sorted(DENOMINATORS)}, got {aggregation!r}")
    return DENOMINATORS[aggregation](kinds, constant)
