"""What optimizer steps changed, from megatron-core's parameters to slices of checkpoint tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from engines.megatron.layout import Box
from engines.weights.codes.changes import Change
from engines.weights.codes.ulp import SparseDelta
from engines.weights.parts import SLICE, Piece, compose


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring elements of one parameter."""

    parameter: str
    start: int
    elements: int


@dataclass(frozen=True, order=True, slots=True)
class _Slice:
    """Of a checkpoint tensor."""

    name: str
    start: int
    elements: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours in a chunk and in a slice; `slice` is None for what goes nowhere."""

    begin: int
    elements: int
    slice: _Slice | None
    to: int
    """Position in the slice."""


class Sorting:
    """Of a chunk, which is some stretches back to back: where its elements go."""

    def __init__(self, stretches: Sequence[Stretch], boxes: Mapping[str, Sequence[Box]], device: torch.device) -> None:
        self.elements = sum(stretch.elements for stretch in stretches)
        runs = list(_tiled(sorted(_runs(stretches, boxes), key=lambda run: run.begin), self.elements))
        by_slice: dict[_Slice | None, list[int]] = {}
        for number, run in enumerate(runs):
            by_slice.setdefault(run.slice, []).append(number)
        by_slice[None] = by_slice.pop(None, [])  # to the end
        order = [number for numbers in by_slice.values() for number in numbers]
        self.slices = [(key, [runs[number] for number in numbers]) for key, numbers in by_slice.items() if key]
        """In the order in which `sort` puts them."""
        self._begins = torch.tensor([*(run.begin for run in runs), self.elements], device=device)
        self._shifts = torch.tensor([runs[number].to - runs[number].begin for number in order], device=device)
        self._order = None if order == sorted(order) else torch.tensor(order, device=device)

    def sort(self, positions: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ascending positions in the chunk to positions in slices, slice by slice; their steps; and for each run of
        `slices` how many come up to its end.  Few operations over everything, and none waits for the device."""
        bounds = torch.searchsorted(positions, self._begins)
        counts, size = bounds.diff(), positions.numel()
        if self._order is not None:
            counts = counts[self._order]
            moved = bounds[self._order] - (counts.cumsum(0) - counts)
            source = torch.repeat_interleave(moved, counts, output_size=size)
            source += torch.arange(size, device=positions.device)
            positions, steps = positions[source], steps[source]
        positions = positions + torch.repeat_interleave(self._shifts, counts, output_size=size)
        return positions, steps, counts.cumsum(0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one step changed in a chunk.  On the host, once `ready` has happened."""

    sorting: Sorting
    dtype: torch.dtype
    positions: Tensor
    """[n] integers: as `Sorting.sort` gives them if `ends` is here, otherwise ascending in the chunk."""
    steps: Tensor
    """[n] int16 or int32: see codes.ulp."""
    ends: Tensor | None
    new: Tensor | None
    """All of the chunk's bits after the step, where more than half of them changed."""
    seconds: float
    """That the step was longer for it, and of them those that this thread's CPU worked."""
    cpu_seconds: float
    ready: torch.cuda.Event | None = None

    def pieces(self) -> Iterator[Piece]:
        if self.ready is not None:
            self.ready.synchronize()
        positions, steps, ends = self.positions, self.steps, self.ends
        if ends is None:
            positions, steps, ends = self.sorting.sort(positions, steps)
        last_runs = accumulate(len(runs) for _, runs in self.sorting.slices)
        run_ends = ends.tolist()
        counts = [high - low for low, high in pairwise([0, *(run_ends[run - 1] for run in last_runs)])]
        # at once: whatever this thread calls one by one makes the training thread wait, which launches kernels
        found = (torch.split(each[: sum(counts)], counts) for each in (positions.to(torch.int64), steps))
        for (of, runs), indices, here in zip(self.sorting.slices, *found, strict=True):
            if indices.numel():
                new = None
                if self.new is not None and 2 * indices.numel() > of.elements == sum(each.elements for each in runs):
                    new = torch.cat([self.new[each.begin : each.begin + each.elements] for each in runs])
                yield Piece(of.name, of.start, Change(self.dtype, SparseDelta(of.elements, indices, here), None, new))


class Changes:
    """Of one step or several; not yet as pieces, which is work for another thread."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        self.comparisons = comparisons

    @property
    def share(self) -> float:
        """Of this process's elements, those that changed; of several steps, in the mean.  0 if no step was taken."""
        changed = sum(comparison.positions.numel() for comparison in self.comparisons)
        return changed / max(sum(comparison.sorting.elements for comparison in self.comparisons), 1)

    @property
    def seconds(self) -> float:
        """That finding them added to the steps."""
        return sum(comparison.seconds for comparison in self.comparisons)

    @property
    def cpu_seconds(self) -> float:
        """Of the training thread, likewise."""
        return sum(comparison.cpu_seconds for comparison in self.comparisons)

    def pieces(self) -> list[Piece]:
        """One for each slice of which anything changed."""
        return compose((piece for comparison in self.comparisons for piece in comparison.pieces()), ())


def _runs(stretches: Sequence[Stretch], boxes: Mapping[str, Sequence[Box]]) -> Iterator[_Run]:
    begin = 0
    for stretch in stretches:
        for box in boxes[stretch.parameter]:
            for position, target, elements in box.runs(stretch.start, stretch.start + stretch.elements):
                edges = [target, *range((target // SLICE + 1) * SLICE, target + elements, SLICE), target + elements]
                for low, high in pairwise(edges):
                    start = low // SLICE * SLICE
                    of = _Slice(box.name, start, min(SLICE, box.elements - start))
                    yield _Run(begin + position - stretch.start + low - target, high - low, of, low - start)
        begin += stretch.elements


def _tiled(runs: Sequence[_Run], elements: int) -> Iterator[_Run]:
    """With what goes nowhere between them."""
    at = 0
    for run in runs:
        if run.begin > at:
            yield _Run(at, run.begin - at, None, 0)
        yield run
        at = run.begin + run.elements
    if at < elements:
        yield _Run(at, elements - at, None, 0)
