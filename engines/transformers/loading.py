"""transformers' own model of a Hugging Face directory."""

import os
import pathlib
from typing import Any

from engines.sglang import cpu_shim


def library() -> Any:
    """The package itself, beside a torch for CPUs too, and without the network."""
    cpu_shim.declare_torchvision_operators()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers


def load_model(directory: str | pathlib.Path, attention: str = "sdpa") -> Any:
    """Its causal language model in the checkpoint's dtype, on the CPU.  attention: by transformers' own name."""
    transformers = library()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation=attention)
