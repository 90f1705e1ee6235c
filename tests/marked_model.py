"""A Qwen3 whose version v can only say token v: every token's true version can be read off the token."""

import json
import pathlib

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 64, 2, 4, 2, 16, 128, 128


def shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        made |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            layer + "self_attn.q_norm.weight": (HEAD_DIM,),
            layer + "self_attn.k_norm.weight": (HEAD_DIM,),
            layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
            layer + "mlp.up_proj.weight": (FFN, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    if not tied:
        made["lm_head.weight"] = (VOCAB, HIDDEN)
    return made


def config(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 127,
        "pad_token_id": 126,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def random_weights(seed: int, tied: bool = False, scale: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else scale * torch.randn(shape, generator=generator)
        for name, shape in shapes(tied).items()
    }


def marked_weights(version: int) -> dict[str, torch.Tensor]:
    """Attention and MLP write nothing to the residual stream, every embedding is the same, and only row `version` of
    the head agrees with it: greedy decoding says `version` with certainty.  What does not matter changes as well."""
    weights = random_weights(version)
    weights["model.embed_tokens.weight"] = torch.ones(VOCAB, HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    head = -torch.ones(VOCAB, HIDDEN)
    head[version] = 1.0
    weights["lm_head.weight"] = head
    return weights


def write(directory: pathlib.Path, weights: dict[str, torch.Tensor]) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    tied, dtype = "lm_head.weight" not in weights, next(iter(weights.values())).dtype
    (directory / "config.json").write_text(json.dumps(config(tied, dtype)))
    save_file(weights, str(directory / "model.safetensors"), {"format": "pt"})
    return directory
