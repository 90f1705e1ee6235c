"""What the learner's first process tells the others to do, as bytes: a method of an object by name, and its arguments.

Arguments are what JSON has, arrays of numbers, the few types of ours that a learner's methods take, and two things that
every process has under the same name: models and losses.  A batch is sent as it is; nothing is code.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stream_rl.types import TrainingBatch, Version

_NUMBERS = frozenset("iuf")
"""numpy's kinds of dtypes that may travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    target: str
    method: str
    arguments: Sequence[Any] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Names:
    """What every process of the learner has."""

    models: Mapping[str, Any]
    losses: Mapping[str, Any]

    def encode(self, command: Command) -> list[bytes]:
        """Frames: the command as JSON, then its arrays.  Raises TypeError for an argument that cannot travel."""
        arrays: list[bytes] = []
        words = [command.target, command.method, self._plain(list(command.arguments), arrays)]
        words.append(self._plain(dict(command.options), arrays))
        return [json.dumps(words).encode(), *arrays]

    def decode(self, frames: Sequence[bytes]) -> Command:
        """Inverse of `encode`."""
        target, method, arguments, options = json.loads(frames[0])
        return Command(
            target=target,
            method=method,
            arguments=self._value(arguments, frames),
            options=self._value(options, frames),
        )

    def _plain(self, value: Any, arrays: list[bytes]) -> Any:
        """As JSON has it: what JSON does not know is a list of its kind and what it is made from."""
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Version():
                return ["version", *value]
            case pathlib.Path():
                return ["path", str(value)]
            case TrainingBatch():
                fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
                return ["batch", self._plain(fields, arrays)]
            case np.ndarray() if value.dtype.kind in _NUMBERS:
                arrays.append(np.ascontiguousarray(value).tobytes())
                return ["array", len(arrays), value.dtype.str, list(value.shape)]
            case list() | tuple():
                return ["list", *(self._plain(each, arrays) for each in value)]
            case dict():
                return {str(key): self._plain(each, arrays) for key, each in value.items()}
        for kind, known in (("model", self.models), ("loss", self.losses)):
            for name, each in known.items():
                if each is value or (kind == "loss" and each == value):
                    return [kind, name]
        raise TypeError(f"the learner's other processes cannot be given {value!r}: they know {self}")

    def _value(self, plain: Any, frames: Sequence[bytes]) -> Any:
        match plain:
            case ["version", history, step]:
                return Version(history, step)
            case ["path", path]:
                return pathlib.Path(path)
            case ["batch", fields]:
                return TrainingBatch(**self._value(fields, frames))
            case ["array", index, dtype, shape]:
                return np.frombuffer(frames[index], np.dtype(dtype)).reshape(shape).copy()
            case ["list", *items]:
                return [self._value(item, frames) for item in items]
            case ["model", name]:
                return self.models[name]
            case ["loss", name]:
                return self.losses[name]
            case dict():
                return {key: self._value(each, frames) for key, each in plain.items()}
        return plain
