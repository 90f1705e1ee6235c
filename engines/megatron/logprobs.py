"""Log-probs of given tokens, and entropies, from logits at a temperature: in float32, without a float32 copy of all.

The backward pass recomputes the softmax from the saved logits a few rows at a time, so a vocabulary of 150k costs no
second [T, vocabulary] tensor beyond the gradient itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 26
"""Logits turned into float32 at a time: 256 MiB a copy.  A quarter of it made an H200 wait for kernel launches."""


def token_statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under softmax(logits / temperature), both float32 [T].

    logits: [T, vocabulary].  targets: [T] int64.  The entropy carries no gradient.
    """
    logprobs, entropy = _TokenStatistics.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def _rows(logits: Tensor) -> Iterator[slice]:
    step = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        normalizer = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        logprobs, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        for rows in _rows(logits):
            scaled = _scaled(logits[rows], temperature)
            normalizer[rows] = scaled.logsumexp(-1)
            logprobs[rows] = scaled.gather(1, targets[rows, None])[:, 0] - normalizer[rows]
            all_logprobs = scaled - normalizer[rows, None]
            # A logit of -inf has probability 0 and adds nothing, but 0 * -inf is NaN.
            entropy[rows] = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e30)).sum(-1)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d logprob / d logits = (one-hot(target) - softmax) / temperature."""
        logits, targets, normalizer = ctx.saved_tensors
        gradient = gradients[0] / ctx.temperature
        result = torch.empty_like(logits)
        for rows in _rows(logits):
            scaled = _scaled(logits[rows], ctx.temperature)
            own = (scaled - normalizer[rows, None]).exp_().mul_(-gradient[rows, None])
            own.scatter_add_(1, targets[rows, None], gradient[rows, None])
            result[rows] = own
        return result, None, None
