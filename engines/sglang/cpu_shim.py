"""What lets stock SGLang import on a machine without a GPU.  `install()` before the first `import sglang`.

Nothing that SGLang computes is replaced.  Three packages are needed at import time only:

- torchvision: PyPI's Linux wheel is a CUDA build whose C extension cannot load beside a CPU torch.  Its Python part
  imports once the two operators that only the extension declares have a schema.  `import transformers` with this
  torchvision installed needs the same.
- sgl_kernel: exists as a CUDA build only.  SGLang's CPU path imports some of its kernels by name and calls them only
  for features that are off here; each name becomes a function that raises.
- triton: 1 GB, and no kernel is launched on a CPU.  SGLang ships stand-ins for macOS (`_platform_stubs.py`, private:
  hence the pinned version); launching one raises.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

_libraries: list[Any] = []
"""Operator declarations last as long as their library object."""


def install() -> None:
    """Make `import sglang` and `import transformers` work; a no-op where CUDA or the real packages are."""
    import torch

    if torch.cuda.is_available():
        return
    declare_torchvision_operators()
    if "sgl_kernel" not in sys.modules and importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = _absent_kernels()
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        _install_triton_stand_in()


def declare_torchvision_operators() -> None:
    """Enough for torchvision's pure Python part to import without its extension."""
    import torch

    if torch.version.cuda is not None or _libraries or importlib.util.find_spec("torchvision") is None:
        return  # beside a CUDA build of torch the extension declares them itself
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _absent_kernels() -> types.ModuleType:
    class AbsentKernels(types.ModuleType):
        def __getattr__(self, name: str) -> Callable[..., Any]:
            if name.startswith("__"):
                raise AttributeError(name)

            def kernel(*_: Any, **__: Any) -> Any:
                raise NotImplementedError(f"sgl_kernel.{name} was called, and this machine has no sgl_kernel build")

            return kernel

    module = AbsentKernels("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__dict__["__version__"] = "0+absent"
    return module


def _install_triton_stand_in() -> None:
    # torch asks once whether triton is there and remembers: it must see the truth before a stand-in exists
    import torch._inductor.compile_fx
    import torch._inductor.runtime.triton_compat
    import torch.utils.flop_counter  # noqa: F401
    from torch.utils._triton import has_triton, has_triton_package

    assert not has_triton_package() and not has_triton()
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.submodule_search_locations
    path = f"{sglang.submodule_search_locations[0]}/_platform_stubs.py"
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", path)
    assert spec is not None and spec.loader is not None
    stubs: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)

    class Constexpr:
        def __init__(self, value: Any = None) -> None:
            self.value = value

    class Kernel:
        """What `@triton.jit` gives back here: defined, never launched."""

        def __init__(self, function: Callable[..., Any]) -> None:
            self.name = getattr(function, "__name__", "kernel")

        def __getitem__(self, grid: Any) -> Any:
            raise NotImplementedError(f"triton kernel {self.name} was launched on a machine without a GPU")

        __call__ = __getitem__

    def jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return Kernel if function is None else Kernel(function)

    sys.meta_path.insert(0, stubs._TritonFinder())
    triton = stubs._make_mock("triton")
    triton.__version__ = "3.0.0"
    triton.cdiv, triton.next_power_of_2, triton.Config = stubs._cdiv, stubs._next_power_of_2, stubs._Config
    triton.jit = jit
    triton.language = stubs._make_mock("triton.language")
    triton.language.constexpr = Constexpr
