"""What a Hugging Face folder holds, from its config.json alone: no torch, so that a recipe is checked early.

A model is taken only if everything in its config.json that changes its numbers is understood; the rest is refused here,
by name, rather than trained wrongly.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engines.megatron import config_json
from engines.megatron.rope import RopeScaling, read_rope
from stream_rl.errors import ConfigError

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What layers of an architecture have beside what all have: RMSNorm, a gated MLP, RoPE, grouped key heads."""

    qkv_bias: bool = False
    """Biases of the query, key and value projections; never of the output's."""
    qk_norm: bool = False
    """RMSNorm of each query and key head, before RoPE."""
    derived_head_dim: bool = False
    """Where config.json has no head_dim it is hidden_size / num_attention_heads."""

    @property
    def qkv_tensors(self) -> tuple[str, ...]:
        """Of each of the three projections."""
        return ("weight", "bias") if self.qkv_bias else ("weight",)


FAMILIES = {
    "LlamaForCausalLM": Family(derived_head_dim=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True, derived_head_dim=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}


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
    rope_scaling: RopeScaling | None = None
    tied: bool
    """The output layer is the transposed embedding; the checkpoint has no lm_head.weight of its own."""
    value_head: bool = False
    """The output layer gives one number a token: a critic's.  No config.json says so."""
    dtype: Literal["float32", "bfloat16"]
    """Of the checkpoint's tensors."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer, by config.json and generation_config.json; ascending."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]


def read_model_shape(directory: str | pathlib.Path) -> ModelShape:
    """The shape of the model in `directory`.

    Raises ConfigError if config.json is not there, lacks a key, or asks for something that the learner does not have.
    """
    path = pathlib.Path(directory) / "config.json"
    config = config_json.read(path)
    architectures = config.get("architectures")
    if architectures not in [[name] for name in FAMILIES]:
        raise ConfigError(
            f"{path}: architectures must be one of {sorted(FAMILIES)}, got {architectures!r}; "
            f"the learner has no weight mapping for any other"
        )
    _refuse_unsupported(config, path)
    rope_theta, rope_scaling = read_rope(config, path)

    shape = ModelShape(
        architecture=architectures[0],
        hidden_size=config_json.get(config, "hidden_size", int, path),
        layers=config_json.get(config, "num_hidden_layers", int, path),
        heads=config_json.get(config, "num_attention_heads", int, path),
        kv_heads=config_json.get(config, "num_key_value_heads", int, path),
        head_dim=_head_dim(config, FAMILIES[architectures[0]], path),
        ffn_size=config_json.get(config, "intermediate_size", int, path),
        vocab_size=config_json.get(config, "vocab_size", int, path),
        max_positions=config_json.get(config, "max_position_embeddings", int, path),
        rms_norm_epsilon=config_json.get(config, "rms_norm_eps", float, path),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=config_json.get(config, "tie_word_embeddings", bool, path),
        dtype=_dtype(config, path),
        eos_token_ids=_eos_token_ids(config, path),
    )
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads ({shape.heads}) must be a multiple of num_key_value_heads ({shape.kv_heads})"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"{path}: head_dim must be even, for RoPE turns pairs, got {shape.head_dim}")
    return shape


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors and their shapes, in its order."""
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for index in range(shape.layers):
        expected |= {f"model.layers.{index}.{name}": size for name, size in _layer_shapes(shape).items()}
    expected["model.norm.weight"] = (shape.hidden_size,)
    if shape.value_head:
        expected["value_head.weight"] = (1, shape.hidden_size)
    elif not shape.tied:
        expected["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return expected


def _layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, query, key = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for part, rows in (("q", query), ("k", key), ("v", key)):
        for kind in shape.family.qkv_tensors:
            sizes[f"self_attn.{part}_proj.{kind}"] = (rows, hidden) if kind == "weight" else (rows,)
    if shape.family.qk_norm:
        sizes |= {f"self_attn.{part}_norm.weight": (shape.head_dim,) for part in "qk"}
    return sizes | {
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (shape.ffn_size, hidden),
        "mlp.up_proj.weight": (shape.ffn_size, hidden),
        "mlp.down_proj.weight": (hidden, shape.ffn_size),
    }


def _refuse_unsupported(config: Mapping[str, Any], path: pathlib.Path) -> None:
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{path}: quantization_config is set; the learner trains {list(_DTYPES)} checkpoints only")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ConfigError(f"{path}: sliding-window attention is in use; the learner has full attention only")
    for key, wanted in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("bias", False),  # of SGLang's Llama; transformers' does not look at it
        ("attention_dropout", 0.0),
        ("partial_rotary_factor", 1.0),
        ("original_max_position_embeddings", None),  # it would replace that of rope_scaling
    ):
        if config.get(key, wanted) != wanted:
            raise ConfigError(f"{path}: {key} must be {wanted!r}, got {config[key]!r}; the learner has no other")


def _head_dim(config: Mapping[str, Any], family: Family, path: pathlib.Path) -> int:
    if config.get("head_dim") is not None or not family.derived_head_dim:
        return config_json.get(config, "head_dim", int, path)
    hidden, heads = (config_json.get(config, name, int, path) for name in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        raise ConfigError(f"{path}: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    return hidden // heads


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
    generation = config_json.read(generation_path) if generation_path.exists() else {}
    ids: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
    return tuple(sorted(ids))
