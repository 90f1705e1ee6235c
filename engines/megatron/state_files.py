"""The files of a training state: each rank's shards, by what they are of and the checkpoint's name of the tensor.

`rank-00003.safetensors` holds flat tensors KIND/NAME, and in its metadata which elements of NAME they are; states that
a tensor has one of (Adam's step) have no dimension.  `random/...` are the random states of the rank itself.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import safetensors
import torch
from torch import Tensor

from engines.megatron.checkpoint import DTYPES, SHARD_BYTES, StoredPart, write_tensors
from engines.megatron.shards import Assembly, Runs, Shard
from stream_rl.errors import WeightsError

_RANDOM = "random"
_RUNS = "runs"
_FILE = re.compile(r"rank-(\d+).*\.safetensors")
Held = Mapping[str, tuple[int, Runs]]
"""Of each tensor of the checkpoint, by name: its elements, and which of them a rank holds."""


def write_state(
    directory: pathlib.Path,
    rank: int,
    held: Held,
    states: Iterator[tuple[str, Tensor]],
    random: Mapping[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what `rank` keeps.  states: KIND/NAME and the elements of NAME that `held` says, flat, or one for all."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from states
        for name, state in random.items():
            yield f"{_RANDOM}/{name}", state

    runs = msgspec.json.encode(held).decode()
    write_tensors(directory, f"rank-{rank:05}", tensors(), shard_bytes, {_RUNS: runs})


class StateFiles:
    """All ranks' files in a directory, opened; tensors are read when asked for.  A context manager."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Raises WeightsError if they cannot be read as what they should be."""
        self._parts: dict[str, dict[str, list[StoredPart]]] = {}
        self._totals: dict[str, dict[str, list[Tensor]]] = {}
        self._random: dict[int, dict[str, Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for path in sorted(directory.glob("*.safetensors")):
                try:
                    self._open(stack, path)
                except (OSError, KeyError, TypeError, safetensors.SafetensorError, msgspec.DecodeError) as error:
                    raise WeightsError(f"cannot read the training state {path}: {error!r}") from error
            self._stack = stack.pop_all()

    def __enter__(self) -> "StateFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Of the checkpoint's tensors that it holds something of."""
        return {name for kinds in (self._parts, self._totals) for named in kinds.values() for name in named}

    @property
    def kinds(self) -> set[str]:
        """Of the states that every element has."""
        return set(self._parts)

    @property
    def total_kinds(self) -> set[str]:
        """Of the states that a tensor has one of."""
        return set(self._totals)

    def parts(self, kind: str, name: str) -> list[StoredPart]:
        """From whichever ranks have some."""
        return self._parts.get(kind, {}).get(name, [])

    def totals(self, kind: str, names: Sequence[str]) -> list[Tensor]:
        """Those of the tensors named, as often as a rank has one; of none named, of all."""
        named = self._totals.get(kind, {})
        return [value for name in (names or named) for value in named.get(name, [])]

    def random(self, rank: int) -> dict[str, Tensor]:
        """Empty if the rank left none."""
        return self._random.get(rank, {})

    def _open(self, stack: contextlib.ExitStack, path: pathlib.Path) -> None:
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise WeightsError(f"cannot read the training state: expected rank-N.safetensors, got {path}")
        file: Any = stack.enter_context(safetensors.safe_open(path, framework="pt"))
        held = msgspec.json.decode(file.metadata()[_RUNS], type=dict[str, tuple[int, Runs]])
        for key in file.keys():  # noqa: SIM118  # it is no mapping
            kind, _, name = key.partition("/")
            stored = file.get_slice(key)
            if kind == _RANDOM:
                self._random.setdefault(int(match[1]), {})[name] = file.get_tensor(key)
            elif not stored.get_shape():
                self._totals.setdefault(kind, {}).setdefault(name, []).append(file.get_tensor(key))
            else:
                elements, runs = held[name]
                if stored.get_shape() != [runs.elements]:
                    raise WeightsError(f"{path}: expected {runs.elements} elements of {key}, got {stored.get_shape()}")
                part = StoredPart(elements, runs, DTYPES[stored.get_dtype()], stored)
                self._parts.setdefault(kind, {}).setdefault(name, []).append(part)


def assembly(shard: Shard, dtype: torch.dtype, stored: Sequence[StoredPart], what: str) -> Assembly:
    """How `shard` is put together from what is stored of its tensor.  Raises WeightsError if it cannot be.

    what: it is, for messages.
    """
    for each in stored:
        if (each.elements, each.dtype) != (shard.elements, dtype):
            raise WeightsError(
                f"{what} of {shard.name}: expected {shard.elements} elements of {dtype}, got {each.elements} of "
                f"{each.dtype}; the checkpoint is of another model"
            )
    return Assembly(f"{what} of {shard.name}", shard.there, [(each.runs, each) for each in stored])
