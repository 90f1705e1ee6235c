"""megatron-core's GPTModel for a checkpoint: configuration, and the weights that are this process's part."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from engines.megatron import core, world
from engines.megatron.attention import PackedAttention
from engines.megatron.holdings import holdings
from engines.megatron.huggingface import checked_tensors
from engines.megatron.model_shape import ModelShape
from engines.megatron.options import check_options, fields_of
from engines.megatron.parallel_sizes import check_division
from engines.megatron.shards import put, shards, take
from stream_rl.errors import ConfigError, EngineError

_OURS_BY_REASON = {
    "it comes from the model's config.json": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        layernorm_epsilon gated_linear_unit activation_func add_bias_linear add_qkv_bias qk_layernorm
        params_dtype pipeline_dtype bf16 fp16 num_moe_experts multi_latent_attention""",
    "it needs TransformerEngine's attention, which the learner does not use": """
        context_parallel_size hierarchical_context_parallel_sizes cp_comm_type""",
    "the learner has dense models only": "expert_model_parallel_size expert_tensor_parallel_size",
    "all pipeline stages have equally many layers, in one piece": """
        virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split pipeline_model_parallel_layout""",
    "it follows from learner.ddp": "no_sync_func grad_sync_func param_sync_func",
    "the whole normalization is in the batch's loss weights": """
        calculate_per_token_loss finalize_model_grads_func grad_scale_func""",
    "the learner packs sequences, and has its own attention without dropout": """
        attention_dropout hidden_dropout variable_seq_lengths window_size softmax_type""",
}
_DDP_KNOWN = {
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "align_param_gather",
    "grad_reduce_in_fp32",
    "bucket_size",
    "pad_buckets_for_high_nccl_busbw",
}
_DDP_OURS = {
    **dict.fromkeys(
        ("check_for_nan_in_grad", "check_for_large_grads"), "the learner skips a step whose gradient is not finite"
    ),
    "average_in_collective": "the whole normalization is in the batch's loss weights",
}
_OURS = {name: reason for reason, names in _OURS_BY_REASON.items() for name in names.split()}


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **keywords: Any) -> None:
    """megatron-core's reduction without its division by the number of tokens: the step's gradient is a plain sum."""
    core.finalize_model_grads(model, None, **keywords)


def transformer_config(shape: ModelShape, options: Mapping[str, Any]) -> Any:
    """megatron-core's TransformerConfig for `shape` with the recipe's `[learner.model]`.

    Raises ConfigError for options that are unknown, ours, of a wrong type, or that megatron-core refuses.
    """
    checked = check_options("learner.model", options, fields_of(core.TransformerConfig), _OURS)
    check_division(shape, checked)
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
        "add_qkv_bias": shape.family.qkv_bias,
        "qk_layernorm": shape.family.qk_norm,
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
        # gloo has no batches of messages, and nothing to wait for after one
        **({"batch_p2p_comm": False, "batch_p2p_sync": False} if core.ON_CPU else {}),
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


class ValueHead(torch.nn.Module):
    """An output layer of one number a token, which begins at 0."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._gathers = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        """[t, 1, hidden] -> [t, 1, 1], as megatron-core calls an output layer."""
        if self._gathers:
            # every rank goes on with all tokens, and so has their whole gradient
            hidden = core.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return torch.nn.functional.linear(hidden, self.weight), None


class RMSNorm(torch.nn.RMSNorm):
    """torch's; megatron-core's own wrapper of it refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # Of the gradients that megatron-core sums over tensor-parallel ranks, as each has seen a part of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def build_model(shape: ModelShape, config: Any, weights: Mapping[str, Tensor]) -> Any:
    """This process's part of the GPTModel of the local spec with our attention, holding the checkpoint's `weights`.

    Raises WeightsError if they do not fit `shape`.
    """
    here = world.here()
    place = world.place(shape, here)
    spec = core.get_gpt_layer_local_spec(qk_layernorm=shape.family.qk_norm, normalization="RMSNorm")
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if shape.family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = core.GPTModel(
        config=config,
        transformer_layer_spec=core.TransformerBlockSubmodules([spec] * (place.num_layers or 0), RMSNorm),
        vocab_size=place.padded_vocab,
        max_sequence_length=shape.max_positions,
        pre_process=place.first_stage,
        post_process=place.last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",  # PackedAttention applies RoPE
    )
    if shape.value_head and place.last_stage:
        model.output_layer = ValueHead(config)
    _mark_parallel(model)
    model = model.to(here.device)
    if config.bf16:
        model = model.bfloat16()
    load_parameters(model, shape, weights)
    return core.Float16Module(config, model) if config.bf16 else model


def _mark_parallel(model: torch.nn.Module) -> None:
    """Say of each weight that tensor parallelism cuts that it is cut: megatron-core leaves that to its initialization,
    which we skip, and would then take it for replicated, and count a part of it in the gradient's norm."""
    kinds = core.ColumnParallelLinear, core.RowParallelLinear, core.VocabParallelEmbedding
    for module in model.modules():
        if isinstance(module, kinds) and module.weight is not None:
            module.weight.tensor_model_parallel = True


def load_parameters(model: torch.nn.Module, shape: ModelShape, weights: Mapping[str, Tensor]) -> None:
    """Set every parameter of `model` from the checkpoint's `weights`.  Raises WeightsError if they do not fit."""
    held = holdings(shape, world.place(shape, world.here())).held
    parameters = dict(model.named_parameters())
    if unknown := parameters.keys() ^ held.keys():
        raise EngineError(
            f"megatron-core's model and engines/megatron/layout.py differ in their parameters: {sorted(unknown)[:5]} "
            f"({len(unknown)}); the layout must learn them"
        )
    get = checked_tensors(shape, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            flat = parameter.view(-1)
            if sum(box.count * box.width for box in held[name]) != flat.numel():
                flat.zero_()  # rows that pad the vocabulary
            for shard in shards(held[name], 0, flat.numel()):
                put(shard.here, take(shard.there, get(shard.name).view(-1)).to(flat.device), flat)


def wrap(model: Any, options: Mapping[str, Any]) -> Any:
    """megatron-core's DDP with the recipe's `[learner.ddp]`: gradients accumulate in float32 buffers.

    Raises ConfigError for options that are unknown, ours, or of a wrong type.
    """
    known = fields_of(core.DistributedDataParallelConfig)
    ours = dict.fromkeys(known.keys() - _DDP_KNOWN, "it is not tried with this learner") | _DDP_OURS
    settings = {"grad_reduce_in_fp32": True} | check_options("learner.ddp", options, known, ours)
    if settings.get("overlap_param_gather") and not settings.get("use_distributed_optimizer"):
        raise ConfigError("learner.ddp.overlap_param_gather needs learner.ddp.use_distributed_optimizer = true")
    wrapped = core.DistributedDataParallel(model.config, core.DistributedDataParallelConfig(**settings), model)
    model.config.no_sync_func = wrapped.no_sync if wrapped.ddp_config.overlap_grad_reduce else None
    return wrapped


def synchronize(wrapped: Any) -> None:
    """Make the parameters those of the last step on every rank.

    With overlap_param_gather the next forward gathers them: until then what other ranks have stepped is one step old.
    """
    ddp = getattr(wrapped, "ddp_config", None)
    if ddp is not None and ddp.use_distributed_optimizer and ddp.overlap_param_gather:
        wrapped.disable_forward_pre_hook(param_sync=True)
        wrapped.enable_forward_pre_hook()
