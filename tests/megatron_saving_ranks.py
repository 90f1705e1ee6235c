"""One rank of a learner that trains, saves and loads: `python megatron_saving_ranks.py SCRIPT`, under torchrun's
environment.  SCRIPT is JSON: what the learner is, and what all its ranks do."""

import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from huggingface_reference import OPTIMIZER
from megatron_builders import PPO, make_batch

from engines.megatron.learner import MegatronLearner
from engines.megatron.resume import Files
from engines.megatron.snapshot import snapshot
from engines.weights import fingerprint
from stream_rl.config import Learner
from stream_rl.errors import StreamRLError
from stream_rl.types import Version

RUN = "run-1"


def state(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    """All that this rank keeps of what a next step depends on."""
    taken = snapshot(learner._trained())
    weights = {f"weight/{name}": tensor for name, tensor in taken.weights.items()}
    schedule = {"schedule": torch.tensor(learner._scheduler.num_steps)}
    return {name: tensor.clone() for name, tensor in (taken.states | weights | taken.random | schedule).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    bits = [{name: fingerprint.bits_of(t.reshape(-1)) for name, t in each.items()} for each in (first, second)]
    return bits[0].keys() == bits[1].keys() and all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])


def refuse(new: pathlib.Path) -> Files:
    raise OSError(f"no room in {new}")


def die(new: pathlib.Path) -> Files:
    assert new.is_dir()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except StreamRLError as error:
        return str(error)
    return "no error"


def main(script: dict[str, Any]) -> None:
    section = Learner(micro_batch_tokens=100, optimizer=OPTIMIZER, schedule=script["schedule"], **script["learner"])
    learner = MegatronLearner(script["model"], section, seed=0)
    remembered: dict[str, dict[str, torch.Tensor]] = {}
    for word, argument in script["acts"]:
        match word:
            case "step":
                assert learner.train_step(make_batch(argument), PPO)["skipped"] == 0.0
            case "save":
                learner.save_checkpoint(argument, Version(0, 1), RUN)
            case "save while training":
                # two steps more than what is saved
                saving = learner.begin_checkpoint(argument, Version(0, 1), RUN)
                thread = threading.Thread(target=saving.finish)
                thread.start()
                for step in (70, 71):
                    learner.train_step(make_batch(step), PPO)
                thread.join()
                assert saving.done
            case "load":
                assert learner.load_checkpoint(argument) == Version(0, 1)
            case "export":
                learner.save(argument)
            case "remember":
                remembered[argument] = state(learner)
            case "is":
                assert same(state(learner), remembered[argument]), argument
            case "is not":
                assert not same(state(learner), remembered[argument]), argument
            case "random":
                torch.rand(dist.get_rank() + argument)
            case "refused":
                before = state(learner)
                assert argument[1] in error_of(lambda path=argument[0]: learner.load_checkpoint(path))
                assert same(state(learner), before)
            case "cannot save":
                path, rank, message = argument
                saving = learner.begin_checkpoint(path, Version(0, 1), RUN)
                if dist.get_rank() == rank:
                    saving._write = refuse  # type: ignore[method-assign]
                assert message in error_of(saving.finish)
            case "die while saving":
                path, rank = argument
                saving = learner.begin_checkpoint(path, Version(0, 1), RUN)
                if dist.get_rank() == rank:
                    saving._write = die  # type: ignore[method-assign]
                assert "one of them is gone or too slow" in error_of(saving.finish)
                os._exit(0)  # not through a barrier
            case _:
                raise AssertionError(word)
    dist.barrier()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
