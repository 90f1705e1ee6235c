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

BLOCK = 1 << 20
"""Elements hashed at once: bounds the scratch memory to some tens of megabytes."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_INDEX, _BITS = _signed(0x9E3779B97F4A7C15), _signed(0xD6E8FEB86659FD93)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def bits_from_bytes(raw: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """Flat integers from the bytes of a tensor of `dtype`.  Raises ValueError if they are no whole number of them."""
    integers = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(raw).view(integers))


def seed_of(name: str) -> int:
    """Signed 64-bit seed of a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def element_sum(seed: int, indices: torch.Tensor, bits: torch.Tensor) -> int:
    """Sum of h over elements: `indices` [n] int64 positions, `bits` [n] integers.  Unsigned, mod 2^64."""
    x = indices * _INDEX
    x += bits.to(torch.int64) * _BITS
    x += seed
    # torch's >> keeps the sign; the masks make it splitmix's logical shift
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return int(x.sum().item()) % (1 << 64)


def tensor_sum(name: str, bits: torch.Tensor) -> int:
    """Sum of h over a whole tensor given as flat integers in checkpoint order."""
    seed, total = seed_of(name), 0
    for start in range(0, bits.numel(), BLOCK):
        block = bits[start : start + BLOCK]
        indices = torch.arange(start, start + block.numel(), dtype=torch.int64, device=bits.device)
        total += element_sum(seed, indices, block)
    return total % (1 << 64)


def model_sum(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Fingerprint of a model from its checkpoint tensors."""
    return sum(tensor_sum(name, bits_of(tensor.contiguous()).reshape(-1)) for name, tensor in tensors) % (1 << 64)


def text(fingerprint: int) -> str:
    """As it is shown and sent."""
    return f"{fingerprint:016x}"
