"""A learner of several processes over gloo: `start` runs `megatron_parallel.py CASES` in each, as torchrun would.

Each case is a model, a `[learner]` section and batches; the first process leaves what came of them: metrics, log-probs
and weights, and each process checks that what it found changed is, together with the others', what changed.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from megatron_builders import PPO, TEMPERATURE, make_batch

from algorithms.critic import make_value_loss
from engines.megatron.learner import MegatronLearner
from engines.megatron.network import Head
from engines.weights.fingerprint import bits_of
from engines.weights.parts import apply_
from stream_rl.config import Algorithm, Learner
from stream_rl.types import TrainingBatch

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    model: str
    section: dict[str, Any]
    """Of config.Learner."""
    lengths: list[int]
    steps: int = 3
    aggregation: str = "token_mean"
    head: Head = "tokens"
    spoil: str = ""
    """What is wrong in this case: see `_spoiled` and `_plant`."""
    watch: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    metrics: list[dict[str, float]]
    logprobs: list[np.ndarray]
    weights: dict[str, torch.Tensor]


def start(
    cases: Sequence[Case], processes: int, directory: pathlib.Path, timeout_s: float = 240.0
) -> dict[str, Outcome]:
    """What each case came to.  Fails with the output of a process that does."""
    directory.mkdir(exist_ok=True)
    (directory / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    ranks = [
        spawn([__file__, str(directory)], rank, processes, port) for port in [free_port()] for rank in range(processes)
    ]
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, f"rank {rank}:\n{errors}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return {case.name: _read(directory, case.name) for case in cases}


def spawn(words: Sequence[str], rank: int, processes: int, port: int, **more: Any) -> "subprocess.Popen[str]":
    """One process, as torchrun starts it."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, **more)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _read(directory: pathlib.Path, name: str) -> Outcome:
    tensors = safetensors.torch.load_file(directory / f"{name}.safetensors")
    logprobs = [tensors.pop(key).numpy() for key in sorted(key for key in tensors if key.startswith("logprobs/"))]
    return Outcome(json.loads((directory / f"{name}.json").read_text()), logprobs, tensors)


def run(case: Case) -> Outcome:
    """In this process, which is one of the learner's."""
    learner = MegatronLearner(case.model, Learner(**case.section), seed=0, head=case.head)
    _plant(case.spoil, learner)
    loss = PPO if case.head == "tokens" else make_value_loss(Algorithm())
    tokens = [np.arange(n, dtype=np.int32) * 7 % 60 for n in case.lengths]
    if case.watch:
        learner.watch_changes()
    metrics = []
    for step in range(case.steps):
        before = _bits(learner)
        batch = make_batch(step, case.lengths, case.aggregation, vocabulary=60)
        metrics.append(learner.train_step(_spoiled(case.spoil, batch, step), loss))
        if case.watch:
            _check_changes(learner, before)
    network = learner.network
    logprobs = network.logprobs(tokens, TEMPERATURE) if case.head == "tokens" else network.values(tokens)
    weights = {name: tensor.clone() for name, tensor in learner.named_weights()}
    return Outcome(metrics, logprobs, weights)


def _bits(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    return {name: bits_of(tensor.reshape(-1)).clone() for name, tensor in learner.named_weights()}


def _check_changes(learner: MegatronLearner, before: dict[str, torch.Tensor]) -> None:
    pieces = learner.take_changes().pieces()
    after = _bits(learner)
    if learner.world.peers.rank:
        assert not pieces and not after, "the first process has all of it"
        return
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    for piece in pieces:
        apply_(before[piece.name][piece.start : piece.stop], piece.change)
    for name, bits in before.items():
        assert torch.equal(bits, after[name]), f"{name}: what was found is not what changed ({len(changed)} did)"


def _plant(error: str, learner: MegatronLearner) -> None:
    """An error that the comparison with one process must see."""
    parameters = dict(learner.network.gpt.named_parameters())
    if error == "exchanged" and learner.world.peers.rank == 1:
        first, second = parameters["decoder.layers.0.self_attention.linear_qkv.weight"].data[-32:].split(16)
        first[:], second[:] = second.clone(), first.clone()
    if error == "counted once":  # as if what is cut over tensor-parallel ranks were replicated
        for parameter in parameters.values():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def _spoiled(how: str, batch: TrainingBatch, step: int) -> TrainingBatch:
    """The second step is not finite on one rank, if that is wanted."""
    if how == "nan" and step == 1:
        # one token of one sequence, which one data-parallel rank trains
        trained = np.flatnonzero(batch.loss_weights)
        advantages = batch.advantages.copy()
        advantages[trained[-1]] = np.nan
        return dataclasses.replace(batch, advantages=advantages)
    return batch


def main(directory: pathlib.Path) -> None:
    torch.set_num_threads(1)
    for table in json.loads((directory / "cases.json").read_text()):
        case = Case(**table)
        outcome = run(case)
        if os.environ["RANK"] != "0":
            continue
        logprobs = {f"logprobs/{i:05}": torch.from_numpy(value) for i, value in enumerate(outcome.logprobs)}
        safetensors.torch.save_file(outcome.weights | logprobs, directory / f"{case.name}.safetensors")
        (directory / f"{case.name}.json").write_text(json.dumps(outcome.metrics))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
