"""The sparse difference between two bit patterns of a tensor, in steps of the last place.

A float's bits are a sign and a magnitude.  `ordinal` turns them into a whole number that grows with the value, so that
neighbouring floats are neighbouring numbers: +0 is 0, -0 is -1.  A step is ordinal(new) - ordinal(old) mod 2^width.
That is a bijection for every pattern, NaN payloads and both zeros included; small for a small change; and steps over
several versions add up, so v -> v+1 and v+1 -> v+2 give v -> v+2 without the weights of either.
"""

from dataclasses import dataclass

import torch

from engines.weights.codes.kernels import kernels
from stream_rl.errors import WeightsError

INTEGERS = (torch.int16, torch.int32)
"""Bits as the widths that have a sparse form: bf16 and fp16, fp32."""


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """What turns one bit pattern of a tensor into another."""

    elements: int
    """Of the whole tensor."""
    indices: torch.Tensor
    """[n] int64 flat positions, ascending."""
    steps: torch.Tensor
    """[n] int16 or int32, none of them 0."""

    @property
    def changed(self) -> int:
        return self.indices.numel()


def ordinal(bits: torch.Tensor) -> torch.Tensor:
    """Bits to ordinals; its own inverse."""
    low = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & low)


def stepped(bits: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The bits that are `steps` further on, element by element."""
    return ordinal(ordinal(bits) + steps)


def diff(old: torch.Tensor, new: torch.Tensor) -> SparseDelta:
    """What turns `old` into `new`: flat integers of one width, on one device."""
    _check(old)
    if new.dtype != old.dtype or new.shape != old.shape or not new.is_contiguous():
        raise WeightsError(f"{_named(old)} can only be compared with its like, got {_named(new)}")
    if old.device.type == "cpu":
        indices, steps = kernels().diff(old.numpy(), new.numpy())
        return SparseDelta(old.numel(), torch.from_numpy(indices), torch.from_numpy(steps))
    where = torch.nonzero(old != new).reshape(-1)
    return SparseDelta(old.numel(), where, ordinal(new[where]) - ordinal(old[where]))


def apply_(bits: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    """Carry out `delta` in place on flat integers; only what it changes is touched."""
    _check(bits)
    if delta.elements != bits.numel() or delta.steps.dtype != bits.dtype:
        raise WeightsError(f"the difference is of {delta.elements} x {delta.steps.dtype}, the tensor {_named(bits)}")
    if bits.device.type == "cpu":
        kernels().apply(bits.numpy(), delta.indices.numpy(), delta.steps.numpy())
    else:
        indices = delta.indices.to(bits.device)
        bits[indices] = stepped(bits[indices], delta.steps.to(bits.device))
    return bits


def compose(first: SparseDelta, second: SparseDelta) -> SparseDelta:
    """The one difference that does what `first` and then `second` do.  What cancels out is not in it."""
    if (first.elements, first.steps.dtype) != (second.elements, second.steps.dtype):
        raise WeightsError(
            f"differences of {first.elements} x {first.steps.dtype} and of {second.elements} x {second.steps.dtype} "
            "do not belong to one tensor"
        )
    if first.indices.device.type == "cpu":
        merged = kernels().merge(
            first.indices.numpy(), first.steps.numpy(), second.indices.numpy(), second.steps.numpy()
        )
        return SparseDelta(first.elements, *map(torch.from_numpy, merged))
    indices, order = torch.cat([first.indices, second.indices]).sort()
    steps = torch.cat([first.steps, second.steps])[order]
    twice = indices[1:] == indices[:-1]
    steps[:-1][twice] += steps[1:][twice]
    kept = steps != 0
    kept[1:] &= ~twice
    return SparseDelta(first.elements, indices[kept], steps[kept])


def _check(bits: torch.Tensor) -> None:
    if bits.dtype not in INTEGERS or bits.dim() != 1 or not bits.is_contiguous():
        raise WeightsError(f"the sparse form is of flat int16 or int32 bits in one piece, got {_named(bits)}")


def _named(bits: torch.Tensor) -> str:
    return f"{list(bits.shape)} {bits.dtype}"
