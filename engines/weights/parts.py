"""Updates cut into parts, and read again on the other side.

An update is a list of pieces: what became of a slice of a checkpoint tensor.  Slices begin at multiples of `SLICE`, so
that no tensor is too large to travel and two updates of one tensor have slices in common.  A part holds some of the
pieces in one payload and can be read without the others.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch

from engines.weights.codes import payload, ulp
from engines.weights.codes.changes import MANTISSA, Change, Each, Known, Run
from engines.weights.codes.payload import Code
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import ByteArray, Version

SLICE = 1 << 22
"""Elements: a slice of dense fp32 is 16 MiB."""
FAST_BITS = 14
"""Of a changed element, about; to decide what goes into a part before it is encoded."""

Held = Callable[[str, int, int], torch.Tensor]
"""(name, start, elements) to the flat bits that a receiver holds there."""


class CorruptPart(WeightsError):
    """The bytes are not those that were sent."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What became of a slice of a checkpoint tensor."""

    name: str
    start: int
    """Flat position of the slice's first element; positions within `change` count from it."""
    change: Change

    @property
    def stop(self) -> int:
        return self.start + self.change.elements


@dataclass(frozen=True, slots=True)
class Line:
    """What the parts of one update have in common."""

    run: str
    base: Version
    target: Version
    anchor: bool
    source: int = 0
    sources: int = 1
    target_hash: str = ""


def slices(elements: int) -> Iterator[slice]:
    """Of a flat tensor; one that is empty has an empty one."""
    return (slice(start, min(start + SLICE, elements)) for start in range(0, max(elements, 1), SLICE))


def dense_pieces(name: str, dtype: torch.dtype, bits: torch.Tensor) -> Iterator[Piece]:
    """All of a tensor, as an anchor has it.  They alias `bits`, which is flat."""
    return (Piece(name, part.start, Change(dtype, None, None, bits[part])) for part in slices(bits.numel()))


def cut(pieces: Iterable[Piece], line: Line, code: Code, part_bytes: int, each: Each = map) -> list[UpdatePart]:
    """Encode as parts of about `part_bytes`; at least one, though it may be empty.

    A piece is dense in its part where that is smaller and its new bits are here; see codes.payload.
    """
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size >= part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += _size(piece.change)
    return [_part(group, line, i, len(groups), code, each) for i, group in enumerate(groups)]


def read(part: UpdatePart, held: Held | None = None, each: Each = map) -> list[Piece]:
    """The pieces of a part.  `held` is asked by codes that need the old bits.

    Raises CorruptPart for other bytes than were sent, WeightsError for what `cut` cannot have made.
    """
    check(part)
    tensors = _known(part, held)
    changes = payload.decode(part.payload, tensors, each) if tensors else []
    pieces = []
    for name, start, tensor, found in zip(part.names, part.starts, tensors, changes, strict=True):
        sparse = isinstance(found, ulp.SparseDelta)
        change = Change(tensor.dtype, found if sparse else None, None, None if sparse else found)  # type: ignore[arg-type]
        pieces.append(Piece(name, start, change))
    return pieces


@dataclass(frozen=True, slots=True)
class Runs:
    """The pieces of a part with as few objects as can be."""

    names: list[str]
    starts: list[int]
    tensors: list[Known]
    sparse: list[Run]
    dense: dict[int, torch.Tensor]
    """New bits by the number of their piece."""


def runs(part: UpdatePart, held: Held | None = None) -> Runs:
    """As `read`, of a part that was checked, for an engine: there every object costs the scheduler time."""
    tensors = _known(part, held)
    sparse, dense = payload.decode_runs(part.payload, tensors) if tensors else ([], {})
    return Runs(part.names, part.starts, tensors, sparse, dense)


def _known(part: UpdatePart, held: Held | None) -> list[Known]:
    """What is known of the pieces before the payload is read.  Raises WeightsError for what is no slice of weights."""
    dtypes: dict[str, torch.dtype] = {}
    for dtype_name in set(part.dtypes):
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype) or dtype.itemsize not in (1, 2, 4, 8):
            name = part.names[part.dtypes.index(dtype_name)]
            raise WeightsError(f"{name}: {dtype_name!r} is no dtype of weights")
        dtypes[dtype_name] = dtype
    for name, start, count in zip(part.names, part.starts, part.counts, strict=True):
        if start < 0 or start % SLICE or not 0 <= count <= SLICE:
            raise WeightsError(f"{name}: {count} elements from {start} are no slice of at most {SLICE}")
    old = itertools.repeat(None) if held is None else map(held, part.names, part.starts, part.counts)
    return [Known(dtypes[name], count, bits) for name, count, bits in zip(part.dtypes, part.counts, old, strict=False)]


def check(part: UpdatePart) -> None:
    """Raises CorruptPart for other bytes than were sent, WeightsError if the columns do not fit each other."""
    if checksum(part) != part.checksum:
        raise CorruptPart(f"part {part.part} of version {part.target} is corrupt")
    columns = {len(column) for column in (part.names, part.starts, part.counts, part.dtypes)}
    if not 0 <= part.part < part.parts or not 0 <= part.source < part.sources or len(columns) != 1:
        raise WeightsError(f"part {part.part} of {part.parts} of version {part.target} is malformed")


def relabelled(part: UpdatePart, part_number: int, parts: int, target_hash: str) -> UpdatePart:
    """The same pieces as a part of another update to the same version."""
    changed = replace(part, part=part_number, parts=parts, source=0, sources=1, target_hash=target_hash)
    return replace(changed, checksum=checksum(changed))


def compose(first: Iterable[Piece], second: Iterable[Piece]) -> list[Piece]:
    """What `first` and then `second` do, without the weights of either.  Several pieces of a slice in one of them, as
    ranks of a learner send them, must not overlap."""
    composed: dict[tuple[str, int], Change] = {}
    for pieces in (first, second):
        for piece in pieces:
            key = piece.name, piece.start
            earlier = composed.get(key)
            composed[key] = piece.change if earlier is None else _composed(earlier, piece.change, piece.name)
    return [Piece(name, start, change) for (name, start), change in composed.items() if change.changed]


def apply_(bits: torch.Tensor, change: Change) -> None:
    """Carry out `change` in place on the flat bits of its slice."""
    if change.delta is not None:
        ulp.apply_(bits, change.delta)
    else:
        assert change.new is not None
        bits.copy_(change.new)


def numbered(part: UpdatePart, attempt: int) -> UpdatePart:
    """A part as `cut` made it, to be sent as one of this attempt: nothing of its payload is read."""
    return replace(part, attempt=attempt, checksum=_numbered(part.checksum, attempt))


def checksum(part: UpdatePart) -> int:
    """Over everything but itself."""
    header = (part.run, part.base, part.target, part.anchor, part.part, part.parts, part.source, part.sources)
    columns = (part.names, part.starts, part.counts, part.dtypes, part.target_hash)
    unsent = zlib.crc32(part.payload.data, zlib.crc32(msgspec.msgpack.encode((header, columns))))
    return unsent if part.attempt == 0 else _numbered(unsent, part.attempt)


def _numbered(unsent: int, attempt: int) -> int:
    return zlib.crc32(msgspec.msgpack.encode(attempt), unsent)


def _composed(first: Change, second: Change, name: str) -> Change:
    if first.dtype != second.dtype or first.elements != second.elements:
        raise WeightsError(
            f"{name}: changes of {first.elements} x {first.dtype} and of {second.elements} x {second.dtype} do not "
            "follow each other"
        )
    if second.delta is None:
        return second
    new = second.new
    if first.delta is not None:
        return Change(first.dtype, ulp.compose(first.delta, second.delta), first.old, new)
    if new is None:
        assert first.new is not None
        new = ulp.apply_(first.new.clone(), second.delta)
    return Change(first.dtype, None, None, new)


def _size(change: Change) -> int:
    """In a payload, about."""
    dense = change.elements * change.dtype.itemsize
    if change.delta is None or change.dtype not in MANTISSA:
        return dense
    sparse = change.delta.changed * FAST_BITS // 8
    return sparse if change.new is None else min(sparse, dense)


def _part(group: Sequence[Piece], line: Line, number: int, parts: int, code: Code, each: Each) -> UpdatePart:
    part = UpdatePart(
        run=line.run,
        base=line.base,
        target=line.target,
        anchor=line.anchor,
        part=number,
        parts=parts,
        source=line.source,
        sources=line.sources,
        names=[piece.name for piece in group],
        starts=[piece.start for piece in group],
        counts=[piece.change.elements for piece in group],
        dtypes=[str(piece.change.dtype).removeprefix("torch.") for piece in group],
        checksum=0,
        target_hash=line.target_hash,
        payload=_encoded(group, code, each),
    )
    return replace(part, checksum=checksum(part))


def _encoded(group: Sequence[Piece], code: Code, each: Each) -> ByteArray:
    return payload.encode([piece.change for piece in group], code, each) if group else np.empty(0, np.uint8)
