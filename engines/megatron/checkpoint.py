"""Hugging Face directories on disk: read tensors lazily, write a whole directory or none of it."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engines.megatron.shards import Runs, whole
from stream_rl.errors import ConfigError, WeightsError

_INDEX = ".safetensors.index.json"
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""What a checkpoint holds beside its weights; none of it changes in training."""
SHARD_BYTES = 4 << 30
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""By safetensors' names: those that we train in and keep states in."""
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|replaced)-(?P<pid>\d+)")
"""What a save puts beside the directory that it writes."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What one file holds of a tensor; [a:b] reads the elements from a to b of what it holds."""

    elements: int
    """Of the whole tensor."""
    runs: Runs
    dtype: torch.dtype
    stored: Any

    def __getitem__(self, wanted: slice) -> Tensor:
        read: Tensor = self.stored[wanted]
        return read


class CheckpointTensors(Mapping[str, Tensor]):
    """The tensors of a directory's *.safetensors, each read when asked for.  A context manager."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Raises ConfigError if there are no safetensors or they are not what their index says."""
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        for path in _weight_files(directory):
            try:
                file = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                self._stack.close()
                raise ConfigError(f"cannot read the weights {path}: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def part(self, name: str) -> StoredPart:
        """The whole tensor, of which parts can be read."""
        stored = self._files[name].get_slice(name)
        shape = stored.get_shape()
        elements = math.prod(shape)
        rows = stored if len(shape) < 2 else _Rows(stored, elements // max(shape[0], 1))
        return StoredPart(elements, whole(elements), DTYPES[stored.get_dtype()], rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A stored tensor as if it were flat."""

    stored: Any
    width: int

    def __getitem__(self, wanted: slice) -> Tensor:
        first = wanted.start // self.width
        rows: Tensor = self.stored[first : -(-wanted.stop // self.width)].reshape(-1)
        return rows[wanted.start - first * self.width : wanted.stop - first * self.width]


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / f"model{_INDEX}"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} must be a JSON object with a weight_map: {error!r}") from error
        return [directory / name for name in names]
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"expected *.safetensors in {directory} and found none; model.path must hold the weights")
    return paths


def save_checkpoint(
    directory: pathlib.Path,
    weights: Iterable[tuple[str, Tensor]],
    source: pathlib.Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `weights` and the other files of `source` as a Hugging Face directory, whole or not at all.

    One that is there already is replaced.  shard_bytes: most bytes of one file (a larger tensor has its own).
    Raises WeightsError if there is nothing to write or the disk refuses.
    """
    with replacing(directory) as new:
        write_huggingface(new, weights, source, shard_bytes)


def write_huggingface(
    directory: pathlib.Path, weights: Iterable[tuple[str, Tensor]], source: pathlib.Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """As `save_checkpoint`, straight into the empty `directory`."""
    write_tensors(directory, "model", weights, shard_bytes)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            shutil.copy(path, directory)


@contextlib.contextmanager
def replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory to fill, which takes the place of `directory` when the block ends without an error.

    It is written beside `directory` under a hidden name, synced and renamed: whoever finds `directory` finds all of it.
    What a process leaves that is killed on the way goes with the next `sweep`, or the next save of the same name.
    Raises WeightsError if the disk refuses.
    """
    sweep(directory.parent, directory.name)
    new = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        _replace(new, directory)
        sync(directory.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"cannot write {directory}: {error}; make room, or give another place") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sweep(parent: pathlib.Path, name: str | None = None) -> None:
    """Clear up after saves in `parent` (to `name`, if given) whose process is no more.

    A directory that had stepped aside for a new one that never came gets its name back.
    """
    for path in parent.glob(".*-*"):
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or name not in (None, leftover["name"]) or _in_use(int(leftover["pid"])):
            continue
        directory = path.with_name(leftover["name"])
        if leftover["kind"] == "replaced" and not directory.exists():
            path.rename(directory)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _in_use(pid: int) -> bool:
    """Whether the process that saved there may still be at it.  In a container a new process often has the old pid."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_tensors(
    directory: pathlib.Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write named tensors as STEM.safetensors, or as several files with an index; no more than one file is in memory.

    metadata: for each file.
    Raises WeightsError if there are none.
    """
    shards: list[tuple[pathlib.Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def write() -> None:
        path = directory / f"{stem}-{len(shards)}.part"
        # SGLang and transformers look for the format in the metadata.
        safetensors.torch.save_file(pending, path, metadata={"format": "pt", **metadata})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            write()
            pending_bytes = 0
        # A copy, because safetensors refuses tensors that share memory and ours may be views of one parameter.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not pending:
        raise WeightsError(f"expected tensors to save in {directory}, got none")
    write()

    if len(shards) == 1:
        shards[0][0].rename(directory / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / f"{stem}{_INDEX}").write_text(json.dumps(index, indent=2))


def _replace(new: pathlib.Path, directory: pathlib.Path) -> None:
    """A directory cannot be renamed over a full one, so an old one steps aside first."""
    if not directory.exists():
        new.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def sync(path: pathlib.Path) -> None:
    """Until a file's content, or a directory's names, would outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
