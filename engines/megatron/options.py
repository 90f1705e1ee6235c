"""Options that pass through to megatron-core under its own names, checked by name and type before they get there."""

import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from stream_rl.errors import ConfigError


def fields_of(config_class: type) -> dict[str, Any]:
    """Name and type of each field of one of megatron-core's config dataclasses."""
    return typing.get_type_hints(config_class)


def arguments_of(made: type) -> dict[str, Any]:
    """Name and type of each argument of a class's constructor."""
    parameters = inspect.signature(made).parameters
    return {name: parameter.annotation for name, parameter in parameters.items()}


def check_options(
    section: str, options: Mapping[str, Any], known: Mapping[str, Any], ours: Mapping[str, str]
) -> dict[str, Any]:
    """`options`, converted to the types that megatron-core declares.

    section: the recipe's name for them.  known: name -> type.  ours: names that the learner sets itself -> why.
    Raises ConfigError for an unknown name (listing the known ones), one of ours, or a wrong type.
    """
    checked = {}
    settable = sorted(known.keys() - ours.keys())
    for name, value in options.items():
        if name in ours:
            raise ConfigError(f"{section}.{name} cannot be set: {ours[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, settable, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"{section}.{name} is not known to megatron-core{hint} {section} has {settable}")
        try:
            checked[name] = msgspec.convert(value, known[name])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{section}.{name}: {error}, got {value!r}") from error
        except TypeError as error:
            raise ConfigError(f"{section}.{name} is not something that a recipe can hold: {error}") from error
    return checked
