"""Weights between a Hugging Face checkpoint and megatron-core's local spec: names and layouts, exact both ways.

Pure functions over tensors.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from engines.megatron.layout import EMBEDDING, FINAL_NORM, OUTPUT, VALUE_HEAD, layout
from engines.megatron.model_shape import ModelShape, expected_shapes
from stream_rl.errors import WeightsError

_SAME_LAYOUT = (
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)
"""Of one layer: megatron-core's name, the checkpoint's name."""
_QK_NORM = tuple((f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm.weight") for part in "qk")
_GATE_UP = ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"))


def fuse_qkv(shape: ModelShape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[heads * d, h], [kv_heads * d, h] twice -> [(heads + 2 kv_heads) * d, h], interleaved by key head.

    Biases have no h.
    """
    parts = [part.reshape(shape.kv_heads, -1, shape.head_dim, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def checked_tensors(shape: ModelShape, weights: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """The checkpoint's tensors by name, each looked at when it is asked for.

    Raises WeightsError, at once, if one is missing or not known; and of one that is asked for, if it has another shape
    or dtype than config.json says.
    """
    expected = expected_shapes(shape)
    # Checkpoints of tied models may hold the output layer as well; it is the embedding again.  A critic has none, and
    # its value head begins at 0 in a checkpoint of a policy.
    ignored = {OUTPUT[1]} if shape.tied or shape.value_head else set()
    missing = sorted(expected.keys() - weights.keys() - {VALUE_HEAD[1]})
    unknown = sorted(weights.keys() - expected.keys() - ignored)
    if missing or unknown:
        raise WeightsError(
            f"the checkpoint does not fit its config.json ({shape.architecture}, {shape.layers} layers): "
            f"missing {missing[:5]} ({len(missing)}), unknown {unknown[:5]} ({len(unknown)})"
        )

    def get(name: str) -> Tensor:
        if name == VALUE_HEAD[1] and name not in weights:
            return torch.zeros(expected[name], dtype=getattr(torch, shape.dtype))
        tensor = weights[name]
        wanted = (getattr(torch, shape.dtype), expected[name])
        if (tensor.dtype, tuple(tensor.shape)) != wanted:
            raise WeightsError(
                f"{name}: config.json says {wanted[0]} {list(wanted[1])}, the checkpoint has "
                f"{tensor.dtype} {list(tensor.shape)}; convert the checkpoint or correct config.json"
            )
        return tensor

    return get


def to_megatron(shape: ModelShape, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """megatron-core's parameters, one at a time, from the checkpoint's tensors.

    Raises WeightsError if a tensor is missing, has another shape or dtype than config.json says, or is not known.
    """
    get = checked_tensors(shape, weights)
    yield EMBEDDING[0], get(EMBEDDING[1])
    for index in range(shape.layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        for name, checkpoint_name in _SAME_LAYOUT + (_QK_NORM if shape.family.qk_norm else ()):
            yield ours + name, get(theirs + checkpoint_name)
        for kind in shape.family.qkv_tensors:
            parts = (get(f"{theirs}self_attn.{part}_proj.{kind}") for part in "qkv")
            yield f"{ours}self_attention.linear_qkv.{kind}", fuse_qkv(shape, *parts)
        yield ours + _GATE_UP[0], torch.cat([get(theirs + part) for part in _GATE_UP[1]])
    yield FINAL_NORM[0], get(FINAL_NORM[1])
    if shape.value_head:
        yield VALUE_HEAD[0], get(VALUE_HEAD[1])
    elif not shape.tied:
        yield OUTPUT[0], get(OUTPUT[1])


def to_huggingface(shape: ModelShape, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in `expected_shapes` order; inverse of `to_megatron`.

    Tensors alias `parameters` where the layout allows it.
    """
    boxes = {box.name: (box, name) for name, several in layout(shape).items() for box in several}
    for checkpoint_name, size in expected_shapes(shape).items():
        box, name = boxes[checkpoint_name]
        yield checkpoint_name, box.of(parameters[name].reshape(-1)).reshape(size)
