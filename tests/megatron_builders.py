"""Learners of a tiny model, and batches of random tokens for them."""

import pathlib
from typing import Any

import numpy as np
from huggingface_reference import OPTIMIZER

from algorithms.denominators import TokenKinds, loss_weights
from algorithms.losses import make_loss
from engines.megatron.learner import MegatronLearner
from stream_rl.config import Algorithm, Learner
from stream_rl.types import TrainingBatch

LENGTHS = [33, 7, 20, 50, 12, 12, 40, 5, 64, 3]
PPO = make_loss("ppo_clip", Algorithm())
TEMPERATURE = 0.7


def make_learner(directory: pathlib.Path, micro_batch_tokens: int = 100, **changes: Any) -> MegatronLearner:
    section = Learner(micro_batch_tokens=micro_batch_tokens, **({"optimizer": OPTIMIZER} | changes))
    return MegatronLearner(directory, section, seed=0)


def make_batch(
    seed: int, lengths: list[int] = LENGTHS, aggregation: str = "token_mean", vocabulary: int = 64
) -> TrainingBatch:
    """Random tokens; a first fifth of each sequence is context, and a tenth of the rest is masked."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    sampled = np.concatenate([np.arange(n) >= max(1, n // 5) for n in lengths])
    trained = sampled & (random.random(tokens) > 0.1)
    kinds = TokenKinds(lengths=np.array(lengths, dtype=np.int32), sampled=sampled, trainable=trained)
    return TrainingBatch(
        token_ids=random.integers(0, vocabulary, tokens).astype(np.int32),
        lengths=np.array(lengths, dtype=np.int32),
        behavior_logprobs=np.where(trained, -random.exponential(4.0, tokens), 0.0).astype(np.float32),
        advantages=random.normal(size=tokens).astype(np.float32),
        loss_weights=loss_weights(aggregation, kinds, constant=100.0),
        temperature=TEMPERATURE,
    )
