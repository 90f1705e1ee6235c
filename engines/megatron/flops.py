"""Floating-point operations of a training step, and what share of the device's peak they are."""

import numpy as np
import torch

from engines.megatron.model_shape import ModelShape
from stream_rl.types import Int32Array

_PEAKS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 of the SXM boards, by a part of the device's name (NVIDIA's data sheets, without sparsity)."""


def model_flops(shape: ModelShape, lengths: Int32Array) -> float:
    """Of one forward and backward pass over packed sequences of `lengths` [S] tokens.

    3 * sum over sequences of (2 * M * n + 2 * layers * heads * head_dim * n^2): two for each of the M weights that a
    token is multiplied with (attention and MLP projections, output layer; the embedding is a look-up), and causal
    attention, which multiplies queries with keys and weights with values over half of n^2; the backward pass counts
    twice the forward pass.  After PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), which counts all of n^2.
    Recomputed activations do not count.
    """
    width = shape.heads * shape.head_dim
    attention = shape.hidden_size * (2 * width + 2 * shape.kv_heads * shape.head_dim)
    layer = attention + 3 * shape.hidden_size * shape.ffn_size
    multiplied = shape.layers * layer + shape.vocab_size * shape.hidden_size
    tokens = lengths.astype(np.float64)
    return float(3.0 * (2.0 * multiplied * tokens.sum() + 2.0 * shape.layers * width * (tokens**2).sum()))


def peak_flops(setting: float, dtype: str) -> float:
    """Of one device, a second: the recipe's, or that of a known GPU in bfloat16; 0 if it is not known."""
    if setting or dtype != "bfloat16" or not torch.cuda.is_available():
        return setting
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), 0.0)
