"""megatron-core's GPTModel for a checkpoint: process groups, configuration, weights.

One process now, but built through megatron-core's own parallel state, DDP and schedules.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
import torch.nn.functional
from torch import Tensor

from engines.megatron import core
from engines.megatron.attention import PackedAttention
from engines.megatron.huggingface import to_megatron
from engines.megatron.model_shape import ModelShape
from engines.megatron.options import check_options, fields_of
from stream_rl.errors import ConfigError, EngineError

_OURS_BY_REASON = {
    "it comes from the model's config.json": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        layernorm_epsilon gated_linear_unit activation_func add_bias_linear add_qkv_bias qk_layernorm
        params_dtype pipeline_dtype bf16 fp16 num_moe_experts multi_latent_attention""",
    "the learner is one process": """
        tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size sequence_parallel""",
    "the whole normalization is in the batch's loss weights": """
        calculate_per_token_loss finalize_model_grads_func grad_scale_func""",
    "the learner packs sequences, and has its own attention without dropout": """
        attention_dropout hidden_dropout variable_seq_lengths window_size softmax_type""",
}
_OURS = {name: reason for reason, names in _OURS_BY_REASON.items() for name in names.split()}


def device() -> torch.device:
    return torch.device("cpu") if core.ON_CPU else torch.device("cuda", torch.cuda.current_device())


def initialize(seed: int) -> None:
    """Process groups of one process and megatron-core's random state.  May be called again, with another seed."""
    if not torch.distributed.is_initialized():
        # A store in memory needs no port, so learners on one machine cannot collide.
        torch.distributed.init_process_group(
            "gloo" if core.ON_CPU else "nccl",
            store=torch.distributed.HashStore(),  # type: ignore[attr-defined]  # documented, but not in __all__
            rank=0,
            world_size=1,
        )
    if (size := torch.distributed.get_world_size()) != 1:
        raise EngineError(f"the learner is one process, but torch.distributed has {size}; start it without torchrun")
    if not core.parallel_state.model_parallel_is_initialized():
        core.parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    core.model_parallel_cuda_manual_seed(seed)


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **keywords: Any) -> None:
    """megatron-core's reduction without its division by the number of tokens: the step's gradient is a plain sum."""
    core.finalize_model_grads(model, None, **keywords)


def transformer_config(shape: ModelShape, options: Mapping[str, Any]) -> Any:
    """megatron-core's TransformerConfig for `shape` with the recipe's `[learner.model]`.

    Raises ConfigError for options that are unknown, ours, of a wrong type, or that megatron-core refuses.
    """
    checked = check_options("learner.model", options, fields_of(core.TransformerConfig), _OURS)
    dtype = getattr(torch, shape.dtype)
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.rms_norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": core.ON_CPU,
        "perform_initialization": False,  # every parameter is loaded
        # Each of these needs a CUDA extension of TransformerEngine or Apex.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        # torch.compile: worth turning on for a GPU, in the recipe.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "cross_entropy_loss_fusion": False,
        # megatron-core checks this of dense models too when sequence lengths vary.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Gradients are summed over micro-batches and ranks, and then divided by nothing: see _sum_gradients.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _sum_gradients,
    }
    try:
        with warnings.catch_warnings():
            # Of its own default; not said of a scope that the recipe sets.
            warnings.filterwarnings("ignore", message="full scope is deprecated")
            return core.TransformerConfig(**(settings | checked))
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses [learner.model] {dict(options)}: {error}") from error


def build_model(shape: ModelShape, config: Any, weights: Mapping[str, Tensor]) -> Any:
    """GPTModel of the local spec with our attention, holding the checkpoint's `weights`.

    Raises WeightsError if they do not fit `shape`.
    """
    spec = core.get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    model = core.GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_positions,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",  # PackedAttention applies RoPE
    ).to(device())
    if config.bf16:
        model = model.bfloat16()
    load_parameters(model, shape, weights)
    return core.Float16Module(config, model) if config.bf16 else model


def load_parameters(model: torch.nn.Module, shape: ModelShape, weights: Mapping[str, Tensor]) -> None:
    """Set every parameter of `model` from the checkpoint's `weights`.  Raises WeightsError if they do not fit."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in to_megatron(shape, weights):
            parameters.pop(name).copy_(tensor)
    if parameters:
        raise EngineError(
            f"megatron-core's model has parameters that no checkpoint tensor sets: {sorted(parameters)}; "
            f"the mapping in engines/megatron/huggingface.py must learn them"
        )


def wrap(model: Any) -> Any:
    """megatron-core's DDP: gradients accumulate in float32 buffers."""
    config = core.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=False,
        check_for_nan_in_grad=False,  # the learner skips such a step; megatron-core would end the process
    )
    return core.DistributedDataParallel(model.config, config, model)


def synchronize(wrapped: Any) -> None:
    """Make the parameters those of the last step on every rank.

    With overlap_param_gather the next forward gathers them: until then what other ranks have stepped is one step old.
    """
    if wrapped.ddp_config.use_distributed_optimizer and wrapped.ddp_config.overlap_param_gather:
        wrapped.disable_forward_pre_hook(param_sync=True)
        wrapped.enable_forward_pre_hook()
