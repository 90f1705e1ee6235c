import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from engines.megatron.model_shape import ModelShape, read_model_shape
from engines.megatron.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from stream_rl.errors import ConfigError

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 64,
}


def write(directory: pathlib.Path, **changes: Any) -> pathlib.Path:
    config = {name: value for name, value in (CONFIG | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_config_of_transformers_5_is_read(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert read_model_shape(tmp_path) == ModelShape(
        architecture="Qwen3ForCausalLM",
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_size=80,
        vocab_size=64,
        max_positions=256,
        rms_norm_epsilon=1e-6,
        rope_theta=1e6,
        tied=True,
        dtype="bfloat16",
        eos_token_ids=(7, 9),
    )


def test_a_config_of_transformers_4_means_the_same(tmp_path: pathlib.Path) -> None:
    new = read_model_shape(write(tmp_path))
    old = write(tmp_path, rope_parameters=..., rope_theta=1e6, rope_scaling=None, dtype=..., torch_dtype="bfloat16")
    assert read_model_shape(old) == new


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4, "original_max_position_embeddings": 64}


def scaled(kind: Any, theta: float | None = 1e6, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **({} if theta is None else {"rope_theta": theta}), **values}}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("kind", "values", "scaling"),
    [
        ("default", {}, None),
        ("linear", {"factor": 2.0}, LinearScaling(factor=2.0)),
        ("llama3", LLAMA3, Llama3Scaling(**LLAMA3)),
        ("yarn", YARN, YarnScaling(factor=4.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0)),
        ("yarn", YARN | {"beta_fast": None, "beta_slow": 2}, YarnScaling(**YARN, beta_slow=2.0)),
    ],
)
def test_rope_is_read_alike_as_either_transformers_writes_it(
    tmp_path: pathlib.Path, architecture: str, kind: str, values: dict[str, Any], scaling: RopeScaling | None
) -> None:
    new = {"architectures": [architecture], **scaled(kind, **values)}
    old = {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": {"type": kind, **values}}
    both = {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": {"type": kind, "rope_type": kind, **values}}
    for changes in (new, new | old, new | both):
        shape = read_model_shape(write(tmp_path, **changes))
        assert (shape.rope_theta, shape.rope_scaling) == (1e6, scaling)
        assert isinstance(getattr(shape.rope_scaling, "factor", 1.0), float)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("absent", [..., None])
def test_heads_are_as_wide_as_the_model_allows_unless_config_says_otherwise(
    tmp_path: pathlib.Path, architecture: str, absent: Any
) -> None:
    assert read_model_shape(write(tmp_path, architectures=[architecture], head_dim=absent)).head_dim == 8
    assert read_model_shape(write(tmp_path, architectures=[architecture])).head_dim == 16
    with pytest.raises(ConfigError, match=r"hidden_size \(32\) must be a multiple of num_attention_heads \(6\)"):
        read_model_shape(write(tmp_path, architectures=[architecture], head_dim=absent, num_attention_heads=6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen3MoeForCausalLM"]},
            r"one of \['LlamaForCausalLM', 'Qwen2ForCausalLM', 'Qwen3ForCausalLM'\], got \['Qwen3MoeForCausalLM'\]",
        ),
        ({"architectures": ...}, "got None"),
        ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "must be one of"),
        ({"rope_parameters": ...}, "expected one rope_theta"),
        (scaled("llama3", theta=None, **LLAMA3), "expected one rope_theta"),
        (scaled("default", theta="10000"), "rope_theta must be a positive float, got '10000'"),
        ({"rope_scaling": {"type": "yarn", **YARN}}, "rope_scaling and rope_parameters are both set"),
        ({"rope_parameters": ["llama3"]}, r"rope_parameters must be a JSON object, got \['llama3'\]"),
        (
            scaled("dynamic", factor=2.0),
            r"asks for 'dynamic'; the learner has \['default', 'linear', 'llama3', 'yarn'\]",
        ),
        (scaled("longrope", factor=2.0), "asks for 'longrope'"),
        (scaled(["yarn"], **YARN), r"asks for \['yarn'\]"),
        (scaled("linear", type="yarn", factor=2.0), "asks for 'linear' and 'yarn'"),
        (scaled("linear"), "factor must be a positive float, got None"),
        (scaled("linear", factor=2), r"factor must be written as 2\.0, or SGLang refuses the model"),
        (scaled("linear", factor=0.0), "factor must be a positive float, got 0.0"),
        (scaled("linear", factor=float("inf")), "factor must be a positive float, got inf"),
        (scaled("linear", factor=float("nan")), "factor must be a positive float, got nan"),
        (scaled("llama3", factor=8.0), "low_freq_factor must be a positive float, got None"),
        (scaled("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor must be above low_freq_factor"),
        (
            scaled("llama3", **LLAMA3 | {"original_max_position_embeddings": 64.0}),
            "original_max_position_embeddings must be a positive int, got 64.0",
        ),
        (scaled("default", factor=2.0), r"of type 'default' has \['factor'\]"),
        (scaled("default", partial_rotary_factor=0.5), r"has \['partial_rotary_factor'\]"),
        (scaled("default", mrope_section=[16, 24, 24]), r"has \['mrope_section'\]"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
            "expected one rope_theta",
        ),
        ({"rope_parameters": {"full_attention": {}}, "rope_theta": 1e4}, r"has \['full_attention'\]"),
        (scaled("yarn", **YARN, attention_factor=1.2), r"has \['attention_factor'\]"),
        (scaled("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0), r"has \['mscale', 'mscale_all_dim'\]"),
        (scaled("yarn", **YARN, truncate=False), r"has \['truncate'\]"),
        (scaled("yarn", **YARN, beta_fast=1.0), "beta_fast must be above beta_slow"),
        (scaled("yarn", factor=4.0), "original_max_position_embeddings must be a positive int, got None"),
        ({**scaled("yarn", **YARN), "max_position_embeddings": 257}, r"at most factor \* original.* = 256, .* got 257"),
        ({**scaled("llama3", **LLAMA3), "original_max_position_embeddings": 32}, "must be None, got 32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias must be False, got True"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"architectures": ["LlamaForCausalLM"], "bias": True}, "bias must be False, got True"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rope_theta": 5.0}, r"expected one rope_theta .*\[5\.0, 1000000\.0\]"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"hidden_size": "32"}, "hidden_size must be a positive int, got '32'"),
        ({"head_dim": ...}, "head_dim must be a positive int, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, got 0"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_shape(write(tmp_path, **changes))


def test_a_folder_without_a_model_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="Hugging Face directory"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_model_shape(tmp_path)


def test_the_shape_is_read_without_torch() -> None:
    code = (
        "import sys, engines.megatron.model_shape; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
