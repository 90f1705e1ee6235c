"""What a Hugging Face directory says of its tensors, without reading them."""

import json
import pathlib

import torch
from safetensors import safe_open

from stream_rl.errors import ConfigError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint, in order.  Raises ConfigError if there are none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise ConfigError(f"{directory} has no *.safetensors; expected a Hugging Face model directory")


def checkpoint_shapes(directory: pathlib.Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name to (shape, dtype) of every tensor in a checkpoint."""
    shapes = {}
    for file in checkpoint_files(directory):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                part = tensors.get_slice(name)
                shapes[name] = (tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    return shapes
