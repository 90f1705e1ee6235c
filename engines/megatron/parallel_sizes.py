"""Whether a model and a number of processes can be cut as a recipe says.  No torch, so it is checked early."""

from collections.abc import Mapping
from typing import Any

from engines.megatron.model_shape import ModelShape
from stream_rl.errors import ConfigError

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def parallel_sizes(options: Mapping[str, Any]) -> tuple[int, int]:
    """Tensor and pipeline, of the recipe's `[learner.model]`.  Raises ConfigError for what is no size."""
    sizes = [options.get(name, 1) for name in (TENSOR, PIPELINE)]
    for name, size in zip((TENSOR, PIPELINE), sizes, strict=True):
        if type(size) is not int or size < 1:
            raise ConfigError(f"learner.model.{name} must be a positive int, got {size!r}")
    return sizes[0], sizes[1]


def check_processes(options: Mapping[str, Any], processes: int) -> None:
    """Raises ConfigError unless the processes can be divided by both sizes."""
    tensor, stages = parallel_sizes(options)
    if processes < 1 or processes % (tensor * stages):
        raise ConfigError(
            f"learner.processes = {processes} must be a multiple of learner.model.{TENSOR} * {PIPELINE} = "
            f"{tensor} * {stages}; the quotient is data-parallel"
        )


def check_division(shape: ModelShape, options: Mapping[str, Any]) -> None:
    """Raises ConfigError naming what of the model cannot be divided."""
    tensor, stages = parallel_sizes(options)
    for name, count, by, parts in (
        ("num_attention_heads", shape.heads, TENSOR, tensor),
        ("num_key_value_heads", shape.kv_heads, TENSOR, tensor),
        ("intermediate_size", shape.ffn_size, TENSOR, tensor),
        ("num_hidden_layers", shape.layers, PIPELINE, stages),
    ):
        if count % parts:
            raise ConfigError(f"learner.model.{by} = {parts} does not divide the model's {name} = {count}")
