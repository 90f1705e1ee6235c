"""Learners of several processes that save, and load each other's checkpoints: see megatron_saving_ranks.py."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_reference import write_random_model
from megatron_builders import PPO, make_batch, make_learner

from actors.checkpoints import recover
from engines.megatron.shards import Shard, whole
from engines.megatron.state_files import StateFiles, assembly
from stream_rl.types import Version

SCHEDULE = {"lr_warmup_steps": 2, "lr_decay_style": "linear", "lr_decay_steps": 9}
TP2 = {"processes": 2, "model": {"tensor_model_parallel_size": 2}}
PP2 = {"processes": 2, "model": {"pipeline_model_parallel_size": 2}}
DP2 = {"processes": 2}
DP2_SHARDED = {"processes": 2, "ddp": {"use_distributed_optimizer": True}}
DP2_OVERLAPPED = {
    "processes": 2,
    "ddp": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}
TP2_PP2 = {"processes": 4, "model": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}
ROOT = pathlib.Path(__file__).resolve().parents[1]
Acts = list[tuple[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ranks(model: pathlib.Path, learner: dict[str, Any], acts: Acts, killed: int | None = None) -> None:
    """Have the ranks of a learner do something, and come to an end; `killed` to another one than the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = json.dumps({"model": str(model), "learner": learner, "schedule": SCHEDULE, "acts": acts})
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(learner["processes"]),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "megatron_saving_ranks.py"), script],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(learner["processes"])
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in running]
        wanted = [-signal.SIGKILL if rank == killed else 0 for rank in range(len(running))]
        assert [rank.returncode for rank in running] == wanted, "\n".join(errors)
    finally:
        for rank in running:
            rank.kill()


def weights(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


def whole_state(checkpoint: pathlib.Path) -> dict[str, torch.Tensor]:
    """KIND/NAME of every tensor of the training state, of all ranks together."""
    state = {}
    names = weights(checkpoint)
    with StateFiles(checkpoint / "training") as files:
        assert files.names == names.keys()
        for kind in files.kinds:
            for name, tensor in names.items():
                elements = tensor.numel()
                shard = Shard(name, elements, whole(elements), whole(elements))
                state[f"{kind}/{name}"] = torch.empty(elements)
                assembly(shard, torch.float32, files.parts(kind, name), kind).into(state[f"{kind}/{name}"])
        for name in names:
            state[f"step/{name}"] = torch.stack(files.totals("step", [name])).unique()
    return state


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def one(model: pathlib.Path, checkpoint: pathlib.Path, export: pathlib.Path) -> None:
    """Go on from a checkpoint in this process, by a step."""
    learner = make_learner(model, schedule=SCHEDULE)
    assert learner.load_checkpoint(checkpoint) == Version(0, 1)
    learner.train_step(make_batch(2), PPO)
    learner.save(export)


@pytest.mark.parametrize(
    ("dtype", "tied", "old", "new"),
    [
        ("float32", True, TP2, DP2_SHARDED),
        pytest.param("float32", True, PP2, TP2, marks=pytest.mark.long),
        pytest.param("bfloat16", False, DP2_SHARDED, TP2, marks=pytest.mark.long),
        pytest.param("bfloat16", True, TP2, DP2_SHARDED, marks=pytest.mark.long),
        pytest.param("bfloat16", True, PP2, DP2_OVERLAPPED, marks=pytest.mark.long),
        pytest.param("float32", False, DP2_OVERLAPPED, PP2, marks=pytest.mark.long),
        pytest.param("bfloat16", False, DP2, TP2_PP2, marks=pytest.mark.long),
        pytest.param("float32", True, TP2_PP2, DP2, marks=pytest.mark.long),
    ],
)
def test_any_placement_goes_on_where_another_stopped(
    tmp_path: pathlib.Path, dtype: str, tied: bool, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """old -> old to the bit; old -> new, old -> one process, one process -> new, new -> one process to rounding."""
    model, path = tmp_path / "model", tmp_path
    # a vocabulary that two ranks must pad
    write_random_model(model, dtype=dtype, tie_word_embeddings=tied)
    single = make_learner(model, schedule=SCHEDULE)
    for step in (0, 1):
        single.train_step(make_batch(step), PPO)
    single.save_checkpoint(path / "one", Version(0, 1), "run-1")

    saved = str(path / "old")
    ranks(model, old, [
        ("step", 0), ("step", 1), ("random", 3), ("remember", "at save"), ("save while training", saved),
        ("is not", "at save"), ("load", saved), ("is", "at save"), ("step", 2), ("export", str(path / "old-old")),
        ("remember", "a step on"), ("load", saved), ("step", 2), ("is", "a step on"),
        ("cannot save", (str(path / "failed"), 1, f"rank 1 of {old['processes']}: no room in")),
        ("save", str(path / "again")),
    ])  # fmt: skip
    hurt = path / "hurt"
    shutil.copytree(path / "old", hurt)
    with (hurt / "training" / "rank-00001.safetensors").open("ab") as file:
        file.write(b"x")
    ranks(model, new, [
        ("step", 5), ("load", saved), ("save", str(path / "new")), ("step", 2), ("export", str(path / "old-new")),
        ("load", str(path / "one")), ("step", 2), ("export", str(path / "one-new")),
        ("refused", (str(hurt), "hurt is damaged: training/rank-00001.safetensors should have")),
        ("refused", (str(path / "none"), "cannot be resumed from: cannot read training.json")),
    ])  # fmt: skip
    assert not (path / "failed").exists()
    assert not [left for left in path.iterdir() if left.name.startswith(".")]
    one(model, path / "old", path / "old-one")
    one(model, path / "new", path / "new-one")
    one(model, path / "one", path / "one-one")
    # nothing is lost or rounded on the way to another placement
    assert apart(weights(path / "old"), weights(path / "new")) == 0.0
    states = whole_state(path / "old"), whole_state(path / "new")
    assert apart(*states) == 0.0
    kinds = {"exp_avg", "exp_avg_sq", "step", *(["main"] if dtype == "bfloat16" else [])}
    assert {key.partition("/")[0] for key in states[0]} == kinds
    assert all(float(state.abs().max()) > 0.0 for state in states[0].values())
    limit = 1e-6 if dtype == "float32" else 2e-3
    for other in ("old-new", "old-one", "new-one"):
        assert apart(weights(path / other), weights(path / "old-old")) <= limit, other
    assert apart(weights(path / "one-new"), weights(path / "one-one")) <= limit
    assert apart(weights(path / "old-old"), weights(path / "old")) > 5e-4, "a step is seen"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_is_killed_while_it_saves_costs_that_save_and_hangs_no_other(
    tmp_path: pathlib.Path, rank: int
) -> None:
    write_random_model(tmp_path / "model")
    kept, checkpoints = tmp_path / "checkpoints" / "step-1", tmp_path / "checkpoints"
    acts: Acts = [
        ("step", 0),
        ("step", 1),
        ("save", str(kept)),
        ("die while saving", (str(checkpoints / "step-2"), rank)),
    ]
    ranks(tmp_path / "model", DP2, acts, killed=rank)
    learner = make_learner(tmp_path / "model", schedule=SCHEDULE)
    assert recover(learner, checkpoints, "run-1") == Version(0, 1)
    assert list(checkpoints.iterdir()) == [kept], "the rest is swept"
