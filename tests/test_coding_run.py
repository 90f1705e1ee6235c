"""A run of the coding agent from end to end: real SGLang, the real endpoint, sandboxes, the learner.  Its model can do
none of it: its failures are rewards of 0, and nothing hangs."""

import json
import pathlib
import re

import numpy as np
import pytest
from chat_builders import write_into
from click.testing import CliRunner
from run_command import Launch
from safetensors.numpy import save_file
from sandboxes import needs_sandbox

from scripts import tiny_model
from scripts.cli import cli

pytestmark = [needs_sandbox, pytest.mark.long, pytest.mark.timeout(500)]


def test_a_model_that_cannot_program_is_rewarded_with_nothing_and_trained(
    launch: Launch, tmp_path: pathlib.Path
) -> None:
    model = tmp_path / "chatty"
    tiny_model.create(model)
    write_into(model)  # a tokenizer with more tokens than the model has
    told = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(told | {"vocab_size": 512}))
    weights = tiny_model._weights(model, np.random.default_rng(0), 0.05)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    command = launch(
        2,
        f"model.path={model}",
        "task.use=actors.tasks.coding:Coding",
        "task.options={turns = 2}",
        "agent.max_turns=4",
        "agent.max_turn_tokens=24",
        "agent.max_context_tokens=3900",
        'agent.tool_parser="qwen25"',
        "rollout.group_size=2",
        "rollout.max_new_tokens=64",
        "rollout.heldout_prompts=0",
        "queue.min_tokens=60",
        "queue.max_tokens=40000",
        'algorithm.advantage="centered"',
        'learner.leases="record"',
        "learner.micro_batch_tokens=4096",
        "sglang.max_total_tokens=32768",
    )
    assert command.process.wait(400) == 0, command.text()
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["conserved"]
    assert summary["reward_last"] == 0.0
    taken = json.loads((command.run / "learner.jsonl").read_text().splitlines()[0])
    label = f"{taken['groups'][0]}/{taken['members'][0]}"
    shown = CliRunner().invoke(cli, ["trajectory", "show", label, "--run", str(command.run), "--full"]).output
    assert re.search(r"learner's log-prob less the engine's: mean", shown) and "Input:" in shown
