"""Micro-batches on the device, and what a model's outputs say of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.megatron.attention import PackedSequences, lay_out, rotary_table
from engines.megatron.model_shape import ModelShape
from engines.megatron.packing import token_indices
from stream_rl.types import Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Whole sequences back to back, t tokens, and padding after them, to p tokens."""

    tokens: Tensor
    """[1, p] int64"""
    layout: PackedSequences
    """Of p tokens: what pads is sequences of one token."""
    first: Tensor
    """[t] bool: the token is the first of its sequence."""
    fields: tuple[Tensor, ...]
    """One float32 value for each token, [t] each."""
    filler: bool
    """There is no sequence: what pads stands in for some, with fields of 0."""

    @property
    def sequences(self) -> Tensor:
        """[t] int64: the sequence of each token, from 0."""
        return self.first.cumsum(0) - 1


class Packer:
    """Makes micro-batches of the sequences of a batch."""

    def __init__(self, shape: ModelShape, device: torch.device, multiple: int = 1) -> None:
        """multiple: what the tokens of a micro-batch are padded to a multiple of."""
        self._shape, self._device, self._multiple = shape, device, multiple
        self._rotary = rotary_table(shape, 1024, device)

    def pack(
        self, token_ids: Int32Array, lengths: Int32Array, sequences: Int64Array, fields: Sequence[Float32Array] = ()
    ) -> MicroBatch:
        """Of these `sequences`, longest first; a filler, if there are none.

        token_ids, fields: [T] each, of a batch of sequences of `lengths` [S].
        """
        indices = token_indices(lengths, sequences)
        chosen = lengths[sequences].astype(np.int64)
        filler = not len(sequences)
        padding = self._multiple if filler else -len(indices) % self._multiple
        tokens = np.concatenate([token_ids[indices].astype(np.int64), np.zeros(padding, np.int64)])
        first = np.zeros(len(indices), dtype=np.bool_)
        first[np.cumsum(chosen) - chosen] = True
        values = [field[indices] for field in fields]
        if filler:
            first, values = np.ones(padding, dtype=np.bool_), [np.zeros(padding, np.float32) for _ in fields]
        chosen = np.concatenate([chosen, np.ones(padding, np.int64)])
        if chosen[0] > len(self._rotary[0]):
            longer = max(int(chosen[0]), 2 * len(self._rotary[0]))
            self._rotary = rotary_table(self._shape, longer, self._device)
        return MicroBatch(
            tokens=torch.from_numpy(tokens).to(self._device)[None],
            layout=lay_out(chosen, self._rotary),
            first=torch.from_numpy(first).to(self._device),
            fields=tuple(torch.from_numpy(value).to(self._device) for value in values),
            filler=filler,
        )


def of_tokens(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    """[t] from what each of p positions says of the next token to each token's own; 0 for a first token: nothing says
    anything of it."""
    # What the last position of a sequence says falls on a first token.
    return values.roll(1)[: len(micro_batch.first)].masked_fill(micro_batch.first, 0.0)
