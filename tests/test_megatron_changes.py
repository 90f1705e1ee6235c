"""What a step changed, found where it is written, against a comparison of all weights before and after."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_reference import write_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_builders import PPO, make_batch, make_learner
from test_megatron_huggingface import SHAPE, random_weights

from engines.megatron import changes, found
from engines.megatron.huggingface import to_megatron
from engines.megatron.layout import EMBEDDING, OUTPUT, Place, layout
from engines.megatron.learner import MegatronLearner
from engines.megatron.model_shape import FAMILIES, ModelShape
from engines.weights.codes.ulp import diff
from engines.weights.fingerprint import bits_of
from engines.weights.parts import Piece, apply_
from stream_rl.errors import ConfigError, EngineError

FlatBits = dict[str, torch.Tensor]
SGD = {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "clip_grad": 1.0, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices and chunks that a tiny model has many of."""
    monkeypatch.setattr(changes, "CHUNK", 1500)
    monkeypatch.setattr(changes, "IN_PLACE_CHUNK", 2500)
    monkeypatch.setattr(found, "SLICE", 700)


def flat(learner: MegatronLearner) -> FlatBits:
    return {name: bits_of(tensor.detach().reshape(-1)).clone() for name, tensor in learner.named_weights()}


def applied(before: FlatBits, pieces: list[Piece], after: FlatBits) -> FlatBits:
    """`before` brought on, having checked that each piece says no more and no less than what is different."""
    slices = {(piece.name, piece.start) for piece in pieces}
    assert len(slices) == len(pieces), "one piece for each slice"
    bits = {name: tensor.clone() for name, tensor in before.items()}
    for piece in pieces:
        old, new = before[piece.name][piece.start : piece.stop], after[piece.name][piece.start : piece.stop]
        assert torch.equal(diff(old, new).indices, piece.change.sparse.indices)
        assert piece.change.new is None or torch.equal(piece.change.new, new)
        apply_(bits[piece.name][piece.start : piece.stop], piece.change)
    return bits


def equal(got: FlatBits, wanted: FlatBits) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("optimizer", [None, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changes_are_what_is_different_and_watching_changes_no_bit(
    tmp_path: pathlib.Path, dtype: str, tied: bool, optimizer: dict[str, Any] | None
) -> None:
    """With weight decay, clipping, a schedule, and two groups of parameters."""
    write_random_model(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    options: dict[str, Any] = {"schedule": {"lr_warmup_steps": 2, "lr_decay_style": "linear", "lr_decay_steps": 9}}
    options |= {} if optimizer is None else {"optimizer": optimizer}
    watched, plain = (make_learner(tmp_path / "model", **options) for _ in range(2))
    assert len(watched._optimizer.param_groups) > 1
    watched.watch_changes()
    dense = 0
    for step in range(4):
        before = flat(watched)
        reports = [learner.train_step(make_batch(step), PPO) for learner in (watched, plain)]
        assert reports[0]["gradient_norm"] == reports[1]["gradient_norm"]
        after, taken = flat(watched), watched.take_changes()
        pieces = taken.pieces()
        assert equal(after, flat(plain))
        assert equal(applied(before, pieces, after), after)
        different = sum(int((before[name] != after[name]).sum()) for name in before)
        assert taken.share == pytest.approx(different / sum(bits.numel() for bits in before.values()))
        assert 0.0 < taken.seconds < 60.0
        dense += sum(piece.change.new is not None for piece in pieces)
    assert dense > 0, "whole slices come along where most of them changed"


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_steps_add_up_and_a_skipped_one_is_nothing(tmp_path: pathlib.Path, dtype: str) -> None:
    write_random_model(tmp_path / "model", dtype=dtype)
    learner = make_learner(tmp_path / "model")
    learner.watch_changes()
    batch = make_batch(0)
    nothing = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    assert learner.train_step(nothing, PPO)["skipped"] == 1.0
    assert learner.take_changes().pieces() == []
    before = flat(learner)
    for step in (nothing, make_batch(1), nothing, make_batch(2)):
        learner.train_step(step, PPO)
    assert equal(applied(before, learner.take_changes().pieces(), flat(learner)), flat(learner))


def test_nothing_is_watched_after_the_optimizer_was_replaced(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "model")
    learner = make_learner(tmp_path / "model")
    learner.watch_changes()
    learner.reset_optimizer({"lr": 1e-3}, {})
    with pytest.raises(AssertionError, match="watch_changes comes first"):
        learner.take_changes()


def test_what_cannot_be_watched_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    write_random_model(tmp_path / "model")
    learner = make_learner(tmp_path / "model")

    class Coupled(torch.optim.AdamW):
        pass

    inner = learner._optimizer.chained_optimizers[0]
    torch_optimizer = inner.optimizer
    inner.optimizer = Coupled(torch_optimizer.param_groups)
    with pytest.raises(ConfigError, match=r"\['Adam', 'AdamW', 'SGD'\] of torch only, got Coupled"):
        learner.watch_changes()
    inner.optimizer = torch_optimizer
    inner.config.use_precision_aware_optimizer = True
    with pytest.raises(ConfigError, match=r"cannot be found with \['use_precision_aware_optimizer'\]"):
        learner.watch_changes()
    learner._gpt.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(EngineError, match=r"no checkpoint tensor is known for \['adapter'\]"):
        learner.watch_changes()


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        ("bfloat16", "plain"),
        ("bfloat16", "overlap"),
        ("float32", "distributed"),
        pytest.param("bfloat16", "distributed", marks=pytest.mark.long),
        pytest.param("float32", "plain", marks=pytest.mark.long),
        pytest.param("float32", "overlap", marks=pytest.mark.long),
    ],
)
def test_two_data_parallel_ranks_share_the_work(tmp_path: pathlib.Path, dtype: str, mode: str) -> None:
    """See megatron_ranks.py."""
    write_random_model(tmp_path / "model", dtype=dtype, tie_word_embeddings=True)
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    words = (str(tmp_path / "store"), str(tmp_path / "model"), mode)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(root / "tests" / "megatron_ranks.py"), str(rank), *words],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


# -- where the elements go -----------------------------------------------------------------------------------


def shard_of(name: str, full: torch.Tensor, rank: int, size: int, rows: int) -> torch.Tensor:
    """As megatron-core cuts a parameter over tensor-parallel ranks."""
    if name in (EMBEDDING[0], OUTPUT[0]):
        padding = full.new_full((rows - full.shape[0], full.shape[1]), -1)
        return torch.cat([full, padding]).chunk(size)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if "linear_qkv" in name:
        return full.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(size, dim=1)[rank]
    return full


def numbered(shape: ModelShape) -> dict[str, torch.Tensor]:
    """Checkpoint tensors in which every element is its own flat position, by megatron-core's names when whole."""
    return {name: torch.arange(float(t.numel())).reshape(t.shape) for name, t in random_weights(shape).items()}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]),
    st.integers(0, 7), st.booleans(), st.integers(1, 2), st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_element_of_the_checkpoint_has_one_place_in_one_rank(
    family: str, groups: int, share: int, size: int, padding: int, tied: bool, stages: int, chance: Any
) -> None:
    shape = dataclasses.replace(
        SHAPE, architecture=family, heads=groups * share * size, kv_heads=groups * size, ffn_size=4 * size,
        layers=2 * stages, tied=tied,
    )  # fmt: skip
    rows = -(-(shape.vocab_size + padding) // size) * size
    checkpoint = numbered(shape)
    full = dict(to_megatron(shape, checkpoint))
    seen = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in checkpoint.items()}
    for stage, rank in itertools.product(range(stages), range(size)):
        place = Place(
            tp_rank=rank, tp_size=size, first_layer=2 * stage, num_layers=2, first_stage=stage == 0,
            last_stage=stage == stages - 1, padded_vocab=rows,
        )  # fmt: skip
        for name, boxes in layout(shape, place).items():
            prefix, _, rest = name.partition("layers.")
            local, _, rest = rest.partition(".")
            whole = f"{prefix}layers.{int(local) + 2 * stage}.{rest}" if local else name
            if not boxes:
                assert rank > 0 or (name == OUTPUT[0] and tied)
                continue
            shard = shard_of(whole, full[whole], rank, size, rows).reshape(-1)
            start, stop = sorted(chance.sample(range(shard.numel() + 1), 2))
            taken = 0
            for box in boxes:
                target = checkpoint[box.name].reshape(-1)
                assert box.elements == target.numel()
                there = target.as_strided((box.count, box.width), (box.to_stride, 1), box.to_offset)
                assert torch.equal(box.of(shard), there)
                seen[box.name][there.reshape(-1).long()] += 1
                for position, to, elements in box.runs(start, stop):
                    assert start <= position < position + elements <= stop
                    assert torch.equal(target[to : to + elements], shard[position : position + elements])
                    taken += elements
            assert taken == int((shard[start:stop] >= 0).sum()), "only what pads the vocabulary goes nowhere"
    assert all((times == 1).all() for times in seen.values())


def test_what_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 tensor-parallel ranks must divide 2 key heads, an MLP of 10 and 12 rows"):
        layout(SHAPE, Place(tp_size=3))
