"""The published line of versions: one host copy of the newest, the updates that led to it, a fingerprint of each.

The learner's parts are passed on to engines as they came.  An engine that lags gets the updates that it lacks composed
into one, or all of the newest version (an anchor), whichever is smaller.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from engines.weights import fingerprint
from engines.weights.codes import payload, ulp
from engines.weights.codes.changes import MANTISSA, Change
from engines.weights.codes.payload import Code
from engines.weights.parts import SLICE, Line, Piece, apply_, compose, cut, dense_pieces, read, relabelled, slices
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

Watch = Callable[[Line, list[Piece]], None]
"""Told of an update right before it is carried out; its pieces have the old bits beside them."""


@dataclass(frozen=True, slots=True)
class Update:
    """An encoded update, shared by all engines that need it."""

    base: Version
    target: Version
    anchor: bool
    parts: list[UpdatePart]
    changed: int
    """Elements whose bits differ; all of them in an anchor."""
    encode_seconds: float

    @property
    def bytes(self) -> int:
        """Payload bytes of all parts."""
        return sum(part.payload.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A version that has been read and found to fit, and is not yet the newest."""

    line: Line
    parts: list[UpdatePart]
    pieces: list[Piece]


class Chain:
    """Everything that the publisher knows of the weights.  One thread at a time."""

    def __init__(self, run: str, part_bytes: int, keep: int) -> None:
        """keep: updates that are kept to be composed.  Fewer, where together they are larger than an anchor."""
        self._run, self._part_bytes, self._keep = run, part_bytes, keep
        self._bits: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0
        self._updates: OrderedDict[Version, Update] = OrderedDict()
        """From each version to the next, by base, oldest first, without a gap up to the newest."""
        self._prepared: dict[Version | None, Update] = {}
        """To the newest version, by what the engine holds; the anchor is None's."""
        self.version: Version | None = None
        self.hashes: dict[Version, str] = {}
        """Of every version ever published in this process: 100 bytes each."""

    @property
    def full_bytes(self) -> int:
        return sum(bits.numel() * bits.element_size() for bits in self._bits.values())

    @property
    def elements(self) -> int:
        return sum(bits.numel() for bits in self._bits.values())

    def tensors(self) -> Iterable[tuple[str, torch.dtype, torch.Tensor]]:
        """Name, dtype, flat bits of the newest version.  They alias the host copy: done with before the next."""
        return ((name, self._dtypes[name], bits) for name, bits in self._bits.items())

    def has(self, version: Version) -> bool:
        """True if this chain is at `version`, or further on in the same history."""
        return self.version is not None and version.history == self.version.history and version <= self.version

    # -- taking versions ---------------------------------------------------------------------------------------

    def advance(self, parts: Sequence[UpdatePart], watch: Watch | None = None) -> None:
        """Make all parts of an update the newest version.  Raises WeightsError as `arrive` does."""
        self.take(self.arrive(parts), watch)

    def arrive(self, parts: Sequence[UpdatePart]) -> Arrival:
        """Read an update and see that it leads on from here, all of it before any of it is taken.

        Raises WeightsError if `version` is not newer, does not follow, has other tensors, or its bytes are no update.
        """
        first = parts[0]
        line = Line(first.run, first.base, first.target, first.anchor)
        if line.run != self._run:
            raise WeightsError(f"this publisher serves run {self._run!r}, the update is of {line.run!r}")
        if self.version is not None and line.target <= self.version:
            raise WeightsError(f"version {line.target} came after {self.version}; versions only grow")
        if not line.anchor and line.base != self.version:
            raise WeightsError(f"version {line.target} is against {line.base}, the newest here is {self.version}")
        pieces = [piece for part in parts for piece in read(part, None if line.anchor else self._held)]
        if line.anchor:
            self._check_anchor(line, pieces)
        for piece in pieces if self._bits else ():
            bits = self._bits.get(piece.name)
            if bits is None or self._dtypes[piece.name] != piece.change.dtype or piece.stop > bits.numel():
                raise WeightsError(
                    f"version {line.target} has {piece.change.dtype} elements up to {piece.stop} of {piece.name}; here "
                    + ("is no such tensor" if bits is None else f"it is {bits.numel()} x {self._dtypes[piece.name]}")
                )
        return Arrival(line, list(parts), pieces)

    def take(self, arrival: Arrival, watch: Watch | None = None) -> None:
        """Make an arrival the newest version.  `watch` is told of the update that leads there from the one before."""
        start = time.perf_counter()
        base, target, pieces = self.version, arrival.line.target, arrival.pieces
        parts: list[UpdatePart] | None = arrival.parts
        if base is None:
            self._begin(pieces)
        else:
            if arrival.line.anchor:  # of another history, or from a learner that has lost count: see what changed
                pieces, parts = self._compared(pieces), None
            pieces = [self._with_old(piece) for piece in pieces]
            total, changed = self._total_after(pieces)
            line = Line(self._run, base, target, False, target_hash=fingerprint.text(total))
            if watch is not None:
                watch(line, compose(pieces, ()))
            for piece in pieces:
                apply_(self._bits[piece.name][piece.start : piece.stop], piece.change)
            self._total = total
            self._keep_update(line, pieces, parts, changed, start)
        self.hashes[target] = fingerprint.text(self._total)
        self._prepared.clear()
        self.version = target  # last: another thread asks what is prepared for the newest version

    def _begin(self, pieces: list[Piece]) -> None:
        ends: dict[str, int] = {}
        for piece in pieces:
            ends[piece.name] = max(ends.get(piece.name, 0), piece.stop)
            self._dtypes[piece.name] = piece.change.dtype
        for name, elements in ends.items():
            self._bits[name] = fingerprint.bits_of(torch.empty(elements, dtype=self._dtypes[name]))
        for piece in pieces:
            apply_(self._bits[piece.name][piece.start : piece.stop], piece.change)
        self._total = sum(fingerprint.tensor_sum(name, bits) for name, bits in self._bits.items()) % (1 << 64)

    def _check_anchor(self, line: Line, pieces: list[Piece]) -> None:
        """It has each slice of each tensor once, whole."""
        covered: dict[str, list[tuple[int, int]]] = {}
        for piece in pieces:
            if piece.change.delta is not None:
                raise WeightsError(f"the anchor {line.target} has only changes of {piece.name}")
            covered.setdefault(piece.name, []).append((piece.start, piece.stop))
        for name, spans in covered.items():
            end = max(stop for _, stop in spans)
            # the first condition bounds the second by what came
            if end > len(spans) * SLICE or sorted(spans) != [(part.start, part.stop) for part in slices(end)]:
                raise WeightsError(f"the anchor {line.target} has not all of {name}")
            if self._bits and (name not in self._bits or self._bits[name].numel() != end):
                raise WeightsError(f"the anchor {line.target} has {end} elements of {name}, which are others here")
        if self._bits and (missing := sorted(self._bits.keys() - covered.keys())):
            raise WeightsError(f"the anchor {line.target} has no {missing[0]} (and {len(missing) - 1} more)")

    def _held(self, name: str, start: int, elements: int) -> torch.Tensor:
        bits = self._bits.get(name)
        if bits is None or start + elements > bits.numel():
            raise WeightsError(f"{name} has no {elements} elements from {start} here")
        return bits[start : start + elements]

    def _compared(self, pieces: list[Piece]) -> list[Piece]:
        """What an anchor changes here."""
        compared = []
        for piece in pieces:
            old, change = self._bits[piece.name][piece.start : piece.stop], piece.change
            assert change.new is not None
            if torch.equal(old, change.new):
                continue
            delta = ulp.diff(old, change.new) if change.dtype in MANTISSA else None
            compared.append(Piece(piece.name, piece.start, Change(change.dtype, delta, None, change.new)))
        return compared

    def _with_old(self, piece: Piece) -> Piece:
        old = self._bits[piece.name][piece.start : piece.stop]
        return Piece(piece.name, piece.start, Change(piece.change.dtype, piece.change.delta, old, piece.change.new))

    def _total_after(self, pieces: list[Piece]) -> tuple[int, int]:
        """Fingerprint once these are carried out, and how many elements they change."""
        total, changed = self._total, 0
        for piece in pieces:
            old, delta, seed = piece.change.old, piece.change.delta, fingerprint.seed_of(piece.name)
            assert old is not None
            if delta is None:
                assert piece.change.new is not None
                where = torch.nonzero(old != piece.change.new).reshape(-1)
                before, after = old[where], piece.change.new[where]
            else:
                where, before = delta.indices, old[delta.indices]
                after = ulp.stepped(before, delta.steps)
            changed += where.numel()
            places = where + piece.start
            total += fingerprint.element_sum(seed, places, after) - fingerprint.element_sum(seed, places, before)
        return total % (1 << 64), changed

    def _keep_update(
        self, line: Line, pieces: list[Piece], parts: list[UpdatePart] | None, changed: int, start: float
    ) -> None:
        """Parts that came in the code of the local network go on as they are."""
        if parts is not None and all(_is_fast(part) for part in parts):
            parts = [relabelled(part, i, len(parts), line.target_hash) for i, part in enumerate(parts)]
        else:
            parts = cut(pieces, line, Code.FAST, self._part_bytes)
        update = Update(line.base, line.target, False, parts, changed, time.perf_counter() - start)
        self._updates[line.base] = update
        full_bytes, kept = self.full_bytes, sum(update.bytes for update in self._updates.values())
        while len(self._updates) > max(self._keep, 1) or (kept > full_bytes and len(self._updates) > 1):
            kept -= self._updates.popitem(last=False)[1].bytes

    # -- handing them on ---------------------------------------------------------------------------------------

    def prepared(self, held: Version | None) -> Update | None:
        """What brings an engine that holds `held` to the newest version (None: an anchor), if nothing is left to be
        computed for it."""
        assert self.version is not None
        if (ready := self._prepared.get(held)) is not None:  # once: the thread that takes versions may clear it now
            return ready
        update = self._updates.get(held) if held is not None else None
        return update if update is not None and update.target == self.version else None

    def prepare(self, held: Version | None) -> Update:
        """The same, computed now: takes as long as reading all updates since `held`, or copying all weights."""
        if (ready := self.prepared(held)) is not None:
            return ready
        update = self._composed(held) if held in self._updates else None
        if update is None or update.bytes >= self.full_bytes:
            update = self._prepared.get(None) or self._anchor()
        self._prepared[held] = update
        return update

    def _composed(self, held: Version | None) -> Update:
        start = time.perf_counter()
        missing = list(self._updates.values())
        missing = missing[next(i for i, update in enumerate(missing) if update.base == held) :]
        base, target = missing[0].base, missing[-1].target
        steps = ([piece for part in update.parts for piece in read(part)] for update in missing)
        line = Line(self._run, base, target, False, target_hash=self.hashes[target])
        pieces = [self._with_new(piece) for piece in reduce(compose, steps)]
        parts = cut(pieces, line, Code.FAST, self._part_bytes)
        changed = sum(piece.change.changed for piece in pieces)
        return Update(base, target, False, parts, changed, time.perf_counter() - start)

    def _with_new(self, piece: Piece) -> Piece:
        new = self._bits[piece.name][piece.start : piece.stop]
        return Piece(piece.name, piece.start, Change(piece.change.dtype, piece.change.delta, None, new))

    def _anchor(self) -> Update:
        assert self.version is not None
        start = time.perf_counter()
        line = Line(self._run, self.version, self.version, True, target_hash=self.hashes[self.version])
        pieces = [piece for name, dtype, bits in self.tensors() for piece in dense_pieces(name, dtype, bits)]
        parts = cut(pieces, line, Code.FAST, self._part_bytes)
        anchor = Update(self.version, self.version, True, parts, self.elements, time.perf_counter() - start)
        self._prepared[None] = anchor
        return anchor


def _is_fast(part: UpdatePart) -> bool:
    return not part.names or payload.code_of(part.payload) is Code.FAST


def differences(
    old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
) -> list[Piece]:
    """What turns one set of flat bits into another, with the bits of both beside it; slices that are equal are left
    out."""
    pieces = []
    for name, bits in new.items():
        for part in slices(bits.numel()):
            before, after = old[name][part], bits[part]
            if not torch.equal(before, after):
                delta = ulp.diff(before, after) if dtypes[name] in MANTISSA else None
                pieces.append(Piece(name, part.start, Change(dtypes[name], delta, before, after)))
    return pieces
