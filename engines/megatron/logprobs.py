"""Log-probs of given tokens, and entropies, from logits at a temperature: in float32, without a float32 copy of all.

The backward pass recomputes the softmax from the saved logits a few rows at a time, so a vocabulary of 150k costs no
second [T, vocabulary] tensor beyond the gradient itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 26
"""Logits turned into float32 at a time: 256 MiB a copy.  A quarter of it made an H200 wait for kernel launches."""
FUSED = True
"""On a GPU, where one rank has the whole vocabulary: by the kernels of logprobs_kernels.py."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which part of the vocabulary a tensor-parallel rank has logits of."""

    group: dist.ProcessGroup
    """The ranks that have the whole of it together."""
    first: int
    width: int
    """Columns after these only pad: they are as if they were not there."""


def token_statistics(
    logits: Tensor, targets: Tensor, temperature: float, columns: Columns | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under softmax(logits / temperature), both float32 [T].

    logits: [T, vocabulary], or of it the `columns` that this rank has; each rank then has the same results, and the
    gradient of its own logits.  targets: [T] int64.  The entropy carries no gradient.
    """
    apply = _TokenStatistics.apply if columns is None else _SharedStatistics.apply
    if columns is None and FUSED and logits.is_cuda:
        from engines.megatron.logprobs_kernels import FusedStatistics  # triton, which a CPU has not

        apply = FusedStatistics.apply
    more = () if columns is None else (columns,)
    logprobs, entropy = apply(logits, targets, temperature, *more)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def _rows(logits: Tensor) -> Iterator[slice]:
    step = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(logprobs)
        for rows in _rows(logits):
            all_logprobs = _scaled(logits[rows], temperature).log_softmax(-1)
            logprobs[rows] = all_logprobs.gather(1, targets[rows, None])[:, 0]
            probabilities = all_logprobs.exp()
            # A logit of -inf has probability 0 and adds nothing, but 0 * -inf is NaN.
            entropy[rows] = -probabilities.mul_(all_logprobs.clamp_(min=-1e30)).sum(-1)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d logprob / d logits = (one-hot(target) - softmax) / temperature."""
        logits, targets = ctx.saved_tensors
        gradient = gradients[0] / ctx.temperature
        result = torch.empty_like(logits)
        for rows in _rows(logits):
            own = _scaled(logits[rows], ctx.temperature).softmax(-1).mul_(-gradient[rows, None])
            own.scatter_add_(1, targets[rows, None], gradient[rows, None])
            result[rows] = own
        return result, None, None


class _SharedStatistics(torch.autograd.Function):
    """The same of a vocabulary that several ranks share: for some rows at a time, one maximum and three sums travel."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        normalizer = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        logprobs, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        for rows in _rows(logits):
            scaled = _scaled(logits[rows, : columns.width], temperature)
            largest = scaled.new_full((scaled.shape[0],), -torch.inf)
            if columns.width:
                largest = scaled.amax(-1)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=columns.group)
            # A logit of -inf has probability 0 and adds nothing, but 0 * -inf is NaN.
            below = (scaled - largest[:, None]).clamp_(min=-1e30)
            own, here = _own(targets[rows], columns)
            picked = below.new_zeros(below.shape[0])
            if columns.width:
                picked = torch.where(here, (scaled - largest[:, None]).gather(1, own[:, None])[:, 0], 0.0)
            exponentials = below.exp()
            sums = torch.stack([exponentials.sum(-1), (exponentials * below).sum(-1), picked])
            dist.all_reduce(sums, group=columns.group)
            total, weighted, picked = sums
            logprobs[rows] = picked - total.log()
            entropy[rows] = total.log() - weighted / total
            normalizer[rows] = largest + total.log()
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature, ctx.columns = temperature, columns
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, normalizer = ctx.saved_tensors
        columns, gradient = ctx.columns, gradients[0] / ctx.temperature
        result = torch.zeros_like(logits)
        for rows in _rows(logits) if columns.width else ():
            scaled = _scaled(logits[rows, : columns.width], ctx.temperature)
            probabilities = (scaled - normalizer[rows, None]).exp_().mul_(-gradient[rows, None])
            own, here = _own(targets[rows], columns)
            probabilities.scatter_add_(1, own[:, None], (gradient[rows] * here)[:, None])
            result[rows, : columns.width] = probabilities
        return result, None, None, None


def _own(targets: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Each target's column here, some column where it is not here, and whether it is."""
    own = targets - columns.first
    return own.clamp(0, max(columns.width - 1, 0)), (own >= 0) & (own < columns.width)
