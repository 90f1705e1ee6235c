"""What optimizer steps changed, from megatron-core's parameters to slices of checkpoint tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.megatron.layout import Box
from engines.weights.codes.changes import Change
from engines.weights.codes.ulp import SparseDelta
from engines.weights.parts import SLICE, Piece, compose
from stream_rl.types import Int64Array


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring elements of one parameter."""

    parameter: str
    start: int
    elements: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What finding took where the step waits for it."""

    seconds: float
    cpu_seconds: float
    """On a GPU also what waits for it: its driver spins."""
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    """Begin and end on the device, which has other work queued before: there the clock would count that too."""

    def total(self) -> float:
        if self.events is None:
            return self.seconds
        start, end = self.events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of some stretches, back to back: what one step changed in them.  On the host, once `ready` has happened."""

    stretches: Sequence[Stretch]
    dtype: torch.dtype
    positions: Tensor
    """[n] integers, ascending; from the first stretch's beginning."""
    steps: Tensor
    """[n] int16 or int32: see codes.ulp."""
    new: Tensor | None
    """All bits after the step, where more than half of them changed."""
    timing: Timing
    ready: torch.cuda.Event | None = None


class Changes:
    """Of one step or several; not yet sorted into the checkpoint's tensors, which is work for another thread."""

    def __init__(self, boxes: Mapping[str, Sequence[Box]], comparisons: Sequence[Comparison]) -> None:
        self._boxes, self._comparisons = boxes, comparisons

    @property
    def share(self) -> float:
        """Of this process's elements, those that changed; of several steps, in the mean.  0 if no step was taken."""
        changed = sum(comparison.positions.numel() for comparison in self._comparisons)
        elements = sum(stretch.elements for comparison in self._comparisons for stretch in comparison.stretches)
        return changed / max(elements, 1)

    def find_seconds(self) -> float:
        """That finding added to the steps."""
        return sum(comparison.timing.total() for comparison in self._comparisons)

    def cpu_seconds(self) -> float:
        return sum(comparison.timing.cpu_seconds for comparison in self._comparisons)

    def pieces(self) -> list[Piece]:
        """One for each slice of which anything changed."""
        found = [piece for comparison in self._comparisons for piece in self._pieces(comparison)]
        return compose(found, ())

    def _pieces(self, comparison: Comparison) -> Iterator[Piece]:
        if comparison.ready is not None:
            comparison.ready.synchronize()
        positions, steps = comparison.positions.numpy().astype(np.int64, copy=False), comparison.steps
        ends = np.cumsum([stretch.elements for stretch in comparison.stretches])
        found = np.searchsorted(positions, ends).tolist()
        low = 0
        for stretch, end, high in zip(comparison.stretches, ends.tolist(), found, strict=True):
            if low < high:
                begin = end - stretch.elements
                here = positions[low:high] + (stretch.start - begin)
                new = None if comparison.new is None else comparison.new[begin:end]
                for box in self._boxes[stretch.parameter]:
                    kept, targets = box.place(here)
                    chosen = steps[low:high].numpy()[kept]
                    whole = None if new is None else _contiguous(box, stretch, new)
                    yield from _sliced(box, comparison.dtype, targets, torch.from_numpy(chosen), whole)
            low = high


def _contiguous(box: Box, stretch: Stretch, new: Tensor) -> tuple[int, Tensor] | None:
    """Where a run of the checkpoint tensor begins, and its bits, if the box makes one of the stretch's new bits."""
    if box.count == 1:
        first = max(box.offset, stretch.start)
        last = min(box.offset + box.width, stretch.start + stretch.elements)
        run = new[first - stretch.start : max(first, last) - stretch.start]
        return first - box.offset + box.to_offset, run
    span = box.offset + (box.count - 1) * box.stride + box.width
    if stretch.start == 0 and stretch.elements >= span and box.to_stride == box.width:
        return box.to_offset, box.of(new).reshape(-1)
    return None


def _sliced(
    box: Box, dtype: torch.dtype, targets: Int64Array, steps: Tensor, whole: tuple[int, Tensor] | None
) -> Iterator[Piece]:
    if not targets.size:
        return
    first, last = int(targets[0]) // SLICE, int(targets[-1]) // SLICE
    cuts = np.searchsorted(targets, np.arange(first, last + 2) * SLICE).tolist()
    for index, low, high in zip(range(first, last + 1), cuts, cuts[1:], strict=False):
        if low == high:
            continue
        start = index * SLICE
        elements = min(SLICE, box.elements - start)
        new = None
        if whole is not None and 2 * (high - low) > elements:
            begin, bits = whole
            if begin <= start and start + elements <= begin + bits.numel():
                new = bits[start - begin : start - begin + elements]
        delta = SparseDelta(elements, torch.from_numpy(targets[low:high] - start), steps[low:high])
        yield Piece(box.name, start, Change(dtype, delta, None, new))
