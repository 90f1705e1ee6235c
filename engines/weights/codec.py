"""The difference between two versions of a tensor, bit for bit.

Two codes, chosen tensor by tensor by size:

    sparse   positions (uint32) and new bits of the elements that changed
    dense    new bits of every element

Both carry the new bits themselves, so they are lossless for every bit pattern and applying one twice does nothing
more.  A tensor that did not change is not in the update at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.weights.fingerprint import bits_from_bytes
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray

SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True, slots=True)
class TensorUpdate:
    """New bits for some or all elements of one checkpoint tensor."""

    name: str
    dtype: torch.dtype
    indices: torch.Tensor | None
    """[n] int64 flat positions, ascending; None means all of them."""
    bits: torch.Tensor
    """[n] integers of the dtype's width."""

    @property
    def changed(self) -> int:
        return self.bits.numel()


def diff(name: str, dtype: torch.dtype, old: torch.Tensor, new: torch.Tensor) -> TensorUpdate | None:
    """What turns `old` into `new` (flat integers of one width); None if they are equal."""
    positions = torch.nonzero(old != new).reshape(-1)
    if positions.numel() == 0:
        return None
    if positions.numel() * (4 + new.element_size()) >= new.numel() * new.element_size() or new.numel() > 1 << 32:
        return TensorUpdate(name, dtype, None, new.clone())
    return TensorUpdate(name, dtype, positions, new[positions])


def encode(update: TensorUpdate) -> tuple[str, list[ByteArray]]:
    """Code name and buffers."""
    bits = update.bits.numpy().view(np.uint8).reshape(-1)
    if update.indices is None:
        return DENSE, [bits]
    return SPARSE, [update.indices.numpy().astype(np.uint32).view(np.uint8), bits]


def decode(name: str, dtype: torch.dtype, elements: int, code: str, buffers: Sequence[ByteArray]) -> TensorUpdate:
    """Inverse of `encode` for a tensor of `elements` elements.  Raises WeightsError for anything that does not fit."""
    width = dtype.itemsize
    if code == DENSE and len(buffers) == 1 and buffers[0].size == elements * width:
        return TensorUpdate(name, dtype, None, bits_from_bytes(buffers[0], dtype))
    if code == SPARSE and len(buffers) == 2 and buffers[0].size % 4 == 0:
        indices = torch.from_numpy(np.ascontiguousarray(buffers[0]).view(np.uint32).astype(np.int64))
        if buffers[1].size == indices.numel() * width and indices.numel():
            if int(indices[-1]) >= elements or not bool((indices[1:] > indices[:-1]).all()):
                raise WeightsError(
                    f"{name}: sparse positions must ascend below {elements}, got up to {int(indices[-1])}"
                )
            return TensorUpdate(name, dtype, indices, bits_from_bytes(buffers[1], dtype))
    sizes = [buffer.size for buffer in buffers]
    raise WeightsError(f"{name}: buffers of {sizes} bytes are no {code!r} update of {elements} {dtype} elements")
