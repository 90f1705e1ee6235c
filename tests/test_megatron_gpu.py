"""On a GPU: what a step changed, found there and brought to the host beside the next step."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from algorithms.losses import make_loss
from engines.megatron import changes, found, specimen
from engines.megatron.learner import MegatronLearner
from engines.weights.codes.ulp import diff
from engines.weights.fingerprint import bits_of
from engines.weights.parts import apply_
from stream_rl.config import Algorithm, Learner
from stream_rl.types import TrainingBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def batch(seed: int) -> TrainingBatch:
    chance = np.random.default_rng(seed)
    weights = np.full(512, 1 / 511, np.float32)
    weights[0] = 0.0
    return TrainingBatch(
        token_ids=chance.integers(0, 1000, 512).astype(np.int32),
        lengths=np.array([512], np.int32),
        behavior_logprobs=np.full(512, -7.0, np.float32),
        advantages=chance.normal(size=512).astype(np.float32),
        loss_weights=weights,
        temperature=1.0,
    )


def flat(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    return {name: bits_of(tensor.detach().reshape(-1)).cpu() for name, tensor in learner.named_weights()}


@pytest.mark.parametrize("lr", [1e-6, 1e-2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_changes_are_what_is_different(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool, lr: float
) -> None:
    monkeypatch.setattr(changes, "CHUNK", 1 << 20)
    monkeypatch.setattr(changes, "IN_PLACE_CHUNK", 1 << 20)
    monkeypatch.setattr(found, "SLICE", 1 << 16)
    shape = dataclasses.replace(specimen.sized(256, 3, 5000), tied=tied, dtype=dtype)
    specimen.write(tmp_path, shape)
    learner = MegatronLearner(tmp_path, Learner(optimizer={"lr": lr, "weight_decay": 0.1}), seed=0)
    learner.watch_changes()
    before = flat(learner)
    ppo = make_loss("ppo_clip", Algorithm())
    for step in range(4):
        learner.train_step(batch(step), ppo)
        # the next step runs while the last one's changes are on their way
        taken = learner.take_changes()
        after = flat(learner)
        learner.train_step(batch(step), ppo)
        pieces = taken.pieces()
        for piece in pieces:
            old, new = before[piece.name][piece.start : piece.stop], after[piece.name][piece.start : piece.stop]
            assert torch.equal(diff(old, new).indices, piece.change.sparse.indices)
            assert piece.change.new is None or torch.equal(piece.change.new, new)
            apply_(old, piece.change)
        assert pieces
        assert all(torch.equal(before[name], after[name]) for name in after)
        for piece in learner.take_changes().pieces():
            apply_(before[piece.name][piece.start : piece.stop], piece.change)
