"""The code for the local network: near memory speed, and nothing but the bytes is needed to decode it.

    table     for each block of 32,768 elements: changes, skips, escapes (3 x u16)
    gaps      for each change a byte: the unchanged elements before it; 255 is a skip, so many and no change after them
    nibbles   for each change: step + 8 if that is 1 to 15, else 0, an escape; a block begins with a whole byte
    escapes   the steps that fit no nibble, in the tensor's width

Each block stands for itself, so that any of them can be decoded beside the others: the table's running sums say where
its streams begin.  At 1.4 % changed: 8.2 bits for the gap, 4 for the step, 0.1 for the table.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines.weights.codes.bitstreams import Reader
from engines.weights.codes.kernels import kernels
from engines.weights.codes.layout import BLOCK, MOST_SKIPS, Bits, Table
from engines.weights.codes.ulp import SparseDelta
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array


def encode(delta: SparseDelta) -> list[ByteArray]:
    """Buffers whose bytes are the code of `delta`, one after the other."""
    streams = kernels().fast_encode(delta.indices.numpy(), delta.steps.numpy(), delta.elements)
    return [stream.reshape(-1).view(np.uint8) for stream in streams]


def num_blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def decode(code: ByteArray, dtype: torch.dtype, elements: int, blocks: range | None = None) -> SparseDelta:
    """Inverse of `encode` for a tensor of `elements` integers of `dtype`; only what is in `blocks`, if they are given.

    Raises WeightsError for bytes that `encode` cannot have made.
    """
    wanted = range(num_blocks(elements)) if blocks is None else blocks
    table, gaps, nibbles, escapes = streams(code, dtype.itemsize, elements, wanted)
    indices, steps = kernels().fast_decode(table, gaps, nibbles, escapes, wanted.start * BLOCK, elements)
    return SparseDelta(elements, torch.from_numpy(indices), torch.from_numpy(steps))


def decode_frames(
    data: ByteArray, ends: Int64Array, elements: Int64Array, width: int
) -> tuple[Int64Array, Int64Array, Bits]:
    """What several frames hold that lie one after the other, for tensors of so many elements each: changes of each
    tensor; their positions and steps.  `width`: bytes of a step.

    All of them at once, and without the interpreter: in an engine the scheduler's thread needs that for its own work.
    """
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: ends.size]
    return kernels().fast_decode_frames(data, starts, ends, elements, np.dtype(f"i{width}"))


def streams(
    code: ByteArray, width: int, elements: int, wanted: range
) -> tuple[Table, ByteArray, ByteArray, npt.NDArray[Any]]:
    """Table, gaps, nibbles and escapes of the wanted blocks; the sizes fit the table.  `width`: bytes of a step."""
    reader = Reader(code)
    table = reader.array(3 * num_blocks(elements), "<u2").reshape(-1, 3)
    changed, skips, escaped = table.astype(np.int64).T
    if changed.max(initial=0) > BLOCK or skips.max(initial=0) > MOST_SKIPS or (escaped > changed).any():
        raise WeightsError("the table has a block with more changes than elements")
    gaps = _part(reader, changed + skips, wanted, "u1")
    nibbles = _part(reader, (changed + 1) // 2, wanted, "u1")
    escapes = _part(reader, escaped, wanted, f"<i{width}")
    reader.end()
    return table[wanted.start : wanted.stop], gaps, nibbles, escapes


def _part(reader: Reader, lengths: Int64Array, wanted: range, dtype: str) -> npt.NDArray[Any]:
    """What belongs to the wanted blocks of a stream that has so much of each block."""
    size = np.dtype(dtype).itemsize
    reader.take(int(lengths[: wanted.start].sum()) * size)
    part = reader.array(int(lengths[wanted.start : wanted.stop].sum()), dtype)
    reader.take(int(lengths[wanted.stop :].sum()) * size)
    return part
