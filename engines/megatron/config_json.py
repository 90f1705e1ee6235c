"""Reading a Hugging Face config.json: a value has the type that is expected, or the error names its key."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from stream_rl.errors import ConfigError

T = TypeVar("T")


def read(path: pathlib.Path) -> Mapping[str, Any]:
    """Raises ConfigError if `path` holds no JSON object."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; model.path must be a Hugging Face directory "
            f"(config.json, *.safetensors, tokenizer.json)"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def get(config: Mapping[str, Any], name: str, kind: type[T], path: pathlib.Path) -> T:
    """A positive number, or true or false, by `kind`.  Raises ConfigError for anything else."""
    value: Any = config.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    positive = kind is bool or (isinstance(value, int | float) and 0 < value < math.inf)
    if type(value) is not kind or not positive:
        wanted = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise ConfigError(f"{path}: {name} must be {wanted}, got {value!r}")
    return value
