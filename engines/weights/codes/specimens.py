"""Weights to measure the codes on: of a small language model that is trained here, and made up of any size.

The model is trained as large ones are: bf16 weights that compute, fp32 master weights that AdamW moves, and a learning
rate at which most steps move a weight by less than half of its last place.
"""

import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from engines.weights.codes.changes import Change, Known
from engines.weights.codes.ulp import diff
from engines.weights.fingerprint import bits_of
from stream_rl.types import ByteArray

WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 320, 5, 5, 864, 256
"""6.4 million elements."""
SEQUENCES, LENGTH = 4, 64
BETAS, EPSILON, DECAY, CLIP = (0.9, 0.98), 1e-8, 0.1, 1.0
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Training:
    """How far to train before what is measured."""

    first_steps: int = 60
    """At `first_lr`, falling to 0, so that the weights are no longer what they were drawn as, and have settled."""
    first_lr: float = 1e-3
    warm_up: int = 24
    """Steps at the rate that is measured: the first ones of an optimizer move weights three times as often."""
    measured: int = 4
    seed: int = 0


def use_one_core() -> None:
    """For everything that torch does in this process from here on."""
    torch.set_num_threads(1)


def training_snapshots(lr: float, start: Weights, training: Training) -> Iterator[Weights]:
    """bf16 weights at `measured` + 1 successive steps at `lr`, from `start`, after the warm-up."""
    rates = [lr] * (training.warm_up + training.measured)
    for step, weights in enumerate(_train(start, rates, _batches(training.seed + 1))):
        if step >= training.warm_up:
            yield {name: weight.bfloat16() for name, weight in weights.items()}


def trained(training: Training) -> Weights:
    """fp32 weights after the first steps."""
    rates = training.first_lr * np.linspace(1, 0, training.first_steps)
    *_, last = _train(_drawn(training.seed), rates.tolist(), _batches(training.seed))
    return last


def made_up(elements: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 bits before and after, flat: normal weights, each moved by a normal distance, rounded at random, of such a
    scale that about `share` of them change."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(elements, dtype=np.float32) * np.float32(0.02)
    old = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    places = np.exp2(134 - np.maximum((old.astype(np.int32) & 0x7FFF) >> 7, 64), dtype=np.float32)
    """Of the last bit, in one unit."""
    places *= np.abs(rng.standard_normal(elements, dtype=np.float32))
    distance = np.float32(share) / places[: 1 << 20].mean() if elements else np.float32(0)
    for _ in range(8):  # a weight below the distance moves once, whatever the distance, so the share falls short
        distance *= np.float32(share / np.minimum(distance * places[: 1 << 20], 1).mean()) if elements else 1
    steps = np.floor(np.minimum(distance * places, 1 << 14) + rng.random(elements, dtype=np.float32)).astype(np.int32)
    ordinals = old.astype(np.int32) ^ np.where(old < 0, 0x7FFF, 0)
    ordinals += np.where(rng.random(elements, dtype=np.float32) < 0.5, -steps, steps)
    new = ordinals.astype(np.int16)
    new ^= np.where(new < 0, np.int16(0x7FFF), np.int16(0))
    return torch.from_numpy(old), torch.from_numpy(new)


def bits(weights: Weights) -> list[torch.Tensor]:
    return [bits_of(weight).reshape(-1) for weight in weights.values()]


def change(old: torch.Tensor, new: torch.Tensor) -> Change:
    """Between two bit patterns of a bf16 tensor."""
    return Change(torch.bfloat16, diff(old, new), old, new)


def known(old: torch.Tensor) -> Known:
    return Known(torch.bfloat16, old.numel(), old)


def _train(start: Weights, rates: Sequence[float], batches: Iterator[torch.Tensor]) -> Iterator[Weights]:
    """The master weights before the first step and after each, one learning rate a step.  The gradient is taken at
    their bf16 roundings."""
    master = {name: weight.clone() for name, weight in start.items()}
    optimizer = torch.optim.AdamW(master.values(), betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    yield master
    for rate, batch in zip(rates, batches, strict=False):
        weights = {name: weight.bfloat16().float().requires_grad_() for name, weight in master.items()}
        _loss(weights, batch).backward()  # type: ignore[no-untyped-call]
        for name, weight in master.items():
            weight.grad = weights[name].grad
        torch.nn.utils.clip_grad_norm_(master.values(), CLIP)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        yield master


def _drawn(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (VOCABULARY, WIDTH), "head": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"{layer}.{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
        shapes |= {f"{layer}.{name}": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.down": (WIDTH, INNER), f"{layer}.norm_1": (WIDTH,), f"{layer}.norm_2": (WIDTH,)}
    return {
        name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def _loss(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of `tokens` [sequences, length + 1]."""
    x = weights["embed"][tokens[:, :-1]]
    for layer in range(LAYERS):
        w = {name: weights[f"{layer}.{name}"] for name in ("q", "k", "v", "o", "gate", "up", "down")}
        h = functional.rms_norm(x, (WIDTH,), weights[f"{layer}.norm_1"])
        q, k, v = ((h @ w[name].T).view(*h.shape[:2], HEADS, -1).transpose(1, 2) for name in ("q", "k", "v"))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ w["o"].T
        h = functional.rms_norm(x, (WIDTH,), weights[f"{layer}.norm_2"])
        x = x + (functional.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
    logits = functional.rms_norm(x, (WIDTH,), weights["norm"]) @ weights["head"].T
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _batches(seed: int) -> Iterator[torch.Tensor]:
    """Bytes of Python's own library, cut at random."""
    text = _text()
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, text.size - LENGTH - 1, SEQUENCES)
        yield torch.from_numpy(np.stack([text[start : start + LENGTH + 1] for start in starts])).long()


def _text() -> ByteArray:
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "ast.py", "datetime.py", "decimal.py", "inspect.py", "typing.py")
    return np.frombuffer(
        b"".join((library / name).read_bytes() for name in names if (library / name).exists()), np.uint8
    )
