"""Updates from tensors, as the learner sends them, and what an engine has after one."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from weights_builders import FIRST, RUN, SHAPES, Tensors

from engines.weights import fingerprint
from engines.weights.chain import Chain, Update, differences
from engines.weights.codes.changes import Known, Run
from engines.weights.codes.payload import Code
from engines.weights.parts import Line, Piece, Runs, apply_, cut, dense_pieces, read
from stream_rl import wire
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

PART_BYTES = 1 << 20
FlatBits = dict[str, torch.Tensor]


def flat(tensors: Tensors) -> FlatBits:
    """A copy as flat bits."""
    return {name: fingerprint.bits_of(tensor).reshape(-1).clone() for name, tensor in tensors.items()}


def dtypes_of(tensors: Tensors) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def runs_of(pieces: Sequence[Piece]) -> Runs:
    """Pieces as an engine reads them from a part."""
    runs = [
        Run([number], np.array([delta.changed]), delta.indices.numpy(), delta.steps.numpy())
        for number, piece in enumerate(pieces)
        if (delta := piece.change.delta) is not None
    ]
    dense = {number: piece.change.new for number, piece in enumerate(pieces) if piece.change.delta is None}
    known = [Known(piece.change.dtype, piece.change.elements) for piece in pieces]
    new = {number: bits for number, bits in dense.items() if bits is not None}
    return Runs([piece.name for piece in pieces], [piece.start for piece in pieces], known, runs, new)


def anchor_parts(tensors: Tensors, version: Version = FIRST, part_bytes: int = PART_BYTES) -> list[UpdatePart]:
    """All weights, as a learner sends them first."""
    dtypes = dtypes_of(tensors)
    pieces = [piece for name, bits in flat(tensors).items() for piece in dense_pieces(name, dtypes[name], bits)]
    return cut(pieces, Line(RUN, version, version, True), Code.FAST, part_bytes)


def change_parts(
    old: Tensors,
    new: Tensors,
    base: Version,
    target: Version,
    code: Code = Code.FAST,
    part_bytes: int = PART_BYTES,
    sources: int = 1,
) -> list[UpdatePart]:
    """What changed, as a learner of so many ranks sends it, each rank some of the tensors."""
    pieces = differences(flat(old), flat(new), dtypes_of(new))
    parts = []
    for source in range(sources):
        line = Line(RUN, base, target, False, source, sources)
        parts += cut(pieces[source::sources], line, code, part_bytes)
    return parts


def make_chain(
    tensors: Tensors, part_bytes: int = PART_BYTES, keep: int = 3, version: Version = FIRST, run: str = RUN
) -> Chain:
    chain = Chain(run, part_bytes, keep)
    chain.advance(anchor_parts(tensors, version, part_bytes))
    return chain


def publish(chain: Chain, old: Tensors, new: Tensors, target: Version, **options: object) -> None:
    """The learner's next version."""
    assert chain.version is not None
    chain.advance(change_parts(old, new, chain.version, target, **options))  # type: ignore[arg-type]


def travelled(part: UpdatePart) -> UpdatePart:
    decoded: UpdatePart = wire.decode([bytes(frame) for frame in wire.encode(part)])
    return decoded


def pieces_of(update: Update, order: int = 0) -> list[Piece]:
    """Read from parts that came in some order."""
    parts = [travelled(part) for part in update.parts]
    random.Random(order).shuffle(parts)
    assert sorted(part.part for part in parts) == list(range(parts[0].parts))
    assert {(p.run, p.base, p.target, p.anchor, p.parts, p.sources) for p in parts} == {
        (RUN, update.base, update.target, update.anchor, len(parts), 1)
    }
    return [piece for part in parts for piece in read(part)]


def applied(
    update: Update, held: Tensors | None, order: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Tensors:
    """What an engine that holds `held` has after an update whose parts came in some order."""
    pieces = pieces_of(update, order)
    bits = {} if held is None else flat(held)
    for piece in pieces:
        if held is None:
            elements = int(torch.Size(shapes[piece.name]).numel())
            bits.setdefault(piece.name, fingerprint.bits_of(torch.zeros(elements, dtype=piece.change.dtype)))
        apply_(bits[piece.name][piece.start : piece.stop], piece.change)
    dtypes = {piece.name: piece.change.dtype for piece in pieces} | ({} if held is None else dtypes_of(held))
    return {name: each.view(dtypes[name]).reshape(shapes[name]) for name, each in bits.items()}


def hash_stated(update: Update) -> str:
    [text] = {part.target_hash for part in update.parts}
    return text
