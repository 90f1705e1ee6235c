"""The nouns: versions, finish reasons, training batches.

Shape letters in this project: `T` tokens, `S` sequences (one trajectory each), `G` groups.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
ARRAY_DTYPES: dict[object, np.dtype[np.generic]] = {
    Int32Array: np.dtype(np.int32),
    Int64Array: np.dtype(np.int64),
    Float32Array: np.dtype(np.float32),
    ByteArray: np.dtype(np.uint8),
}
"""The arrays that may be fields of a message."""


class Version(NamedTuple):
    """A point on a line of training: weights after `step` optimizer steps of `history`.

    A learner that restarts from a checkpoint opens a new history, so that (history, step) never names two
    different sets of weights.  Ordered within a history; across histories a later one is always newer.
    """

    history: int
    step: int

    def __str__(self) -> str:
        return f"{self.history}.{self.step}"


class Finish(StrEnum):
    """Why a segment has no more tokens; NONE while it grows."""

    NONE = ""
    STOP = "stop"
    """The model ended it: a stop token."""
    LENGTH = "length"
    """Its token budget ended it."""
    ABORT = "abort"
    """It was interrupted.  Never the model's end: what is there is a prefix of an answer."""


class Status(StrEnum):
    """What an actor says of a trajectory when it closes it."""

    DONE = "done"
    """It ended by itself and has a reward."""
    FAILED = "failed"
    """It cannot be scored or finished; the reason is beside it.  It is dropped and its group goes on without it."""


def make_rid(run: str, group: int, member: int, segment: int) -> str:
    """The request id under which a segment runs in an engine.

    It ends in its delimiter because SGLang's abort matches by prefix: aborting `r/4/1/0.` must not hit `r/4/1/01.`.
    """
    return f"{run}/{group}/{member}/{segment}."


def parse_rid(rid: str) -> tuple[str, int, int, int]:
    """Inverse of `make_rid`.  Raises ValueError for anything that `make_rid` did not make."""
    run, group, member, segment = rid.split("/")
    parts = run, int(group), int(member), int(segment[:-1])
    if make_rid(*parts) != rid or not run or min(parts[1:]) < 0:
        raise ValueError(f"a request id is run/group/member/segment., got {rid!r}")
    return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """One optimizer step's data: whole sequences back to back, one value per token.

    A token's `behavior_logprobs`, `advantages` and `loss_weights` are those of the token itself, given everything
    before it in its sequence.  A token with weight 0 is context: it is attended to and never trained.
    """

    token_ids: Int32Array
    """[T] prompts, sampled tokens and environment tokens, in order."""
    lengths: Int32Array
    """[S] tokens of each sequence; they sum to T."""
    behavior_logprobs: Float32Array
    """[T] log-prob under the policy that sampled the token, at the sampling temperature; 0 where not sampled."""
    advantages: Float32Array
    """[T] advantage of each token; 0 where not sampled."""
    loss_weights: Float32Array
    """[T] the weight of each token's loss.  The whole normalization is in here (token mean: 1/N on each of N
    trainable tokens), so the loss of a step is the plain sum over its tokens, however it is cut."""
    temperature: float
    """Logits are divided by this before the softmax, as the engine did when it sampled."""
    reference_logprobs: Float32Array | None = None
    """[T] log-prob under the reference policy, for a KL in the loss; None: there is no such KL."""
