"""What a Hugging Face folder holds, from its config.json alone: no torch, so that a recipe is checked early.

A model is taken only if everything in its config.json that changes its numbers is understood; the rest is refused here,
by name, rather than trained wrongly.
"""

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stream_rl.errors import ConfigError

T = TypeVar("T")

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM",)
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes and constants of a decoder-only model, as config.json gives them."""

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    """Query heads of a layer."""
    kv_heads: int
    """Key (and value) heads of a layer; each serves heads / kv_heads query heads."""
    head_dim: int
    ffn_size: int
    """Width of the gated MLP."""
    vocab_size: int
    max_positions: int
    rms_norm_epsilon: float
    rope_theta: float
    tied: bool
    """The output layer is the transposed embedding; the checkpoint has no lm_head.weight of its own."""
    dtype: Literal["float32", "bfloat16"]
    """Of the checkpoint's tensors."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer, by config.json and generation_config.json; ascending."""


def read_model_shape(directory: str | pathlib.Path) -> ModelShape:
    """The shape of the model in `directory`.

    Raises ConfigError if config.json is not there, lacks a key, or asks for something that the learner does not have.
    """
    path = pathlib.Path(directory) / "config.json"
    config = _read_json(path)
    architectures = config.get("architectures")
    if architectures not in [[name] for name in SUPPORTED_ARCHITECTURES]:
        raise ConfigError(
            f"{path}: architectures must be one of {list(SUPPORTED_ARCHITECTURES)}, got {architectures!r}; "
            f"the learner has no weight mapping for any other"
        )
    _refuse_unsupported(config, path)

    shape = ModelShape(
        architecture=architectures[0],
        hidden_size=_get(config, "hidden_size", int, path),
        layers=_get(config, "num_hidden_layers", int, path),
        heads=_get(config, "num_attention_heads", int, path),
        kv_heads=_get(config, "num_key_value_heads", int, path),
        head_dim=_get(config, "head_dim", int, path),
        ffn_size=_get(config, "intermediate_size", int, path),
        vocab_size=_get(config, "vocab_size", int, path),
        max_positions=_get(config, "max_position_embeddings", int, path),
        rms_norm_epsilon=_get(config, "rms_norm_eps", float, path),
        rope_theta=_rope_theta(config, path),
        tied=_get(config, "tie_word_embeddings", bool, path),
        dtype=_dtype(config, path),
        eos_token_ids=_eos_token_ids(config, path),
    )
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads ({shape.heads}) must be a multiple of num_key_value_heads ({shape.kv_heads})"
        )
    return shape


def _read_json(path: pathlib.Path) -> Mapping[str, Any]:
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


def _get(config: Mapping[str, Any], name: str, kind: type[T], path: pathlib.Path) -> T:
    value: Any = config.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    positive = kind is bool or (isinstance(value, int | float) and value > 0)
    if type(value) is not kind or not positive:
        wanted = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise ConfigError(f"{path}: {name} must be {wanted}, got {value!r}")
    return value


def _refuse_unsupported(config: Mapping[str, Any], path: pathlib.Path) -> None:
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{path}: quantization_config is set; the learner trains {list(_DTYPES)} checkpoints only")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ConfigError(f"{path}: sliding-window attention is in use; the learner has full attention only")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{path}: {key} asks for {kind!r}; the learner has the default (unscaled) RoPE only")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("attention_dropout", 0.0)):
        if config.get(key, wanted) != wanted:
            raise ConfigError(f"{path}: {key} must be {wanted!r}, got {config[key]!r}; the learner has no other")


def _rope_theta(config: Mapping[str, Any], path: pathlib.Path) -> float:
    """transformers 4 wrote `rope_theta`, transformers 5 writes `rope_parameters.rope_theta`."""
    nested = config.get("rope_parameters") or {}
    found = {float(source["rope_theta"]) for source in (config, nested) if source.get("rope_theta") is not None}
    if len(found) != 1:
        raise ConfigError(
            f"{path}: expected one rope_theta (at the top or in rope_parameters), got {sorted(found) or 'none'}"
        )
    return found.pop()


def _dtype(config: Mapping[str, Any], path: pathlib.Path) -> Literal["float32", "bfloat16"]:
    """transformers 4 wrote `torch_dtype`, transformers 5 writes `dtype`."""
    match config.get("dtype", config.get("torch_dtype")):
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
        case other:
            raise ConfigError(f"{path}: dtype must be one of {list(_DTYPES)}, got {other!r}; convert the checkpoint")


def _eos_token_ids(config: Mapping[str, Any], path: pathlib.Path) -> tuple[int, ...]:
    generation_path = path.with_name("generation_config.json")
    generation = _read_json(generation_path) if generation_path.exists() else {}
    ids: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
    return tuple(sorted(ids))
