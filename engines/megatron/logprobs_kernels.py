"""`token_statistics` in two triton kernels: the logits are read once in the forward pass, and once in the backward
pass, which writes their gradient.  In torch's own operations each of the two takes several passes in float32, over what
is the largest tensor of a step where the vocabulary is large.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


class FusedStatistics(torch.autograd.Function):
    """As `logprobs._TokenStatistics`; on a GPU."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        logits = logits.contiguous()
        logprobs, entropy, normalizer = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
        if rows:
            _forward[(rows,)](
                logits, targets, logprobs, entropy, normalizer, width, 1.0 / temperature, BLOCK=_BLOCK, num_warps=_WARPS
            )
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normalizer = ctx.saved_tensors
        rows, width = logits.shape
        result = torch.empty_like(logits)
        if rows:
            _backward[(rows, triton.cdiv(width, _BLOCK))](
                logits, targets, normalizer, gradients[0].contiguous(), result, width, 1.0 / ctx.temperature,
                BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        return result, None, None


@triton.jit  # type: ignore[untyped-decorator]
def _forward(logits, targets, logprobs, entropy, normalizer, width, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program.  Each lane keeps its own maximum m, and of e^(x - m) the sum and the sum weighted by x - m;
    all three move along when m grows (Milakov and Gimelshein 2018, arXiv 1805.02867, of the sum).

    m begins far below every logit and not at -inf, and a logit of -inf counts as far below it: inf - inf is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + columns < width
        x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        larger = tl.maximum(largest, x)
        fallen = largest - larger
        shrunk = tl.exp(fallen)
        below = tl.maximum(x - larger, -1e30)
        share = tl.exp(below)
        weighted = (weighted + total * fallen) * shrunk + share * below
        total = total * shrunk + share
        largest = larger
    top = tl.max(largest, 0)
    fallen = largest - top
    shrunk = tl.exp(fallen)
    weighted_sum = tl.sum((weighted + total * fallen) * shrunk, 0)
    total_sum = tl.sum(total * shrunk, 0)
    log_total = tl.log(total_sum)
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32) * scale
    tl.store(normalizer + row, top + log_total)
    tl.store(logprobs + row, chosen - top - log_total)
    tl.store(entropy + row, log_total - weighted_sum / total_sum)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(logits, targets, normalizer, gradient, result, width, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """gradient * (one-hot(target) - softmax) * scale, a block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * width + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
    probability = tl.exp(x - tl.load(normalizer + row))
    hit = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    slope = tl.load(gradient + row) * scale * (hit - probability)
    tl.store(result + row * width + columns, slope.to(result.dtype.element_ty), mask=inside)
