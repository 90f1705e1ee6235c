import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from engines.megatron.model_shape import ModelShape, read_model_shape
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"one of \['Qwen3ForCausalLM'\], got \['LlamaForCausalLM'\]"),
        ({"architectures": ...}, "got None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling asks for 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_parameters asks for 'llama3'"),
        ({"rope_parameters": ...}, "expected one rope_theta"),
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
