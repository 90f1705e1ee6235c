"""A fingerprint of weights that adds up.

    F(model) = sum over tensors and elements of h(seed(name), index, bits)   mod 2^64

`index` is the element's flat position in the checkpoint's tensor and `bits` its bit pattern, so the fingerprint sees
NaN payloads and the sign of zero, and does not depend on how an engine fuses or shards its parameters.  A sum can be
kept up to date from the changed elements alone, and the sums of shards add up to that of the whole.

`h` is the finalizer of splitmix64 (Steele, Lea, Flood 2014) over a linear mix of its inputs.  It guards against our
own mistakes, not against an adversary.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from engines.weights.codes.kernels import kernels
from engines.weights.codes.layout import HASH_BITS, HASH_INDEX, HASH_MIX_1, HASH_MIX_2

BLOCK = 1 << 20
"""Elements hashed at once where torch does it: bounds the scratch memory to some tens of megabytes."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INDEX, BITS, MIX_1, MIX_2 = (int(x.astype(np.int64)) for x in (HASH_INDEX, HASH_BITS, HASH_MIX_1, HASH_MIX_2))


def integers(dtype: torch.dtype) -> torch.dtype:
    """Those of the same width."""
    return _INTEGERS[dtype.itemsize]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width."""
    return tensor.view(integers(tensor.dtype))


def bits_from_bytes(raw: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """Flat integers from the bytes of a tensor of `dtype`.  Raises ValueError if they are no whole number of them."""
    width = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(raw).view(width))


def seed_of(name: str) -> int:
    """Signed 64-bit seed of a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def linear(seed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """What h makes of an element's tensor and position, before it sees the bits."""
    return indices * INDEX + seed


def moved(seed: int, start: int) -> int:
    """The seed with which a position counted from `start` gives what it gives with `seed` when counted from 0."""
    x = seed + start * INDEX
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def hashes(linear: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """h of each element: [n] int64, to be added mod 2^64."""
    x = linear + bits.to(torch.int64) * BITS
    # torch's >> keeps the sign; the masks make it splitmix's logical shift
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def element_sum(seed: int, indices: torch.Tensor, bits: torch.Tensor) -> int:
    """Sum of h over elements: `indices` [n] int64 positions, `bits` [n] integers.  Unsigned, mod 2^64."""
    if bits.device.type == "cpu" and bits.dtype in (torch.int16, torch.int32):
        return kernels().element_sum(seed, indices.contiguous().numpy(), bits.contiguous().numpy())
    return int(hashes(linear(torch.tensor(seed, device=bits.device), indices), bits).sum().item()) % (1 << 64)


def run_sum(seed: int, start: int, bits: torch.Tensor) -> int:
    """Sum of h over flat integers [n] that follow each other from position `start`."""
    if bits.device.type == "cpu" and bits.dtype in (torch.int16, torch.int32):
        return kernels().run_sum(seed, start, bits.contiguous().numpy())
    total = 0
    for first in range(0, bits.numel(), BLOCK):
        block = bits[first : first + BLOCK]
        indices = torch.arange(start + first, start + first + block.numel(), dtype=torch.int64, device=bits.device)
        total += element_sum(seed, indices, block)
    return total % (1 << 64)


def tensor_sum(name: str, bits: torch.Tensor) -> int:
    """Sum of h over a whole tensor given as flat integers in checkpoint order."""
    return run_sum(seed_of(name), 0, bits)


def model_sum(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Fingerprint of a model from its checkpoint tensors."""
    return sum(tensor_sum(name, bits_of(tensor.contiguous()).reshape(-1)) for name, tensor in tensors) % (1 << 64)


def text(fingerprint: int) -> str:
    """As it is shown and sent."""
    return f"{fingerprint:016x}"
