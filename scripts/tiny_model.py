"""A small model with random weights and a byte-level tokenizer, made on the spot.

The tokenizer has one token per byte and two special ones, so any text round-trips; transformers' AutoTokenizer and
AutoModelForCausalLM load the directory as it is.
"""

import json
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.megatron.model_shape import expected_shapes, read_model_shape

PAD, EOS = "<pad>", "<eos>"


def create(
    directory: str | pathlib.Path,
    *,
    architecture: str = "Qwen3ForCausalLM",
    seed: int = 0,
    hidden: int = 128,
    intermediate: int = 352,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    rope_theta: float = 1000.0,
    std: float = 0.05,
    max_positions: int = 4096,
) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    architecture: one of engines.megatron.model_shape.FAMILIES.  The same arguments give the same bytes.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    config = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": std,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        **ids,
    }
    _write(directory / "config.json", config)
    _write(directory / "generation_config.json", ids)
    write_tokenizer(directory, max_positions)
    save_file(_weights(directory, np.random.default_rng(seed), std), directory / "model.safetensors", {"format": "pt"})


def write_tokenizer(directory: pathlib.Path, max_positions: int) -> None:
    """tokenizer.json and tokenizer_config.json."""
    _tokenizer().save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
        },
    )


def _weights(directory: pathlib.Path, rng: np.random.Generator, std: float) -> dict[str, npt.NDArray[np.float32]]:
    """Norms 1, biases 0."""
    return {
        name: rng.normal(0, std, shape).astype(np.float32)
        if len(shape) > 1
        else np.full(shape, not name.endswith(".bias"), np.float32)
        for name, shape in expected_shapes(read_model_shape(directory)).items()
    }


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
