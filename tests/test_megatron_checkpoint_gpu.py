"""On a GPU: a checkpoint is of the moment at which it began, while the steps after it run."""

import dataclasses
import pathlib
import threading
import time

import pytest
import torch
from test_megatron_gpu import batch

from algorithms.losses import make_loss
from engines.megatron import specimen
from engines.megatron.learner import MegatronLearner
from engines.megatron.snapshot import snapshot
from stream_rl.config import Algorithm, Learner
from stream_rl.types import Version

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def everything(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    taken = snapshot(learner._trained())
    torch.cuda.synchronize()
    taken.wait()
    taken.release()
    weights = {f"weight/{name}": tensor for name, tensor in taken.weights.items()}
    return {name: tensor.clone() for name, tensor in (taken.states | weights | taken.random).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed optimizer"])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: pathlib.Path, dtype: str, sharded: bool) -> None:
    shape = dataclasses.replace(specimen.sized(768, 6, 30000), dtype=dtype)
    specimen.write(tmp_path / "model", shape)
    section = Learner(optimizer={"lr": 1e-3, "weight_decay": 0.1}, ddp={"use_distributed_optimizer": sharded})
    learner = MegatronLearner(tmp_path / "model", section, seed=0)
    ppo = make_loss("ppo_clip", Algorithm())
    for step in range(2):
        learner.train_step(batch(step), ppo)
    for save in range(3):
        at_save = everything(learner)
        began = time.perf_counter()
        saving = learner.begin_checkpoint(tmp_path / "saved", Version(0, 2), "run-1")
        begun = time.perf_counter()
        # at once, so that a step that did not wait for the copies would spoil them
        learner.train_step(batch(save), ppo)
        thread = threading.Thread(target=saving.finish)
        thread.start()
        for step in range(3):
            learner.train_step(batch(step), ppo)
        thread.join()
        print(f"{dtype} sharded={sharded}: begin {begun - began:.3f} s, all {time.perf_counter() - began:.3f} s")
        assert not same(everything(learner), at_save)
        assert learner.load_checkpoint(tmp_path / "saved") == Version(0, 2)
        assert same(everything(learner), at_save)
