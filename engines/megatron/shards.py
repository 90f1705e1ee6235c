"""Parts of checkpoint tensors: what a process holds of them, and how one is put together from others' files.

A part is runs of neighbours, equally wide and equally far apart, from one of its elements to another: what a
tensor-parallel rank holds of a tensor is such runs (layout.Box), and what a data-parallel rank holds of that is a range
of their elements.  So any placement's parts of a tensor can be cut out of any other's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.megatron.layout import Box
from stream_rl.errors import WeightsError
from stream_rl.types import Int64Array


@dataclass(frozen=True, slots=True)
class Runs:
    """Elements `low` to `high`, in order, of runs of `width` at `offset`, `offset + stride`, ..."""

    offset: int
    width: int
    stride: int
    low: int
    high: int

    @property
    def elements(self) -> int:
        return self.high - self.low

    @property
    def adjacent(self) -> bool:
        """Whether there are some, all neighbours."""
        in_one = self.width == self.stride or self.low // self.width == (self.high - 1) // self.width
        return self.low < self.high and in_one

    def table(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Of each run that is not empty: where it begins, where among our elements, and how many it has."""
        if self.low >= self.high:
            return _NOTHING
        if self.width == self.stride:
            return _row(self.offset + self.low), _row(0), _row(self.elements)
        run = np.arange(self.low // self.width, (self.high - 1) // self.width + 1, dtype=np.int64)
        first = np.maximum(run * self.width, self.low)
        stop = np.minimum((run + 1) * self.width, self.high)
        return self.offset + run * (self.stride - self.width) + first, first - self.low, stop - first


_NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)


def whole(elements: int) -> Runs:
    """All of a tensor."""
    return Runs(0, elements, elements, 0, elements)


@dataclass(frozen=True, slots=True)
class Shard:
    """What is held of one checkpoint tensor."""

    name: str
    elements: int
    """Of the whole tensor."""
    here: Runs
    """Where, in the part of a parameter that is held."""
    there: Runs
    """Where, in the tensor: the same elements in the same order."""


def shards(boxes: Iterable[Box], start: int, stop: int) -> Iterator[Shard]:
    """What of checkpoint tensors a parameter's elements from `start` to `stop` are.

    boxes: the parameter's.  `here` counts from `start`.
    """
    for box in boxes:
        low, high = (_before(box, position) for position in (start, stop))
        if low < high:
            here = Runs(box.offset - start, box.width, box.stride, low, high)
            there = Runs(box.to_offset, box.width, box.to_stride, low, high)
            yield Shard(box.name, box.elements, here, there)


def take(runs: Runs, source: Tensor) -> Tensor:
    """The elements of the flat `source` that are in `runs`, flat: a view where they are neighbours."""
    begins, own, sizes = runs.table()
    if runs.adjacent:
        return source[int(begins[0]) : int(begins[0] + sizes[0])]
    target = torch.empty(runs.elements, dtype=source.dtype, device=source.device)
    _copy(source, target, begins, own, sizes)
    return target


def put(runs: Runs, values: Tensor, target: Tensor) -> None:
    """Inverse of `take`: `values` to their places in the flat `target`."""
    begins, own, sizes = runs.table()
    _copy(values, target, own, begins, sizes)


class Assembly:
    """How one part of a tensor is put together from other parts of it, which lie anywhere that can be sliced."""

    def __init__(self, name: str, wanted: Runs, stored: Sequence[tuple[Runs, Any]]) -> None:
        """stored: parts of the tensor, and what a slice [a:b] of gives their elements from a to b as a flat tensor.

        Raises WeightsError if they do not hold every element that is wanted, once.
        """
        self.wanted = wanted
        self._sources = []
        for runs, source in stored:
            begins, targets, sizes = _overlap(runs, wanted)
            if len(begins):
                self._sources.append((source, begins, targets, sizes))
        covered = [np.empty((0, 2), np.int64)]
        covered += [np.stack([targets, targets + sizes], axis=1) for _, _, targets, sizes in self._sources]
        edges = np.concatenate(covered)
        edges = edges[np.argsort(edges[:, 0])]
        seam = np.concatenate([[0], edges[:, 1]]) != np.concatenate([edges[:, 0], [wanted.elements]])
        if seam.any():
            raise WeightsError(f"{name} is not whole, or not once: {int(seam.sum())} gaps or overlaps in its shards")

    def into(self, target: Tensor) -> None:
        """Read it, one source at a time, into the flat `target`."""
        for source, begins, targets, sizes in self._sources:
            first, last = int(begins[0]), int(begins[-1] + sizes[-1])
            _copy(source[first:last].to(target.device), target, begins - first, targets, sizes)

    def onto(self, here: Runs, target: Tensor) -> None:
        """As `into`, to the places `here` in the flat `target`."""
        room = take(here, target)
        self.into(room)
        if not here.adjacent:
            put(here, room, target)


def _row(value: int) -> Int64Array:
    return np.array([value], dtype=np.int64)


def _before(box: Box, position: int) -> int:
    """Elements of `box` that come before `position` of its parameter."""
    run, within = divmod(max(position - box.offset, 0), box.stride)
    return min(run, box.count) * box.width + (min(within, box.width) if run < box.count else 0)


def _overlap(first: Runs, second: Runs) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Stretches of a tensor that are in both: where each begins among the elements of either, and its size."""
    begins, own, sizes = first.table()
    other_begins, other_own, other_sizes = second.table()
    if not len(begins) or not len(other_begins):
        return _NOTHING
    edges = np.unique(np.concatenate([begins, begins + sizes, other_begins, other_begins + other_sizes]))
    low, stretch = edges[:-1], np.diff(edges)
    run = np.searchsorted(begins, low, "right") - 1
    other = np.searchsorted(other_begins, low, "right") - 1
    both = (run >= 0) & (low < (begins + sizes)[run])
    both &= (other >= 0) & (low < (other_begins + other_sizes)[other])
    low, stretch, run, other = low[both], stretch[both], run[both], other[both]
    return own[run] + low - begins[run], other_own[other] + low - other_begins[other], stretch


def _copy(source: Tensor, target: Tensor, begins: Int64Array, targets: Int64Array, sizes: Int64Array) -> None:
    """Stretches of one flat tensor to another; those in the middle at once, if they are alike."""
    alone = range(len(sizes))
    inner = slice(1, -1)
    steps = [np.unique(np.diff(each[inner])) for each in (begins, targets)]
    if len(sizes) > 3 and all(len(step) == 1 for step in steps) and len(np.unique(sizes[inner])) == 1:
        shape = len(sizes) - 2, int(sizes[1])
        to, of = (
            tensor.as_strided(shape, (int(step[0]), 1), tensor.storage_offset() + int(positions[1]))
            for tensor, step, positions in ((target, steps[1], targets), (source, steps[0], begins))
        )
        to.copy_(of)
        alone = range(0, len(sizes), len(sizes) - 1)
    for index in alone:
        begin, to_begin, size = int(begins[index]), int(targets[index]), int(sizes[index])
        target[to_begin : to_begin + size].copy_(source[begin : begin + size])
