"""What an update changes in live memory: found and hashed while the engine runs, written in a few launches.

Elements of all tensors are handled together, by their place in the arena, so the number of kernels does not grow with
the number of parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from engines.sglang.load_map import Holders, LoadMap
from engines.sglang.settling import settled
from engines.weights.codes import arrays, ulp
from engines.weights.codes.changes import Run
from engines.weights.codes.kernels import kernels
from engines.weights.parts import Runs
from stream_rl.errors import WeightsError

SCATTERED = 1 << 16
"""Elements: a dense piece of at most so many is written with the sparse ones, not by a copy of its own."""


class Scatter(NamedTuple):
    """`bits` at `places` of an arena."""

    arena: torch.Tensor
    places: torch.Tensor
    """[n] int64"""
    bits: torch.Tensor
    """[n]"""


class Copy(NamedTuple):
    """Rows of live memory, and what becomes of them."""

    target: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True, slots=True)
class Writes:
    """All of an update, or of a part of it, on the device of the live weights."""

    scatters: list[Scatter]
    copies: list[Copy]
    gained: dict[Holders, int]
    """By how much the fingerprints grow; by all of them in an anchor, which counts nothing that was there."""
    covered: int
    """Elements of the checkpoint that are written, whatever they held."""

    def write(self) -> None:
        """On the current stream."""
        for scatter in self.scatters:
            scatter.arena.index_put_((scatter.places,), scatter.bits)
        for copy in self.copies:
            copy.target.copy_(copy.source)


def joined(parts: Sequence[Writes], load_map: LoadMap) -> Writes:
    """All parts of an update as one, so that each width takes one launch."""
    by_arena: dict[int, list[Scatter]] = {}
    gained = load_map.zeros()
    for part in parts:
        for scatter in part.scatters:
            by_arena.setdefault(scatter.arena.element_size(), []).append(scatter)
        for holders, gain in part.gained.items():
            gained[holders] = (gained[holders] + gain) % (1 << 64)
    scatters = [
        Scatter(some[0].arena, torch.cat([s.places for s in some]), torch.cat([s.bits for s in some]))
        for some in by_arena.values()
    ]
    return Writes(scatters, [copy for part in parts for copy in part.copies], gained, sum(p.covered for p in parts))


def placed(found: Runs, load_map: LoadMap, anchor: bool) -> Writes:
    """Where what a part has goes, and what it does to the fingerprints.

    The live weights must not change until it is written.  Raises WeightsError for a piece that is not of this engine's
    checkpoint, and for a sparse one in an anchor.
    """
    building = _Building(load_map, anchor, found)
    for run in found.sparse:
        building.add_sparse(run)
    building.add_dense(found.dense)
    return building.finished


class _Part(NamedTuple):
    """Changes of a slice of a tensor that may go into one box."""

    holders: Holders
    box: tuple[int, ...]
    span: tuple[int, int]
    """The first of them and their number; see `locate`."""


@dataclass(slots=True)
class _Building:
    load_map: LoadMap
    anchor: bool
    found: Runs
    scatters: list[Scatter] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    gained: dict[Holders, int] = field(default_factory=dict)
    covered: int = 0

    @property
    def finished(self) -> Writes:
        return Writes(self.scatters, self.copies, self.gained, self.covered)

    def add_sparse(self, run: Run) -> None:
        if self.anchor:
            name = self.found.names[run.tensors[0]]
            raise WeightsError(f"an anchor has all elements of {name}, this one only some")
        self._scatter(run, dense=False)

    def add_dense(self, dense: Mapping[int, torch.Tensor]) -> None:
        """New bits by the number of their piece."""
        few: dict[torch.dtype, list[int]] = {}
        for number, bits in dense.items():
            if bits.numel() <= SCATTERED:
                few.setdefault(bits.dtype, []).append(number)
            else:
                self._copy(number, bits)
        for numbers in few.values():
            counts = np.array([dense[number].numel() for number in numbers], np.int64)
            positions = np.concatenate([np.arange(count) for count in counts.tolist()])
            values = torch.cat([dense[number] for number in numbers]).numpy()
            self._scatter(Run(numbers, counts, positions, values), dense=True)

    def _copy(self, number: int, bits: torch.Tensor) -> None:
        name, start, known = self.found.names[number], self.found.starts[number], self.found.tensors[number]
        boxes = self.load_map.holding(name, start, known)
        if not boxes:
            return
        arena, seed = self.load_map.arena(known.dtype), self.load_map.seeds[name]
        bits, stop = bits.to(self.load_map.device), start + known.elements
        for held in boxes:
            for part in held.box.clipped(start, stop):
                target, source = part.view(arena), part.pick(bits, start)
                self.copies.append(Copy(target, source))
                if held.holders:
                    gain = part.sum(seed, source) - (0 if self.anchor else part.sum(seed, target))
                    self._gain(held.holders, gain, part.elements)

    def _scatter(self, run: Run, dense: bool) -> None:
        """`run` has steps, or new bits if it is `dense`."""
        parts: list[_Part] = []
        first, names, starts, tensors = 0, self.found.names, self.found.starts, self.found.tensors
        for number, count in zip(run.tensors, run.counts.tolist(), strict=True):
            for segment in self.load_map.segments(names[number], starts[number], tensors[number]):
                parts.append(_Part(segment.holders, segment.box, (first, count)))
            first += count
        if not parts:
            return
        parts.sort(key=lambda part: part.holders)
        places, linear, values, counts = self._located(run, parts)
        of_each: dict[Holders, int] = {}
        for part, count in zip(parts, counts, strict=True):
            of_each[part.holders] = of_each.get(part.holders, 0) + count
        arena, sizes = self.load_map.arena(tensors[run.tensors[0]].dtype), list(of_each.values())
        new, gains = settled(arena, places, linear, values, sizes, dense=dense, anchor=self.anchor)
        for (holders, count), gain in zip(of_each.items(), gains, strict=True):
            if holders:
                self._gain(holders, gain, count)
        self.scatters.append(Scatter(arena, places, new))

    def _located(
        self, run: Run, parts: Sequence["_Part"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """Places in the arena, hashes so far and values of all changes that this rank holds, on the device; how many of
        each part."""
        device, room = self.load_map.device, sum(part.span[1] for part in parts)
        # page-locked memory, which torch keeps for the next time: out of any other a copy is not asynchronous
        places, linear, values = (
            torch.empty(room, dtype=dtype, pin_memory=device.type == "cuda")
            for dtype in (torch.int64, torch.int64, torch.from_numpy(run.steps).dtype)
        )
        locate = kernels().locate if values.dtype in ulp.INTEGERS else arrays.locate
        counts = locate(
            run.indices,
            run.steps,
            np.array([part.span for part in parts], np.int64),
            np.array([part.box for part in parts], np.int64),
            places.numpy(),
            linear.numpy(),
            values.numpy(),
        ).tolist()
        here = slice(sum(counts))
        places, linear, values = (each[here].to(device, non_blocking=True) for each in (places, linear, values))
        return places, linear, values, counts

    def _gain(self, holders: Holders, gain: int, elements: int) -> None:
        self.gained[holders] = (self.gained.get(holders, 0) + gain) % (1 << 64)
        self.covered += elements
