"""Hugging Face directories on disk: read tensors lazily, write a whole directory or none of it."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from stream_rl.errors import ConfigError, WeightsError

_INDEX = "model.safetensors.index.json"
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / _INDEX
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
    shard_bytes: int = 4 << 30,
) -> None:
    """Write `weights` and the other files of `source` as a Hugging Face directory.

    Written beside `directory` under a hidden name, synced and renamed: whoever finds `directory` finds all of it.  One
    that is there already is replaced.  shard_bytes: most bytes of one file (a larger tensor has its own).
    Raises WeightsError if there is nothing to write, OSError if the disk refuses.
    """
    temporary = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, weights, shard_bytes)
        for pattern in _COPIED:
            for path in source.glob(pattern):
                shutil.copy(path, temporary)
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        _replace(temporary, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(directory: pathlib.Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[tuple[pathlib.Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def write() -> None:
        path = directory / f"shard-{len(shards)}"
        # SGLang and transformers look for the format in the metadata.
        safetensors.torch.save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            write()
            pending_bytes = 0
        # A copy, because safetensors refuses tensors that share memory and ours may be views of one parameter.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not pending:
        raise WeightsError(f"expected weights to save in {directory}, got none")
    write()

    if len(shards) == 1:
        shards[0][0].rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2))


def _replace(new: pathlib.Path, directory: pathlib.Path) -> None:
    """A directory cannot be renamed over a full one, so an old one steps aside first."""
    if not directory.exists():
        new.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
