"""Whole runs: real queue, publisher, SGLang, learner and actor, started by the command that people type."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from run_command import PROCESSES, ROOT, Command, Launch, alive

from scripts.records import read

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]
SUMMARY_KEYS = {
    "reward_first", "reward_last", "heldout_first", "heldout_last", "steps", "versions", "trained_tokens",
    "generated_tokens", "streamed_before_end", "token_age_mean", "token_age_p99", "token_age_max", "masked_share",
    "dropped", "cancelled", "generation_pauses", "aborted_requests", "delta_bytes", "full_bytes",
    "update_stall_ms_p50", "update_stall_ms_p99", "decode_step_ms_p50", "plugin_cpu_share", "engine_busy",
    "learner_busy", "weights_hash_engine", "weights_hash_learner", "conserved", "restarts", "wall_s",
}  # fmt: skip


def test_a_run_trains_counts_everything_and_leaves_a_checkpoint(launch: Launch) -> None:
    command = launch(6)
    command.wait_for_steps(1)
    code, left = command.finish(240)
    assert code == 0, command.text()
    assert left == []
    summary = json.loads((command.run / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["steps"] == summary["versions"] == 6
    assert summary["conserved"] is True
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"]
    assert summary["generation_pauses"] == summary["aborted_requests"] == summary["hash_mismatches"] == 0
    assert summary["token_age_max"] <= 4
    assert summary["streamed_before_end"] > 0.5
    assert summary["dropped"]["reward_raised"] > 0, "a reward that raises costs its trajectory, not the run"
    assert summary["dropped"]["reward_timeout"] > 0, "nor does one that hangs"
    assert (command.run / "report.png").stat().st_size > 10_000

    from engines.sglang.cpu_shim import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = command.run / "checkpoints" / "final"
    assert AutoModelForCausalLM.from_pretrained(final).num_parameters() > 500_000
    assert AutoTokenizer.from_pretrained(final).decode(AutoTokenizer.from_pretrained(final)("00123=").input_ids)


def test_ctrl_c_ends_every_process(launch: Launch) -> None:
    command = launch(500)
    command.wait_for_steps(1)
    tree = command.tree()
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    code = command.process.wait(40)
    assert code == 130, command.text()
    assert "stopped" in command.text()
    assert f"go on with: stream-rl train {command.run} --resume" in command.text()
    psutil.wait_procs(tree, timeout=10)  # who was killed has a moment to go
    assert alive(tree) == []


@pytest.mark.long
def test_rollouts_alone_are_kept_and_train_alone(launch: Launch) -> None:
    command = launch(3, "--rollout-only")
    command.wait_for_steps(1)
    code, left = command.finish(240)
    assert (code, left) == (0, []), command.text()
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["steps"] == summary["skipped_steps"] == summary["versions"] == 3
    assert summary["conserved"] is True and summary["trained_tokens"] == 0
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"]
    recipe = str(command.run.parents[1] / "recipe.toml")
    alone = stream_rl("train", recipe, "run.name=alone", "--train-only", str(command.run))
    assert alone.returncode == 0, alone.stderr
    assert [line.split()[:3:2] for line in alone.stdout.splitlines()[:3]] == [["step", "loss"]] * 3
    assert (command.run.parent / "alone" / "checkpoints" / "final" / "model.safetensors").exists()
    refused = stream_rl("learner", "replay", str(command.run))
    assert refused.returncode == 1 and "--train-only" in refused.stderr


def stream_rl(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scripts.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)


def killed_for_good(launch: Launch, word: str, name: str) -> None:
    command = launch(500, "supervise.max_restarts=0")
    command.wait_for_steps(1)
    tree, victim = command.tree(), command.find(word)
    start = time.monotonic()
    victim.kill()
    code = command.process.wait(30)
    assert time.monotonic() - start < 30
    assert code == 1, command.text()
    assert f"{name} ended with status" in command.text()
    assert f"logs/{name}.log" in command.text()
    assert alive(tree) == []


@pytest.mark.long
def test_without_restarts_an_engine_whose_scheduler_dies_ends_the_run_by_name(launch: Launch) -> None:
    killed_for_good(launch, "sglang::scheduler", "engine-0")


@pytest.mark.long
@pytest.mark.parametrize("name", PROCESSES)
def test_without_restarts_any_process_that_dies_ends_the_run_by_name(launch: Launch, name: str) -> None:
    killed_for_good(launch, PROCESSES[name], name)


def goes_on(command: Command, *names: str) -> dict[str, Any]:
    """The summary of a run that ends well although each of these was killed once."""
    code, left = command.finish(240)
    assert code == 0, command.text()
    assert left == []
    summary: dict[str, Any] = json.loads((command.run / "summary.json").read_text())
    assert summary["restarts"] == dict.fromkeys(names, 1), command.text()
    assert summary["conserved"] is True
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"] != ""
    assert summary["hash_mismatches"] == summary["generation_pauses"] == 0
    for name in names:
        assert f"{name} ended with status -9; started again (1 of 3)" in command.text()
    return summary


def test_a_run_outlives_its_engine_and_its_learner(launch: Launch) -> None:
    command = launch(8, "learner.checkpoint_every=2")
    command.wait_for_steps(1)
    command.kill("engines.sglang.server", "engine-0")
    command.wait_for_steps(3)
    command.kill("actors.learner", "learner")
    summary = goes_on(command, "engine-0", "learner")
    assert sum(summary["resumed"].values()) > 0
    assert "resumed" in command.text()
    last = read(command.run)["step"][-1]
    assert last["step"] == 7, "the restarted learner took the run's last step"


@pytest.mark.long
@pytest.mark.parametrize("name", PROCESSES)
def test_a_run_outlives_the_loss_of_any_process(launch: Launch, name: str) -> None:
    command = launch(8, "learner.checkpoint_every=2")
    command.wait_for_steps(2)
    command.kill(PROCESSES[name], name)
    goes_on(command, name)


@pytest.mark.long
@pytest.mark.parametrize("name", PROCESSES)
def test_a_run_outlives_a_loss_after_its_last_step(launch: Launch, name: str) -> None:
    """While the last version is delivered and evaluated, which takes a while here."""
    command = launch(2, "rollout.heldout_prompts=60", "rollout.heldout_concurrency=2")
    command.wait_for_steps(2)
    command.kill(PROCESSES[name], name)
    assert goes_on(command, name)["heldout_last"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", PROCESSES)
def test_a_run_outlives_a_process_that_stalls(launch: Launch, name: str) -> None:
    command = launch(8, "learner.checkpoint_every=2", "supervise.silence_timeout_s=6.0")
    command.wait_for_steps(2)
    for process in [victim := command.find(PROCESSES[name]), *victim.children(recursive=True)]:
        process.suspend()
    command.wait(lambda: command.restarts(name) == 1)
    code, left = command.finish(240)
    assert (code, left) == (0, []), command.text()
    assert f"{name} was silent for " in command.text()


@pytest.mark.long
def test_ctrl_c_while_an_engine_starts_again_ends_every_process(launch: Launch) -> None:
    command = launch(500)
    command.wait_for_steps(1)
    command.kill("engines.sglang.server", "engine-0")
    time.sleep(3)
    tree = command.tree()
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.process.wait(40) == 130, command.text()
    assert alive(tree) == []


def test_a_supervisor_that_is_killed_takes_its_processes_along(launch: Launch) -> None:
    command = launch(500)
    end = time.monotonic() + 100
    while not any("engines.sglang.server" in " ".join(p.cmdline()) for p in command.tree()):
        assert time.monotonic() < end, command.text()
        time.sleep(0.1)
    time.sleep(3)
    tree = command.tree()
    command.process.kill()
    command.process.wait()
    psutil.wait_procs(tree, timeout=30)
    assert alive(tree) == []
