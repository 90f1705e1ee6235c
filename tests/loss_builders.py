"""Micro-batches for losses, and every kind of policy loss with the formula of each, written plainly."""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from stream_rl.config import Algorithm

RATIO = Algorithm(importance="ratio", clip_high=0.28)
WIDE = {"token": (0.3, 3.0)}
SECTIONS = {
    "ppo_clip": RATIO,
    "dual_clip": dataclasses.replace(RATIO, loss="dual_clip", dual_clip=1.5),
    "gspo": dataclasses.replace(RATIO, loss="gspo"),
    "cispo": dataclasses.replace(RATIO, loss="cispo"),
    "uncorrected": Algorithm(importance="none"),
    "token_tis": Algorithm(),
    "sequence_tis": Algorithm(importance="sequence"),
    "geometric_tis": Algorithm(importance="geometric", importance_cap=1.1),
    "icepop": Algorithm(importance_cap=math.inf, masks=WIDE),
    "masked_is": Algorithm(importance="sequence", importance_cap=math.inf, masks={"sequence": (0.5, 2.0)}),
    "geometric_mask": Algorithm(masks={"geometric": (0.8, 1.3)}),
    "veto": Algorithm(masks={"veto": (0.4, math.inf)}),
    "masks_together": dataclasses.replace(RATIO, masks=WIDE | {"geometric": (0.6, 2.0), "veto": (0.05, 30.0)}),
    **{f"kl_{name}": Algorithm(kl_coefficient=0.3, kl_estimator=name) for name in ("k1", "k2", "k3")},
}


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Float64, but for the ids; all [t]."""

    logprobs: Tensor
    behavior: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: Tensor
    reference: Tensor

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """In the order that a loss takes them, without the log-probs."""
        return self.behavior, self.advantages, self.weights, self.sequences, self.reference

    def only(self, sequences: list[int]) -> "MicroBatch":
        """Some of the sequences, in that order, numbered from 0."""
        where = [torch.nonzero(self.sequences == sequence)[:, 0] for sequence in sequences]
        ids = torch.cat([torch.full_like(one, i) for i, one in enumerate(where)])
        taken = {f.name: getattr(self, f.name)[torch.cat(where)] for f in dataclasses.fields(self)}
        return MicroBatch(**(taken | {"sequences": ids}))


def micro_batch(seed: int, lengths: tuple[int, ...] = (9, 1, 14, 3, 8, 6)) -> MicroBatch:
    """Each sequence was sampled by several versions, the older ones further from the current policy; heads are masked,
    the fourth sequence wholly.  Weight and advantage are a sequence's own, as in every group-relative recipe."""
    random = np.random.default_rng(seed)
    parts = []
    for sequence, length in enumerate(lengths):
        masked = length if sequence == 3 else int(random.integers(0, max(length // 2, 1)))
        logprobs = -random.exponential(1.5, length)
        versions = np.sort(random.integers(0, 3, length))
        behavior = logprobs + random.normal(0, 1, length) * np.array([1.0, 0.5, 0.1])[versions]
        weights = np.where(np.arange(length) < masked, 0.0, random.random() + 0.1)
        reference = logprobs + random.normal(0, 0.5, length)
        parts.append((logprobs, behavior, np.full(length, random.normal()), weights, reference))
    columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    logprobs, behavior, advantages, weights, reference = columns
    ids = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    return MicroBatch(logprobs, behavior, advantages, weights, ids, reference)


def plain_loss(section: Algorithm, batch: MicroBatch, logprobs: list[float]) -> float:
    """The loss at `logprobs`, where those of the batch are the current policy's before the step: what a loss detaches.

    Sequence by sequence and token by token; GSPO in the form of its paper, with one ratio for a sequence.
    """
    frozen, behavior, advantages, weights, ids, reference = (
        getattr(batch, f.name).tolist() for f in dataclasses.fields(batch)
    )
    total = 0.0
    for sequence in sorted(set(ids)):
        trained = [t for t, one in enumerate(ids) if one == sequence and weights[t]]
        gaps = [frozen[t] - behavior[t] for t in trained]
        live = [logprobs[t] - behavior[t] for t in trained]
        of_sequence = {
            "sequence": math.exp(sum(gaps)),
            "geometric": math.exp(sum(gaps) / max(len(gaps), 1)),
            "none": 1.0,
            "ratio": 1.0,
        }
        for t, gap in zip(trained, gaps, strict=True):
            ratios = of_sequence | {"token": math.exp(gap)}
            factor = min(ratios[section.importance], section.importance_cap)
            for name, (low, high) in section.masks.items():
                judged = [math.exp(one) for one in gaps] if name == "veto" else [ratios[name]]
                if min(judged) < low or max(judged) > high:
                    factor = 0.0
            ratio = math.exp(logprobs[t] - (behavior[t] if section.importance == "ratio" else frozen[t]))
            low, high, advantage = 1 - section.clip_low, 1 + section.clip_high, advantages[t]
            if section.loss == "gspo":
                ratio = math.exp(sum(live) / len(live))
            objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if section.loss == "dual_clip" and advantage < 0:
                objective = max(objective, section.dual_clip * advantage)
            if section.loss == "cispo":
                objective = min(max(math.exp(gap), low), high) * advantage * logprobs[t]
            total -= weights[t] * factor * objective
            x = reference[t] - logprobs[t]
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[section.kl_estimator]
            total += weights[t] * section.kl_coefficient * kl
    return total
