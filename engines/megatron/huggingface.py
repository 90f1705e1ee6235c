"""Weights between a Hugging Face checkpoint and megatron-core's local spec: names and layouts, exact both ways.

Pure functions over tensors.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from engines.megatron.layout import EMBEDDING, FINAL_NORM, OUTPUT, layout
from engines.megatron.model_shape import ModelShape
from stream_rl.errors import WeightsError

_SAME_LAYOUT = (
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)
"""Of one layer: megatron-core's name, the checkpoint's name."""
_QKV = ("self_attention.linear_qkv.weight", tuple(f"self_attn.{part}_proj.weight" for part in "qkv"))
_GATE_UP = ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"))


def fuse_qkv(shape: ModelShape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[heads * d, h], [kv_heads * d, h] twice -> [(heads + 2 kv_heads) * d, h], interleaved by key head."""
    parts = [part.reshape(shape.kv_heads, -1, shape.head_dim, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors and their shapes, in its order."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm.weight": (shape.hidden_size,),
        "self_attn.q_proj.weight": (query, shape.hidden_size),
        "self_attn.k_proj.weight": (key, shape.hidden_size),
        "self_attn.v_proj.weight": (key, shape.hidden_size),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
        "self_attn.o_proj.weight": (shape.hidden_size, query),
        "post_attention_layernorm.weight": (shape.hidden_size,),
        "mlp.gate_proj.weight": (shape.ffn_size, shape.hidden_size),
        "mlp.up_proj.weight": (shape.ffn_size, shape.hidden_size),
        "mlp.down_proj.weight": (shape.hidden_size, shape.ffn_size),
    }
    expected: dict[str, tuple[int, ...]] = {EMBEDDING[1]: (shape.vocab_size, shape.hidden_size)}
    for index in range(shape.layers):
        expected |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    expected[FINAL_NORM[1]] = (shape.hidden_size,)
    if not shape.tied:
        expected[OUTPUT[1]] = (shape.vocab_size, shape.hidden_size)
    return expected


def to_megatron(shape: ModelShape, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """megatron-core's parameters, one at a time, from the checkpoint's tensors.

    Raises WeightsError if a tensor is missing, has another shape or dtype than config.json says, or is not known.
    """
    expected = expected_shapes(shape)
    # Checkpoints of tied models may hold the output layer as well; it is the embedding again.
    ignored = {OUTPUT[1]} if shape.tied else set()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys() - ignored)
    if missing or unknown:
        raise WeightsError(
            f"the checkpoint does not fit its config.json ({shape.architecture}, {shape.layers} layers): "
            f"missing {missing[:5]} ({len(missing)}), unknown {unknown[:5]} ({len(unknown)})"
        )

    def get(name: str) -> Tensor:
        tensor = weights[name]
        wanted = (getattr(torch, shape.dtype), expected[name])
        if (tensor.dtype, tuple(tensor.shape)) != wanted:
            raise WeightsError(
                f"{name}: config.json says {wanted[0]} {list(wanted[1])}, the checkpoint has "
                f"{tensor.dtype} {list(tensor.shape)}; convert the checkpoint or correct config.json"
            )
        return tensor

    yield EMBEDDING[0], get(EMBEDDING[1])
    for index in range(shape.layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        for name, checkpoint_name in _SAME_LAYOUT:
            yield ours + name, get(theirs + checkpoint_name)
        yield ours + _QKV[0], fuse_qkv(shape, *(get(theirs + part) for part in _QKV[1]))
        yield ours + _GATE_UP[0], torch.cat([get(theirs + part) for part in _GATE_UP[1]])
    yield FINAL_NORM[0], get(FINAL_NORM[1])
    if not shape.tied:
        yield OUTPUT[0], get(OUTPUT[1])


def to_huggingface(shape: ModelShape, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in `expected_shapes` order; inverse of `to_megatron`.

    Tensors alias `parameters` where the layout allows it.
    """
    boxes = {box.name: (box, name) for name, several in layout(shape).items() for box in several}
    for checkpoint_name, size in expected_shapes(shape).items():
        box, name = boxes[checkpoint_name]
        yield checkpoint_name, box.of(parameters[name].reshape(-1)).reshape(size)
