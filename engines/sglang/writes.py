"""What an update changes in live memory: found and hashed while the engine runs, written in a few launches.

Elements of all tensors are handled together, by their place in the arena, so the number of kernels does not grow with
the number of parameters.  The same torch code runs on every device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engines.sglang.load_map import Held, Holders, LoadMap
from engines.weights import fingerprint
from engines.weights.codes import ulp
from engines.weights.parts import Piece
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


def placed(pieces: Iterable[Piece], load_map: LoadMap, anchor: bool) -> Writes:
    """Where the pieces go, and what they do to the fingerprints.

    The live weights must not change until they are written.  Raises WeightsError for a piece that is not of this
    engine's checkpoint, and for a sparse one in an anchor.
    """
    building = _Building(load_map, anchor)
    for piece in pieces:
        building.add(piece)
    return building.finished()


@dataclass(slots=True)
class _Segment:
    """Changes of one piece that one box may hold."""

    piece: Piece
    held: Held
    positions: torch.Tensor
    """[n] within the piece."""
    values: torch.Tensor
    """[n] steps, or new bits."""
    dense: bool


@dataclass(slots=True)
class _Building:
    load_map: LoadMap
    anchor: bool
    segments: dict[torch.dtype, list[_Segment]] = field(default_factory=dict)
    """By the dtype of the bits."""
    copies: list[Copy] = field(default_factory=list)
    gained: dict[Holders, int] = field(default_factory=dict)
    covered: int = 0

    def add(self, piece: Piece) -> None:
        shape, change = self.load_map.shapes.get(piece.name), piece.change
        if shape is None or shape.dtype != change.dtype or piece.stop > shape.elements:
            raise WeightsError(
                f"the update has elements {piece.start} to {piece.stop} of {piece.name} as {change.dtype}; this "
                f"engine's checkpoint has {shape}"
            )
        if change.delta is None:
            self._add_dense(piece)
        elif self.anchor:
            raise WeightsError(f"an anchor has all elements of {piece.name}, this one only some")
        else:
            for held in self.load_map.held[piece.name]:
                self._add_some(piece, held, change.delta.indices, change.delta.steps, False)

    def _add_dense(self, piece: Piece) -> None:
        assert piece.change.new is not None
        if piece.change.elements <= SCATTERED:
            positions = torch.arange(piece.change.elements)
            for held in self.load_map.held[piece.name]:
                self._add_some(piece, held, positions, piece.change.new, True)
            return
        device = self.load_map.device
        bits = piece.change.new.to(device)
        arena = self.load_map.arena(piece.change.dtype)
        seed = self.load_map.seeds[piece.name]
        for box, holders in self.load_map.held[piece.name]:
            for part in box.clipped(piece.start, piece.stop):
                target, source = part.view(arena), part.pick(bits, piece.start)
                self.copies.append(Copy(target, source))
                if holders:
                    self._gain(holders, part.sum(seed, source) - (0 if self.anchor else part.sum(seed, target)))
                    self.covered += part.elements

    def _add_some(self, piece: Piece, held: Held, positions: torch.Tensor, values: torch.Tensor, dense: bool) -> None:
        """`positions` ascend."""
        start, stop = held.box.offset - piece.start, held.box.stop - piece.start
        if start > 0 or stop < piece.change.elements:
            first, last = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
            positions, values = positions[first:last], values[first:last]
        if positions.numel():
            bits = fingerprint.integers(piece.change.dtype)
            self.segments.setdefault(bits, []).append(_Segment(piece, held, positions, values, dense))

    def finished(self) -> Writes:
        scatters = [
            self._scatter(self.load_map.arena(dtype), [s for s in some if s.dense is dense], dense)
            for dtype, some in self.segments.items()
            for dense in (False, True)
            if any(s.dense is dense for s in some)
        ]
        return Writes(scatters, self.copies, self.gained, self.covered)

    def _scatter(self, arena: torch.Tensor, segments: list[_Segment], dense: bool) -> Scatter:
        device = self.load_map.device
        positions = torch.cat([s.positions for s in segments]).to(torch.int32).to(device).to(torch.int64)
        counts = torch.tensor([s.positions.numel() for s in segments]).to(device)
        of = torch.repeat_interleave(counts, output_size=positions.numel())
        values = torch.cat([s.values for s in segments]).to(device)

        def each(column: list[int]) -> torch.Tensor:
            return torch.tensor(column, dtype=torch.int64).to(device)[of]

        # places within the box, row by row
        within = positions + each([s.piece.start - s.held.box.offset for s in segments])
        if any(s.held.box.rows > 1 for s in segments):
            row = within // each([s.held.box.stride or s.held.box.columns for s in segments])
            column = within - row * each([s.held.box.stride for s in segments])
            here = column < each([s.held.box.columns for s in segments])
            within = column + row * each([s.held.box.live_stride for s in segments])
            of, positions, values, within = of[here], positions[here], values[here], within[here]
        places = within + each([s.held.box.live for s in segments])
        old = arena[places]
        new = values if dense else ulp.stepped(old, values)

        seeds = [fingerprint.moved(self.load_map.seeds[s.piece.name], s.piece.start) for s in segments]
        linear = fingerprint.linear(each(seeds), positions)
        gain = fingerprint.hashes(linear, new)
        if not self.anchor:
            gain -= fingerprint.hashes(linear, old)
        self._gain_each(gain, of, [s.held.holders for s in segments])
        return Scatter(arena, places, new)

    def _gain_each(self, gain: torch.Tensor, of: torch.Tensor, holders: list[Holders]) -> None:
        """`of`: [n] to which of the segments, held by `holders`, an element belongs."""
        groups = sorted({some for some in holders if some})
        if len(set(holders)) == 1 and groups:
            self._gain(groups[0], int(gain.sum().item()))
            self.covered += gain.numel()
            return
        group = torch.tensor([groups.index(some) if some else -1 for some in holders], device=of.device)[of]
        for number, some in enumerate(groups):
            here = group == number
            total, count = torch.stack([torch.where(here, gain, 0).sum(), here.sum()]).tolist()
            self._gain(some, total)
            self.covered += count

    def _gain(self, holders: Holders, gain: int) -> None:
        self.gained[holders] = (self.gained.get(holders, 0) + gain) % (1 << 64)
