"""What goes into a payload, and what a receiver has before it reads one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from engines.weights.codes.layout import Bits
from engines.weights.codes.ulp import SparseDelta
from stream_rl.types import ByteArray, Int64Array

A = TypeVar("A")
B = TypeVar("B")
Frame = list[ByteArray]
"""Buffers whose bytes come one after the other."""
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
"""Bits of it, of the dtypes that have a sparse form."""


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one tensor."""

    dtype: torch.dtype
    delta: SparseDelta | None
    """None where only the new bits are known, or the dtype has no sparse form: it is always dense."""
    old: torch.Tensor | None = None
    """Flat bits before; `small` needs them."""
    new: torch.Tensor | None = None
    """Flat bits after; without them a tensor is never dense."""

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        if self.delta is not None:
            return self.delta.elements
        assert self.new is not None
        return self.new.numel()

    @property
    def changed(self) -> int:
        """Elements that are written; all of them where nobody has compared."""
        return self.elements if self.delta is None else self.delta.changed

    @property
    def sparse(self) -> SparseDelta:
        assert self.delta is not None
        return self.delta


class Run(NamedTuple):
    """Sparse changes of several tensors of one width, tensor after tensor."""

    tensors: list[int]
    """Which of those that were encoded."""
    counts: Int64Array
    """Changes of each."""
    indices: Int64Array
    """Positions, each in its own tensor; ascending within one."""
    steps: Bits

    def deltas(self, elements: Iterable[int]) -> list[SparseDelta]:
        """One for each tensor, given how many elements it has.  They share memory with this."""
        counts = self.counts.tolist()
        each = (torch.split(torch.from_numpy(of_all), counts) for of_all in (self.indices, self.steps))
        return [SparseDelta(*delta) for delta in zip(elements, *each, strict=True)]


class Known(NamedTuple):
    """What a receiver knows of a tensor."""

    dtype: torch.dtype
    elements: int
    old: torch.Tensor | None = None
    """Flat bits that it holds, on any device; `small` needs them."""


class Each(Protocol):
    """`map`, or that of an executor."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]: ...
