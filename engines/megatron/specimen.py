"""Random models of a given size, to measure with."""

import dataclasses
import json
import pathlib
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.checkpoint import write_tensors
from engines.megatron.model_shape import ModelShape, expected_shapes

QWEN3 = ModelShape(
    architecture="Qwen3ForCausalLM",
    hidden_size=1024,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ffn_size=3072,
    vocab_size=151936,
    max_positions=32768,
    rms_norm_epsilon=1e-6,
    rope_theta=1e6,
    tied=True,
    dtype="bfloat16",
    eos_token_ids=(151645,),
)
"""Qwen3-0.6B's."""


def sized(hidden: int, layers: int, vocab: int) -> ModelShape:
    """Of QWEN3's proportions."""
    heads = max(hidden // 64, 2)
    return dataclasses.replace(
        QWEN3, hidden_size=hidden, layers=layers, heads=heads, kv_heads=heads // 2, ffn_size=3 * hidden,
        head_dim=min(hidden, QWEN3.head_dim), vocab_size=vocab, eos_token_ids=(1,),
    )  # fmt: skip


def write(directory: pathlib.Path, shape: ModelShape, seed: int = 0) -> None:
    """A Hugging Face directory with weights of a fresh model's distribution, made one tensor at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [shape.architecture],
        "model_type": shape.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "dtype": shape.dtype,
        "eos_token_id": list(shape.eos_token_ids),
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory, "model", _tensors(shape, seed))


def device_name() -> str:
    return platform.processor() or platform.machine() if core.ON_CPU else torch.cuda.get_device_name()


def _tensors(shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    for name, size in expected_shapes(shape).items():
        values = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=chance) * 0.02
        yield name, values.to(getattr(torch, shape.dtype))
