"""Which token of a batch a loss is not finite for."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from algorithms.losses import Loss
from stream_rl.types import Float32Array, TrainingBatch


def not_finite(batch: TrainingBatch, logprobs: Float32Array, loss: Loss) -> Mapping[str, npt.NDArray[np.int64]]:
    """Name of a column -> the trained tokens [n] at which it is not finite; only columns that have such a token.

    logprobs: [T] of the current policy.  The columns are what the loss is given, its value on each whole sequence alone
    (`loss`: all trained tokens of the sequence) and its gradient with respect to each log-prob (`gradient`).
    """
    trained = batch.loss_weights != 0.0
    columns = {
        "learner_logprobs": logprobs,
        "behavior_logprobs": batch.behavior_logprobs,
        "advantages": batch.advantages,
        "loss_weights": batch.loss_weights,
    }
    if batch.reference_logprobs is not None:
        columns["reference_logprobs"] = batch.reference_logprobs
    columns |= {"loss": np.zeros(len(trained), np.float32), "gradient": np.zeros(len(trained), np.float32)}
    start = 0
    for length in batch.lengths.tolist():
        here = slice(start, start + length)
        columns["loss"][here], columns["gradient"][here] = _alone(batch, logprobs, loss, here)
        start += length
    found = {name: np.flatnonzero(trained & ~np.isfinite(column)) for name, column in columns.items()}
    return {name: tokens for name, tokens in found.items() if len(tokens)}


def _alone(batch: TrainingBatch, logprobs: Float32Array, loss: Loss, here: slice) -> tuple[float, Float32Array]:
    """The loss of one sequence, and its gradient with respect to the log-probs [t]."""
    own = torch.from_numpy(logprobs[here].copy()).requires_grad_()
    fields = (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
    behavior, advantages, weights = (torch.from_numpy(field[here].copy()) for field in fields)
    reference = None if batch.reference_logprobs is None else torch.from_numpy(batch.reference_logprobs[here].copy())
    value, _ = loss(own, behavior, advantages, weights, torch.zeros(len(own), dtype=torch.int64), reference)
    (gradient,) = torch.autograd.grad(value, own)
    result: Float32Array = gradient.numpy()
    return value.item(), result
