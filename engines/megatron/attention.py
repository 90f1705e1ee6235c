"""RoPE and causal attention over packed sequences, as megatron-core's `core_attention`.

megatron-core's own attention refuses packed sequences without TransformerEngine, and its RoPE walks them one at a time.
Sequences of like length are laid side by side, padded on the right: causal attention alone then keeps padding out of
sight, so no mask is needed and torch's fused causal kernels apply.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional
from torch import Tensor

from engines.megatron import core
from engines.megatron.model_shape import ModelShape
from engines.megatron.rope import LinearScaling, Llama3Scaling, YarnScaling
from stream_rl.types import Int64Array

FLASH = True
"""On a GPU in half precision: torch's flash attention over all sequences in one call.  Blocks are many small kernels
there: with them, and log-probs without kernels of ours, a step of 0.6 B on an H200 took three times as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Neighbouring sequences that are attended to in one call, padded to the longest of them."""

    start: int
    stop: int
    """Tokens [start, stop) of the micro-batch."""
    sequences: int
    longest: int
    slots: Tensor | None
    """[stop - start] where each token is in [sequences * longest]; None where no padding is needed."""


@dataclass
class PackedSequences(core.PackedSeqParams):  # type: ignore[misc]  # megatron-core has no types
    """The layout of a micro-batch of T tokens, handed through megatron-core to every layer."""

    blocks: list[Block] = field(default_factory=list)
    cosine: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, 1, head_dim] of each token's position in its own sequence; float32."""
    sine: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, 1, head_dim], its first half negated, as `_rotate` needs it."""


def rotary_table(shape: ModelShape, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [positions, 1, head_dim] of RoPE in the half-split layout of the Hugging Face models.

    Su et al. 2021 (arXiv 2104.09864), eq. 15; angle = position * frequency.
    """
    frequencies, amplitude = _frequencies(shape, device)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    cosine, sine = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat([cosine] * 2, dim=-1)[:, None], torch.cat([-sine, sine], dim=-1)[:, None]


def _frequencies(shape: ModelShape, device: torch.device) -> tuple[Tensor, float]:
    """[head_dim / 2] radians a position, theta^(-2i / head_dim) before they are scaled; and what cosine and sine are
    multiplied by."""
    pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / shape.rope_theta ** (pairs / shape.head_dim)
    match shape.rope_scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor=factor):
            return plain / factor, 1.0
        case Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high) as llama:
            turns = plain * (llama.original_max_position_embeddings / (2 * math.pi))
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return plain * kept + plain / factor * (1.0 - kept), 1.0
        case YarnScaling(factor=factor, original_max_position_embeddings=original) as yarn:
            # The paper's ramp is over turns; its authors' code, and so everyone's, has one over dimensions.
            per_turn = original / (2 * math.pi)
            at = [
                shape.head_dim * math.log(per_turn / turns) / (2 * math.log(shape.rope_theta))
                for turns in (yarn.beta_fast, yarn.beta_slow)
            ]
            low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), shape.head_dim - 1)
            ramp = (torch.arange(len(plain), device=device) - low) / (high - low or 1e-3)
            kept = 1.0 - ramp.clamp(0.0, 1.0)
            return plain * kept + plain / factor * (1.0 - kept), 0.1 * math.log(max(factor, 1.0)) + 1.0


def lay_out(lengths: Int64Array, table: tuple[Tensor, Tensor]) -> PackedSequences:
    """The layout of sequences of these lengths [s], longest first, back to back in a micro-batch."""
    cosine, sine = table
    device = cosine.device
    ends = np.cumsum(lengths)
    starts = ends - lengths
    positions = torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, lengths)).to(device)
    boundaries = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)

    blocks = []
    first = 0
    while first < len(lengths):
        # A sequence under two thirds of the longest opens a new block: attention grows with the square of the padded
        # length, and each block is a few more kernels a layer.
        longest = int(lengths[first])
        stop = first + int(np.count_nonzero(lengths[first:] * 3 >= longest * 2))
        own = lengths[first:stop]
        slots = None
        if own[-1] != longest:
            padding_before = np.repeat(np.arange(stop - first) * longest - (starts[first:stop] - starts[first]), own)
            slots = torch.from_numpy(np.arange(own.sum()) + padding_before).to(device)
        blocks.append(
            Block(
                start=int(starts[first]),
                stop=int(ends[stop - 1]),
                sequences=stop - first,
                longest=longest,
                slots=slots,
            )
        )
        first = stop
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=int(lengths[0]),
        max_seqlen_kv=int(lengths[0]),
        blocks=blocks,
        cosine=cosine[positions],
        sine=sine[positions],
    )


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE of [T, heads, head_dim].  roll by half swaps the halves; the sign is in `sine`."""
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return torch.addcmul(x * cosine, swapped, sine)


class PackedAttention(core.MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """`core_attention` of a local layer spec: [T, heads, head_dim] in, [T, heads * head_dim] out."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> Tensor:
        packed = packed_seq_params
        cosine, sine = packed.cosine.to(query.dtype), packed.sine.to(query.dtype)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        if FLASH and query.is_cuda and query.dtype != torch.float32:
            ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
            # the operation behind torch.nn.attention.varlen, whose signature differs between torch 2.10, 2.11 and 2.12
            results = torch.ops.aten._flash_attention_forward(
                query, key, value, ends, ends, longest, longest, 0.0, True, False, scale=self.scale
            )
            output: Tensor = results[0]
            return output.flatten(1)
        outputs = [
            self._attend(block, *(x[block.start : block.stop] for x in (query, key, value))) for block in packed.blocks
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.nn.functional.scaled_dot_product_attention(
            _pad(query, block),
            _pad(key, block),
            _pad(value, block),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output = output.transpose(1, 2).reshape(block.sequences * block.longest, -1)
        return output if block.slots is None else output[block.slots]


def _pad(x: Tensor, block: Block) -> Tensor:
    """[tokens of the block, heads, head_dim] -> [sequences, heads, longest, head_dim]"""
    if block.slots is not None:
        padded = x.new_zeros(block.sequences * block.longest, *x.shape[1:])
        x = padded.index_copy(0, block.slots, x)
    return x.view(block.sequences, block.longest, *x.shape[1:]).transpose(1, 2)
