"""Boxes: pieces of checkpoint tensors and the live memory that holds them.

A box is rows of a checkpoint tensor, each of them contiguous, and the same rows in live memory, as far apart there as
may be.  That is all that loading does to a dense model: a whole tensor and a shard by rows are one row, a shard by
columns is many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.weights import fingerprint
from engines.weights.fingerprint import BLOCK
from stream_rl.errors import WeightsError


@dataclass(frozen=True, slots=True)
class Box:
    """Element j of row i is at flat position offset + i * stride + j of the checkpoint tensor, and at
    live + i * live_stride + j of the arena.  The strides of a single row are 0."""

    offset: int
    rows: int
    stride: int
    columns: int
    live: int
    live_stride: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Position in the checkpoint tensor after the last element."""
        return self.offset + (self.rows - 1) * self.stride + self.columns

    @property
    def source(self) -> tuple[int, int, int, int]:
        """Which elements of the checkpoint tensor these are."""
        return self.offset, self.rows, self.stride, self.columns

    @property
    def target(self) -> tuple[int, int, int, int]:
        """Which elements of the arena."""
        return self.live, self.rows, self.live_stride, self.columns

    @property
    def layout(self) -> tuple[int, int, int, int, int]:
        """Positions from the first element to the last; stride and columns there; stride in live memory, place."""
        return self.stop - self.offset, self.stride or max(self.columns, 1), self.columns, self.live_stride, self.live

    def clipped(self, start: int, stop: int) -> Iterator["Box"]:
        """What of it lies between two positions of the checkpoint tensor: at most part of a row, whole rows and part
        of another row."""
        start, stop = max(start, self.offset), min(stop, self.stop)
        if start >= stop:
            return
        if self.rows == 1:
            yield self._part(0, 1, start - self.offset, stop - self.offset)
            return
        first, column = divmod(start - self.offset, self.stride)
        last, end = divmod(stop - self.offset, self.stride)
        column, end = min(column, self.columns), min(end, self.columns)
        if first == last:
            yield from self._some(first, 1, column, end)
            return
        if column:
            yield from self._some(first, 1, column, self.columns)
            first += 1
        yield from self._some(first, last - first, 0, self.columns)
        yield from self._some(last, 1, 0, end)

    def _some(self, row: int, rows: int, column: int, end: int) -> Iterator["Box"]:
        if rows > 0 and column < end:
            yield self._part(row, rows, column, end)

    def _part(self, row: int, rows: int, column: int, end: int) -> "Box":
        offset, live = self.offset + row * self.stride + column, self.live + row * self.live_stride + column
        strides = (self.stride, self.live_stride) if rows > 1 else (0, 0)
        return Box(offset, rows, strides[0], end - column, live, strides[1])

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        """[rows, columns]: the live elements."""
        return arena.as_strided((self.rows, self.columns), (self.live_stride, 1), self.live)

    def pick(self, bits: torch.Tensor, start: int) -> torch.Tensor:
        """[rows, columns]: the same elements of flat `bits`, the first of which is at `start` of the tensor."""
        return bits.as_strided((self.rows, self.columns), (self.stride, 1), bits.storage_offset() + self.offset - start)

    def sum(self, seed: int, bits: torch.Tensor) -> int:
        """The fingerprint of these elements, if their bits [rows, columns] were `bits`."""
        if self.rows == 1:
            return fingerprint.run_sum(seed, self.offset, bits[0])
        total, step = 0, max(1, BLOCK // self.columns)
        columns = torch.arange(self.columns, device=bits.device)
        for row in range(0, self.rows, step):
            some = bits[row : row + step]
            rows = torch.arange(row, row + some.shape[0], device=bits.device) * self.stride + self.offset
            total += fingerprint.element_sum(seed, (rows[:, None] + columns).reshape(-1), some.reshape(-1))
        return total % (1 << 64)


def between(source: torch.Tensor, target: torch.Tensor, live: int) -> Box | None:
    """The box of a copy from `source`, a view of a contiguous checkpoint tensor, to `target`, a view of live memory
    whose first element is at `live` of its arena.  None if it is no box."""
    dims = [
        (size, near, far)
        for size, near, far in zip(source.shape, source.stride(), target.stride(), strict=True)
        if size > 1
    ]
    merged: list[tuple[int, int, int]] = []
    for size, near, far in sorted(dims, key=lambda dim: dim[1]):  # innermost first
        if merged and near == merged[-1][0] * merged[-1][1] and far == merged[-1][0] * merged[-1][2]:
            merged[-1] = (merged[-1][0] * size, *merged[-1][1:])
        else:
            merged.append((size, near, far))
    if not merged or merged[0][1:] != (1, 1):
        merged.insert(0, (1, 1, 1))
    if len(merged) == 1:
        merged.append((1, 0, 0))
    (columns, _, _), (rows, stride, live_stride), *more = merged
    if more or (rows > 1 and (stride < columns or live_stride < columns)):
        return None
    return Box(int(source.storage_offset()), rows, stride, columns, live, live_stride)


Span = tuple[int, int, int, int]
"""Start, rows, stride and columns, in a checkpoint tensor or an arena."""


def overlapping(spans: Sequence[tuple[Span, Any]]) -> tuple[Any, Any] | None:
    """The names of two spans that are not certainly disjoint, if there are any."""
    ordered = sorted(spans, key=lambda item: item[0])
    open_: list[tuple[Span, Any]] = []
    for span, name in ordered:
        open_ = [item for item in open_ if _stop(item[0]) > span[0]]
        for other, other_name in open_:
            if not _disjoint(other, span):
                return other_name, name
        open_.append((span, name))
    return None


def _stop(span: Span) -> int:
    start, rows, stride, columns = span
    return start + (rows - 1) * stride + columns


def _disjoint(a: Span, b: Span) -> bool:
    if _stop(a) <= b[0] or _stop(b) <= a[0]:
        return True
    stride = max(a[2], b[2])
    if stride == 0 or any(span[1] > 1 and span[2] != stride for span in (a, b)):
        return False
    left, right = a[0] % stride, b[0] % stride
    if left + a[3] > stride or right + b[3] > stride:
        return False
    return left + a[3] <= right or right + b[3] <= left


class Arena:
    """All of a device's memory from the first parameter to the last as one tensor of integers of one width.

    What lies between parameters is never touched; one tensor is what lets one kernel reach all of them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """`tensors`: of one width, on one device."""
        self._width, self.device = tensors[0].element_size(), tensors[0].device
        self._first = min(tensor.data_ptr() for tensor in tensors)
        last = max(tensor.data_ptr() + (_extent(tensor) * self._width) for tensor in tensors)
        for tensor in tensors:
            if tensor.device != self.device or (tensor.data_ptr() - self._first) % self._width:
                raise WeightsError(f"parameters lie on {self.device} and {tensor.device}, or are not aligned")
        self._keep = list(tensors)
        """The memory is theirs."""
        self.bits = _memory(self._first, (last - self._first) // self._width, self._width, self.device)

    def position(self, tensor: torch.Tensor) -> int:
        """Of a tensor's first element."""
        return (tensor.data_ptr() - self._first) // self._width


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _Memory:
    """Memory as numba and CuPy describe it to each other, and numpy its own way."""

    def __init__(self, address: int, elements: int, width: int, cuda: bool) -> None:
        about = {"shape": (elements,), "typestr": f"<i{width}", "data": (address, False), "version": 3}
        if width == 1:
            about["typestr"] = "|u1"
        setattr(self, "__cuda_array_interface__" if cuda else "__array_interface__", about)


def _memory(address: int, elements: int, width: int, device: torch.device) -> torch.Tensor:
    memory = _Memory(address, elements, width, device.type == "cuda")
    if device.type == "cuda":
        return torch.as_tensor(memory, device=device)
    return torch.from_numpy(np.asarray(memory))
