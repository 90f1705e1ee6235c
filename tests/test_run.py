"""Whole runs: real queue, publisher, SGLang, learner and actor, started by the command that people type."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from scripts import tiny_model

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]
ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = '''
import itertools, os, random, time
from stream_rl.task import Prompt

class Moody:
    """Rewards short answers; raises, hangs and dies on some."""
    def __init__(self):
        self.calls = itertools.count(1)
    def prompts(self, split, seed):
        rng = random.Random(f"{split}/{seed}")
        while True:
            yield Prompt(text=f"{rng.randrange(100000):05d}=", data={})
    def reward(self, prompt, completion):
        call = next(self.calls)
        if call % 11 == 0:
            raise RuntimeError("moody")
        if call % 29 == 0:
            time.sleep(60)
        print("a task may print")
        return {"reward": 1.0 - len(completion) / 200, "length": float(len(completion))}
'''
RECIPE = """
[run]
name = "small"
steps = {steps}
directory = "{directory}/runs"
[model]
path = "{directory}/model"
[task]
use = "{directory}/moody.py:Moody"
[rollout]
group_size = 4
max_new_tokens = 120
heldout_prompts = 8
reward_timeout_s = 1.0
[queue]
min_tokens = 1200
max_tokens = 8000
first_groups = 4
max_token_age = 4
[learner]
micro_batch_tokens = 2048
optimizer = {{lr = 3e-4, weight_decay = 0.0}}
[weights]
verify_every = 2
[sglang]
device = "cpu"
attention_backend = "torch_native"
dtype = "float32"
skip_tokenizer_init = true
max_total_tokens = 16384
max_running_requests = 32
sleep_on_idle = true
"""
SUMMARY_KEYS = {
    "reward_first", "reward_last", "heldout_first", "heldout_last", "steps", "versions", "trained_tokens",
    "generated_tokens", "streamed_before_end", "token_age_mean", "token_age_p99", "token_age_max", "masked_share",
    "dropped", "cancelled", "generation_pauses", "aborted_requests", "delta_bytes", "full_bytes",
    "update_stall_ms_p50", "update_stall_ms_p99", "decode_step_ms_p50", "plugin_cpu_share", "engine_busy",
    "learner_busy", "weights_hash_engine", "weights_hash_learner", "conserved", "wall_s",
}  # fmt: skip


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie has ended and waits for whoever adopted it."""
    left = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.NoSuchProcess:
            continue
    return left


class Command:
    """`stream-rl train` in a process group of its own."""

    def __init__(self, directory: pathlib.Path, steps: int) -> None:
        tiny_model.create(directory / "model", seed=0)
        (directory / "moody.py").write_text(TASK)
        (directory / "recipe.toml").write_text(RECIPE.format(directory=directory, steps=steps))
        self.run = directory / "runs" / "small"
        self.output = (directory / "output.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", "train", str(directory / "recipe.toml")],
            stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def text(self) -> str:
        self.output.flush()
        return pathlib.Path(self.output.name).read_text()

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, word: str) -> psutil.Process:
        return next(p for p in self.tree() if word in " ".join(p.cmdline()))

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count('"kind": "step"') if path.exists() else 0

    def wait_for_steps(self, count: int) -> None:
        end = time.monotonic() + 240
        while self.steps() < count:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)

    def finish(self, timeout: float) -> tuple[int, list[psutil.Process]]:
        """Exit status, and what is left of the processes that were there when this was called."""
        tree = self.tree()
        code = self.process.wait(timeout)
        return code, alive(tree)


def test_a_run_trains_counts_everything_and_leaves_a_checkpoint(tmp_path: pathlib.Path) -> None:
    command = Command(tmp_path, steps=6)
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


def test_ctrl_c_ends_every_process(tmp_path: pathlib.Path) -> None:
    command = Command(tmp_path, steps=500)
    command.wait_for_steps(1)
    tree = command.tree()
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    code = command.process.wait(40)
    assert code == 130, command.text()
    assert "stopped" in command.text()
    assert alive(tree) == []


def killed(tmp_path: pathlib.Path, word: str, name: str) -> None:
    command = Command(tmp_path, steps=500)
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


def test_an_engine_whose_scheduler_dies_ends_the_run_by_name(tmp_path: pathlib.Path) -> None:
    killed(tmp_path, "sglang::scheduler", "engine-0")


@pytest.mark.long
@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("queues.process", "queue"),
        ("engines.weights.publisher", "publisher"),
        ("actors.learner", "learner"),
        ("actors.rollout", "actor"),
        ("engines.sglang.server", "engine-0"),
    ],
)
def test_any_process_that_dies_ends_the_run_by_name(tmp_path: pathlib.Path, word: str, name: str) -> None:
    killed(tmp_path, word, name)


def test_a_supervisor_that_is_killed_takes_its_processes_along(tmp_path: pathlib.Path) -> None:
    command = Command(tmp_path, steps=500)
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
