"""The parts of megatron-core that we use: the only place that imports it, so that the CPU's hook is always first."""

import warnings

from engines.megatron import cpu

ON_CPU = cpu.install()

with warnings.catch_warnings():
    # Six warnings that TransformerEngine and Apex are absent; the local spec is meant to do without them.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", category=UserWarning)
    from megatron.core import parallel_state as parallel_state
    from megatron.core.distributed import DistributedDataParallel as DistributedDataParallel
    from megatron.core.distributed import DistributedDataParallelConfig as DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize_model_grads
    from megatron.core.models.gpt import GPTModel as GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig as OptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer as get_megatron_optimizer
    from megatron.core.optimizer import get_standard_config_overrides as get_standard_config_overrides
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Float16OptimizerWithFloat16Params
    from megatron.core.optimizer.optimizer import FP32Optimizer as FP32Optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler as OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams as PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func as get_forward_backward_func
    from megatron.core.tensor_parallel import ColumnParallelLinear as ColumnParallelLinear
    from megatron.core.tensor_parallel import RowParallelLinear as RowParallelLinear
    from megatron.core.tensor_parallel import VocabParallelEmbedding as VocabParallelEmbedding
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region as gather_from_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel import get_cuda_rng_tracker as get_cuda_rng_tracker
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed as model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module as Float16Module
    from megatron.core.transformer.module import MegatronModule as MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules as TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig as TransformerConfig
