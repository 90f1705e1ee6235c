"""A tiny random model of transformers, and its numbers: what the learner is compared with."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Sandboxes (gVisor) let the CPU claim AMX and then stop the process at its first tile, in any bfloat16 product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's wheel is a CUDA build, which cannot load here; transformers only needs these two schemas declared.
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers

from stream_rl.types import TrainingBatch

LR, WEIGHT_DECAY, EPSILON, CLIP = 1e-3, 0.1, 1e-6, 0.5
OPTIMIZER = {
    "lr": LR,
    "weight_decay": WEIGHT_DECAY,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    # 1e-8 would turn gradients at rounding level into whole steps.
    "adam_eps": EPSILON,
    "clip_grad": CLIP,
}


def write_random_model(directory: pathlib.Path, architecture: str = "Qwen3ForCausalLM", **changes: Any) -> Any:
    """Write a Hugging Face directory; returns transformers' own model of it, in float32.

    changes: of its config; ... leaves a key out.
    """
    model_class = getattr(transformers, architecture)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "rope_theta": 5000.0,
        "dtype": "float32",
    }
    dtype = changes.pop("dtype", "float32")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{k: v for k, v in (sizes | changes).items() if v is not ...}))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases off 1 and 0, sharper logits than a fresh model's
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.08))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return model.float()


def reference_logprobs(model: Any, token_ids: np.ndarray, temperature: float) -> Tensor:
    """[t] log-prob of each token given those before it; 0 for the first.  One unpadded sequence."""
    ids = torch.from_numpy(token_ids.astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, :-1].float() / temperature
    logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), logprobs])


def sequences_of(batch: TrainingBatch) -> list[np.ndarray]:
    return np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1])


def largest_logprob_difference(learner: Any, reference: Any, batch: TrainingBatch) -> float:
    sequences = sequences_of(batch)
    got = learner.logprobs(sequences, batch.temperature)
    with torch.no_grad():
        wanted = [reference_logprobs(reference, ids, batch.temperature).numpy() for ids in sequences]
    return max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))


def reference_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: TrainingBatch, loss: Callable[..., Any]
) -> tuple[float, float]:
    """A step on transformers' log-probs, sequence by sequence, with no packing: its loss and gradient norm."""
    optimizer.zero_grad()
    logprobs = torch.cat([reference_logprobs(model, ids, batch.temperature) for ids in sequences_of(batch)])
    fields = (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
    sequence = torch.from_numpy(np.repeat(np.arange(len(batch.lengths)), batch.lengths))
    value, _ = loss(logprobs, *(torch.from_numpy(field) for field in fields), sequence)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return value.item(), norm.item()


def reference_optimizer(model: Any) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPSILON, weight_decay=WEIGHT_DECAY)
