"""Critic and reference of a learner of several processes: as those of one, and they go on in any other placement."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_reference import OPTIMIZER, write_random_model
from learner_peers import make_lease
from megatron_builders import make_batch, make_learner
from megatron_parallel import free_port, spawn

from actors.capsules import read
from algorithms.critic import ValueLoss
from engines.megatron.critic import Critic
from stream_rl import config
from stream_rl.config import Algorithm
from stream_rl.types import Version

SCRIPT = str(pathlib.Path(__file__).with_name("beside_ranks.py"))
PLACEMENTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {},
}


def run(directory: pathlib.Path, processes: int, model: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """What came of it: tensors and metrics."""
    directory.mkdir()
    write_random_model(directory / "model", num_key_value_heads=2, dtype=dtype)
    recipe = config.Recipe(
        run=config.Run(name="run", steps=3, directory=str(directory)),
        model=config.Model(path=str(directory / "model")),
        task=config.TaskChoice(use="t"),
        queue=config.Queue(min_tokens=8, max_tokens=64),
        algorithm=Algorithm(advantage="gae", kl_coefficient=0.3, value_clip=0.2),
        learner=config.Learner(
            processes=processes, process_timeout_s=60.0, micro_batch_tokens=40, model=model, optimizer=OPTIMIZER
        ),
    )
    config.dump(recipe, directory / "recipe.toml")
    port = free_port()
    ranks = [spawn([SCRIPT, str(directory / "recipe.toml"), str(directory)], rank, processes, port)
             for rank in range(processes)]  # fmt: skip
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, f"rank {rank}:\n{errors}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    tensors: dict[str, Any] = dict(safetensors.torch.load_file(directory / "tensors.safetensors"))
    return tensors | {"metrics": json.loads((directory / "metrics.json").read_text())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one") / "run", 1, {})


@pytest.mark.parametrize(
    "name", ["TP2", pytest.param("PP2", marks=pytest.mark.long), pytest.param("DP2", marks=pytest.mark.long)]
)
def test_two_processes_do_what_one_does(tmp_path: pathlib.Path, alone: dict[str, Any], name: str) -> None:
    found = run(tmp_path / "run", 2, PLACEMENTS[name])
    for key, wanted in alone.items():
        if key != "metrics":
            torch.testing.assert_close(
                found[key], wanted, rtol=0, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    timed = ("_seconds", "_bytes", "_per_second")
    for got, expected in zip(found["metrics"], alone["metrics"], strict=True):
        assert got.keys() == expected.keys()
        for metric, value in expected.items():
            if not metric.endswith(timed):
                assert got[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    assert [one.get("not_finite", 0.0) for one in found["metrics"]] == [0.0, 0.0, 0.0, 1.0]
    assert found["metrics"][1]["critic_gradient_norm"] > 0 and found["metrics"][2]["reference_kl"] > 0
    capsule = read(tmp_path / "run" / "run" / "capsules" / "step-0-3")
    assert np.isfinite(capsule.columns["learner_logprobs"]).all()

    # its checkpoint goes on in one process
    recipe = config.load(tmp_path / "run" / "recipe.toml")
    section = dataclasses.replace(recipe.learner, processes=1, model={})
    policy = make_learner(tmp_path / "run" / "model", 40)
    critic = Critic(recipe.model.path, section, recipe.critic, 0)
    assert policy.load_checkpoint(tmp_path / "run" / "checkpoint", critic=critic) == (0, 3)
    lease = make_lease(Version(0, 9))
    values = np.concatenate(critic.values(np.split(lease.token_ids, np.cumsum(lease.lengths)[:-1])))
    np.testing.assert_allclose(values, found["values"], atol=5e-5)
    critic.train_step(make_batch(0), ValueLoss(0.0))
