"""A line of versions without a learner: made-up changes to a checkpoint, some on and some off again, to measure with.

Changes are steps at random places, so none of them needs the weights, and what was done is undone by the opposite
steps.  A version costs its maker next to nothing: what it is made of was encoded before.
"""

import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engines.weights import fingerprint
from engines.weights.codes.changes import Change
from engines.weights.codes.payload import Code
from engines.weights.codes.ulp import SparseDelta
from engines.weights.huggingface_shapes import checkpoint_files, checkpoint_shapes
from engines.weights.parts import Line, Piece, apply_, checksum, cut, dense_pieces, slices
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

ONE_STEP = 0.9
"""Share of the changes that are one step; each further step is a tenth as frequent."""


@dataclass(slots=True)
class _Toggle:
    """Changes that are on or off."""

    pieces: list[Piece]
    parts: tuple[list[UpdatePart], list[UpdatePart]]
    """That turn it on, and off."""
    on: bool = False


@dataclass(slots=True)
class Rehearsal:
    """Versions of the checkpoint in `directory`, each some share of the elements away from the one before."""

    run: str
    directory: pathlib.Path
    part_bytes: int
    seed: int = 0
    _toggles: dict[float, list[_Toggle]] = field(default_factory=dict)

    def prepare(self, share: float) -> int:
        """Make up two sets of changes of about this share; versions of it turn them on and off in turns.  How many
        elements they change on average."""
        self._toggles[share] = [self._toggle(share, number) for number in range(2)]
        changed = [sum(p.change.changed for p in toggle.pieces) for toggle in self._toggles[share]]
        return sum(changed) // 2

    def anchor(self, version: Version) -> list[UpdatePart]:
        """All weights as they are now."""
        pieces = (piece for name, dtype, bits in self._weights() for piece in dense_pieces(name, dtype, bits))
        return cut(pieces, Line(self.run, version, version, True), Code.FAST, self.part_bytes)

    def next(self, share: float, base: Version, target: Version) -> list[UpdatePart]:
        """The update to another version."""
        toggle = self._toggles[share].pop(0)
        self._toggles[share].append(toggle)
        parts = toggle.parts[toggle.on]
        toggle.on = not toggle.on
        return [_sealed(replace(part, base=base, target=target)) for part in parts]

    def export(self, directory: pathlib.Path) -> None:
        """Write all weights as they are now as a checkpoint: the original's bytes, and on them what is on."""
        shapes = checkpoint_shapes(self.directory)
        tensors = {name: bits.view(dtype).reshape(shapes[name][0]) for name, dtype, bits in self._weights()}
        directory.mkdir()
        shutil.copy(self.directory / "config.json", directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def _weights(self) -> Iterator[tuple[str, torch.dtype, torch.Tensor]]:
        """Name, dtype, flat bits."""
        changes: dict[str, list[Piece]] = {}
        for toggle in (toggle for some in self._toggles.values() for toggle in some if toggle.on):
            for piece in toggle.pieces:
                changes.setdefault(piece.name, []).append(piece)
        for name, tensor in _loaded(self.directory):
            bits = fingerprint.bits_of(tensor).reshape(-1).clone()
            for piece in changes.get(name, ()):
                apply_(bits[piece.start : piece.stop], piece.change)
            yield name, tensor.dtype, bits

    def _toggle(self, share: float, number: int) -> _Toggle:
        rng = np.random.default_rng([self.seed, number, int(1e6 * share)])
        pieces = []
        for name, (shape, dtype) in sorted(checkpoint_shapes(self.directory).items()):
            for part in slices(int(np.prod(shape, dtype=np.int64))):
                delta = _delta(part.stop - part.start, share, fingerprint.integers(dtype), rng)
                pieces.append(Piece(name, part.start, Change(dtype, delta)))
        back = [replace(piece, change=replace(piece.change, delta=_opposite(piece.change.sparse))) for piece in pieces]
        line = Line(self.run, Version(0, 0), Version(0, 0), False)
        return _Toggle(
            pieces,
            (cut(pieces, line, Code.FAST, self.part_bytes), cut(back, line, Code.FAST, self.part_bytes)),
        )


def checkpoint_hash(directory: pathlib.Path) -> str:
    """Fingerprint of a checkpoint, tensor by tensor, as any program loads it."""
    return fingerprint.text(fingerprint.model_sum(_loaded(directory)))


def _loaded(directory: pathlib.Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in checkpoint_files(directory):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                yield name, tensors.get_tensor(name)


def _delta(elements: int, share: float, integers: torch.dtype, rng: np.random.Generator) -> SparseDelta:
    gaps = rng.geometric(share, int(elements * share * 1.2) + 10)
    indices = np.cumsum(gaps) - 1
    indices = indices[indices < elements]
    steps = rng.geometric(ONE_STEP, indices.size) * rng.choice([-1, 1], indices.size)
    return SparseDelta(elements, torch.from_numpy(indices), torch.from_numpy(steps).to(integers))


def _opposite(delta: SparseDelta) -> SparseDelta:
    return SparseDelta(delta.elements, delta.indices, -delta.steps)


def _sealed(part: UpdatePart) -> UpdatePart:
    return replace(part, checksum=checksum(part))
