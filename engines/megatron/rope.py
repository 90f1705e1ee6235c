"""What a config.json says of RoPE: its base, and how frequencies are scaled for contexts longer than the first ones.

Only what transformers and SGLang compute alike is taken.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from engines.megatron import config_json
from stream_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor`.  Here and below fields have config.json's names."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated; as in Llama 3.1."""

    factor: float
    low_freq_factor: float
    """Turns in the original context under which a frequency is low."""
    high_freq_factor: float
    """Turns over which it is high."""
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """The same with a ramp over the dimensions, and sharper attention.  Peng et al. 2023 (arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Turns in the original context from which a frequency is kept."""
    beta_slow: float = 1.0
    """Turns up to which it is divided."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
_KINDS: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def read_rope(config: Mapping[str, Any], path: pathlib.Path) -> tuple[float, RopeScaling | None]:
    """rope_theta, and the scaling if there is any.

    transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes all of it to `rope_parameters`.
    Raises ConfigError for what is not understood.
    """
    given = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)}
    if len(given) > 1:
        raise ConfigError(f"{path}: rope_scaling and rope_parameters are both set, and not all readers prefer the same")
    key, rope = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: {key} must be a JSON object, got {rope!r}")

    thetas = {
        config_json.get(source, "rope_theta", float, path)
        for source in (config, rope)
        if source.get("rope_theta") is not None
    }
    if len(thetas) != 1:
        raise ConfigError(
            f"{path}: expected one rope_theta (at the top or in rope_parameters), got {sorted(thetas) or 'none'}"
        )
    return thetas.pop(), _scaling(key, rope, config, path)


def _scaling(key: str, rope: Mapping[str, Any], config: Mapping[str, Any], path: pathlib.Path) -> RopeScaling | None:
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None] or ["default"]
    if kinds[0] not in ("default", *_KINDS) or kinds[-1] != kinds[0]:
        asked = " and ".join(map(repr, kinds))
        raise ConfigError(f"{path}: {key} asks for {asked}; the learner has {['default', *_KINDS]}, one at a time")
    made = _KINDS.get(kinds[0])
    known = {} if made is None else {field.name: field for field in fields(made)}
    if unknown := sorted(rope.keys() - known.keys() - {"rope_type", "type", "rope_theta"}):
        raise ConfigError(
            f"{path}: {key} of type {kinds[0]!r} has {unknown}, of which the learner knows nothing, or transformers "
            f"and SGLang not the same; it knows {sorted(known)}"
        )
    if made is None:
        return None
    if made is LinearScaling and type(rope.get("factor")) is int:
        raise ConfigError(f"{path}: {key}: factor must be written as {rope['factor']}.0, or SGLang refuses the model")
    values = {
        name: config_json.get(rope, name, field.type, path)  # type: ignore[arg-type]  # types, not strings, here
        for name, field in known.items()
        if rope.get(name) is not None or field.default is MISSING
    }
    scaling = made(**values)
    match scaling:
        case Llama3Scaling(low_freq_factor=low, high_freq_factor=high) if not low < high:
            raise ConfigError(f"{path}: {key}: high_freq_factor must be above low_freq_factor ({low}), got {high}")
        case YarnScaling(beta_slow=slow, beta_fast=fast) if not slow < fast:
            raise ConfigError(f"{path}: {key}: beta_fast must be above beta_slow ({slow}), got {fast}")
        case YarnScaling(factor=factor, original_max_position_embeddings=original):
            positions = config_json.get(config, "max_position_embeddings", int, path)
            if positions > factor * original:
                raise ConfigError(
                    f"{path}: max_position_embeddings must be at most factor * original_max_position_embeddings = "
                    f"{factor * original:g}, beyond which SGLang forgets the scaling, got {positions}"
                )
        case _:
            pass
    return scaling
