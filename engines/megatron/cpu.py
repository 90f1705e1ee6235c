"""megatron-core without CUDA: an import hook that rewrites device names, and nothing else.

megatron-core's maths, process groups, schedules, DDP and optimizers are plain torch and run over gloo.  What stops them
on a CPU is that the device is a literal ("cuda", `torch.cuda.current_device()`, `.cuda()`, tensor type names).
`install` rewrites these in the listed modules as they are imported: no torch function is patched and no file changes,
so tracebacks keep their lines.  A listed module with nothing to rewrite is an ImportError, because then megatron-core
has changed and the list must be read again.  With CUDA, `install` does nothing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

import torch

_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"""device\s*=\s*(['"])cuda\1"""), 'device="cpu"'),
    (re.compile(r"torch\.cuda\.current_device\(\)"), '"cpu"'),
    (re.compile(r"""\.cuda\((?:non_blocking=True|"cpu")?\)"""), ""),
    (re.compile(r"'torch\.cuda\.(Float|Half|BFloat16)Tensor"), r"'torch.\1Tensor"),
    (re.compile(r"(?<== )torch\.cuda\.current_stream\(\)"), "None"),
    (re.compile(r"torch\.cuda\.synchronize\(\)"), "None"),
    # megatron-core's own switch from torch.compile to plain Python, which otherwise comes too late: after the import.
    (re.compile(r"^enable_jit_fuser\(\)$", re.MULTILINE), "disable_jit_fuser()"),
    (re.compile(r"torch\.cuda\.(get_rng_state|manual_seed)\("), r"torch.\1("),
    # Recomputation checks that the CPU's generator stood still while the GPU's ran; here they are one generator.
    (re.compile(r"if not torch\.all\(cpu_rng_state == torch\.get_rng_state\(\)\)\.item\(\):"), "if False:"),
)

_RANDOM = "megatron.core.tensor_parallel.random"
_RANDOM_STATE = """

def _get_cuda_rng_state(device=None, clone=False, graph_safe=False):
    return torch.get_rng_state()


def _set_cuda_rng_state(new_state, device=-1, graph_safe=False):
    torch.set_rng_state(new_state)
"""

_MODULES = """
distributed.distributed_data_parallel distributed.param_and_grad_buffer
jit models.common.embeddings.rope_utils models.common.embeddings.rotary_pos_embedding
models.common.language_module.language_module
optimizer.clip_grads optimizer.distrib_optimizer optimizer.grad_scaler optimizer.optimizer
pipeline_parallel.p2p_communication pipeline_parallel.schedules
tensor_parallel.layers tensor_parallel.mappings tensor_parallel.random tensor_parallel.utils
timers transformer.attention transformer.dot_product_attention transformer.module transformer.utils utils
"""
_REWRITTEN = frozenset(f"megatron.core.{name}" for name in _MODULES.split())

# megatron-core 0.19 imports triton here with no guard, on the way of `import megatron.core`; only MoE on CUDA uses it.
_NEEDS_TRITON = "megatron.core.transformer.moe.ops.paged_stash"


def rewrite(name: str, source: str) -> str:
    """The source of megatron-core's module `name` for the CPU.  Raises ImportError if there is nothing to rewrite."""
    total = 0
    for pattern, replacement in _REWRITES:
        source, count = pattern.subn(replacement, source)
        total += count
    if total == 0:
        raise ImportError(
            f"{name}: expected CUDA device names to rewrite for the CPU and found none; this megatron-core is not one "
            f"of 0.16 to 0.19. Install megatron-core 0.16.1, or bring engines/megatron/cpu.py up to date"
        )
    return source + _RANDOM_STATE if name == _RANDOM else source


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew each time: the cached bytecode is that of the unchanged source."""
        source = rewrite(fullname, self.get_data(self.path).decode())
        return compile(source, self.path, "exec", dont_inherit=True)


class _WithoutTriton(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names = {"GLOBAL_BLOCK_SIZE": 1024, "paged_stash_copy_kernel": None, "paged_stash_pop_kernel": None}
        vars(module).update(names)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _NEEDS_TRITON and importlib.util.find_spec("triton") is None:
            return importlib.machinery.ModuleSpec(fullname, _WithoutTriton())
        if fullname not in _REWRITTEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _RewritingLoader(fullname, spec.origin)
        return spec


def install() -> bool:
    """Make the next `import megatron.core` one for this CPU; with CUDA, nothing.  Returns whether the CPU is used.

    May be called again.  Raises ImportError if megatron.core came before it.
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return True
    if loaded := sorted(_REWRITTEN & sys.modules.keys()):
        raise ImportError(
            f"engines.megatron.cpu.install() must run before megatron.core is imported, but {loaded[0]} already is; "
            f"import megatron.core through engines.megatron.core"
        )
    sys.meta_path.insert(0, _Finder())
    return True
