"""`small` over several tensors: they are laid end to end and coded in chunks, each of one dtype.

Short tensors share a header that way, and long ones take no more memory than a chunk at once.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from engines.weights.codes import small
from engines.weights.codes.changes import MANTISSA, Change, Each, Frame, Known
from engines.weights.codes.layout import Bits
from engines.weights.codes.ulp import SparseDelta
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

CHUNK = 1 << 22
"""Elements: some tens of megabytes to encode or decode."""


class Slice(NamedTuple):
    tensor: int
    start: int
    stop: int


def encode(changes: Sequence[Change], each: Each = map) -> list[Frame]:
    """A frame for each chunk."""
    return list(each(lambda chunk: _encode(chunk, changes), _chunks((c.dtype, c.sparse.elements) for c in changes)))


def num_frames(tensors: Sequence[Known]) -> int:
    return len(_chunks((tensor.dtype, tensor.elements) for tensor in tensors))


def decode(frames: Sequence[ByteArray], tensors: Sequence[Known], each: Each = map) -> list[SparseDelta]:
    """The difference of each tensor.  Raises WeightsError as `small.decode` does."""
    chunks = _chunks((tensor.dtype, tensor.elements) for tensor in tensors)
    decoded = each(lambda pair: _decode(*pair, tensors), zip(frames, chunks, strict=True))
    pieces: list[list[tuple[Int64Array, Bits]]] = [
        [(np.empty(0, np.int64), np.empty(0, f"i{tensor.dtype.itemsize}"))] for tensor in tensors
    ]
    for chunk, parts in zip(chunks, decoded, strict=True):
        for part, (tensor, _, _) in zip(parts, chunk, strict=True):
            pieces[tensor].append(part)
    return [_joined(tensor.elements, parts) for tensor, parts in zip(tensors, pieces, strict=True)]


def _chunks(tensors: Iterable[tuple[torch.dtype, int]]) -> list[list[Slice]]:
    """Slices of (dtype, elements); each list of `CHUNK` elements, or of fewer at the end of a dtype."""
    chunks: list[list[Slice]] = []
    filling: dict[torch.dtype, tuple[list[Slice], int]] = {}
    for tensor, (dtype, elements) in enumerate(tensors):
        start = 0
        while start < elements:
            chunk, room = filling.get(dtype, ([], 0))
            if room == 0:
                chunk, room = [], CHUNK
                chunks.append(chunk)
            stop = min(start + room, elements)
            chunk.append(Slice(tensor, start, stop))
            filling[dtype] = chunk, room - (stop - start)
            start = stop
    return chunks


def _encode(chunk: list[Slice], changes: Sequence[Change]) -> Frame:
    indices, steps = [], []
    for (tensor, start, stop), edge in zip(chunk, _edges(chunk), strict=False):
        delta = changes[tensor].sparse
        positions = delta.indices.numpy()
        first, last = np.searchsorted(positions, [start, stop]).tolist()
        indices.append(positions[first:last] + (edge - start))
        steps.append(delta.steps.numpy()[first:last])
    dtype = changes[chunk[0].tensor].dtype
    base = _base(chunk, dtype, [change.old for change in changes])
    return small.encode(base, np.concatenate(indices), np.concatenate(steps), MANTISSA[dtype])


def _decode(frame: ByteArray, chunk: list[Slice], tensors: Sequence[Known]) -> list[tuple[Int64Array, Bits]]:
    """Positions and steps of each slice."""
    dtype = tensors[chunk[0].tensor].dtype
    base = _base(chunk, dtype, [tensor.old for tensor in tensors])
    indices, steps = small.decode(frame, base, MANTISSA[dtype])
    edges = _edges(chunk)
    cuts = pairwise(np.searchsorted(indices, edges).tolist())
    return [
        (indices[first:last] + (start - edge), steps[first:last])
        for (_, start, _), edge, (first, last) in zip(chunk, edges, cuts, strict=False)
    ]


def _edges(chunk: list[Slice]) -> list[int]:
    """Where the slices begin, and the last ends, when they are laid end to end."""
    return [0, *accumulate(stop - start for _, start, stop in chunk)]


def _base(chunk: list[Slice], dtype: torch.dtype, old: Sequence[torch.Tensor | None]) -> Bits:
    parts = []
    for tensor, start, stop in chunk:
        bits = old[tensor]
        if bits is None:
            raise WeightsError("the small code needs the bits that the difference applies to")
        if bits.element_size() != dtype.itemsize or bits.numel() < stop:
            raise WeightsError(f"the difference is of {stop} x {dtype} or more, here are {bits.numel()} x {bits.dtype}")
        parts.append(bits[start:stop].cpu().numpy())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined(elements: int, parts: list[tuple[Int64Array, Bits]]) -> SparseDelta:
    indices, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    return SparseDelta(elements, torch.from_numpy(indices), torch.from_numpy(steps))
