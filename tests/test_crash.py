"""kill -9 at random moments of live runs: nothing is lost and nothing trained twice, by the journal and by the
learner's own log."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import psutil
import pytest
from crash_proof import prove
from run_command import PROCESSES, ROOT, Command, Launch

from scripts.records import read

pytestmark = pytest.mark.server
VICTIMS = {name: PROCESSES[name] for name in ("queue", "learner", "actor", "engine-0")}
OPTIONS = (
    "rollout.max_new_tokens=64",
    "rollout.heldout_prompts=4",
    "queue.min_tokens=400",
    "queue.max_tokens=3000",
    "queue.keep_journal=true",
    "learner.checkpoint_every=3",
    "learner.optimizer.lr=1e-5",  # answers must not become short: a step would then take a hundred groups
    "supervise.max_restarts=1000",
)


def victims(command: Command) -> dict[str, psutil.Process]:
    """The processes that live at this moment, by name."""
    found, parent = {}, command.process.pid
    for process in command.tree():
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        found |= {name: process for name, word in VICTIMS.items() if word in line and process.ppid() == parent}
    return found


def harass(command: Command, kills: int, rng: random.Random, most_s: float) -> Counter[str]:
    """kill -9 one process after the other, at random moments, also while others are starting again."""
    killed: Counter[str] = Counter()
    taken = 0
    while killed.total() < kills:
        time.sleep(rng.uniform(0.05, most_s))
        command.wait(lambda: bool(victims(command)))
        name = rng.choice(sorted(VICTIMS))
        if name == "engine-0":
            # it takes half a minute to start, and is to be killed while it generates
            if len(read(command.run)["step"]) < taken + 3:
                continue
            taken = len(read(command.run)["step"])
        if (process := victims(command).get(name)) is not None:
            process.kill()
            killed[name] += 1
    return killed


def survived(command: Command, steps: int, killed: Counter[str], seed: int) -> dict[str, Any]:
    code, left = command.finish(1500)
    assert code == 0, f"seed {seed}: {command.text()}"
    assert left == []
    summary: dict[str, Any] = json.loads((command.run / "summary.json").read_text())
    assert summary["conserved"] is True
    assert summary["steps"] == steps
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"] != ""
    proof = prove(command.run, steps)
    print(f"seed {seed}: killed {dict(killed)}; {proof}; resumed {summary['resumed']}; dropped {summary['dropped']}")
    return summary


@pytest.mark.timeout(400)
def test_a_few_kills_lose_nothing_and_train_nothing_twice(launch: Launch) -> None:
    rng = random.Random(1)
    command = launch(24, *OPTIONS)
    command.wait_for_steps(2)
    killed = Counter()
    for name in ("queue", "learner", "actor", "engine-0", "queue", "learner"):
        time.sleep(rng.uniform(0.1, 2.0))
        command.wait(lambda name=name: name in victims(command))
        victims(command)[name].kill()
        killed[name] += 1
    summary = survived(command, 24, killed, 1)
    assert summary["restarts"] == dict(killed)
    assert summary["forked_steps"] >= 0


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_random_kills_lose_nothing_and_train_nothing_twice(launch: Launch, seed: int) -> None:
    steps = 100
    command = launch(steps, *OPTIONS)
    command.wait_for_steps(2)
    killed = harass(command, 50, random.Random(seed), most_s=5.0)
    survived(command, steps, killed, seed)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_run_killed_as_a_whole_goes_on_to_what_its_leases_train_to_undisturbed(launch: Launch) -> None:
    """The learner at random moments, then everything at once, twice; then the leases of the line that survived, again
    from the first weights: the same losses and the same bits in every checkpoint."""
    rng, steps = random.Random(3), 14
    command = launch(steps, *OPTIONS, "learner.leases=record")
    killed: Counter[str] = Counter()
    for _ in range(2):
        command.wait_for_steps(2)
        time.sleep(rng.uniform(0.1, 2.0))
        command.wait(lambda: "learner" in victims(command))
        victims(command)["learner"].kill()
        killed["learner"] += 1
        command.wait(lambda: command.restarts("learner") == killed["learner"])
        command.wait_for_steps(1)
        time.sleep(rng.uniform(0.1, 3.0))
        command.kill_everything()
        command.resume()
    summary = survived(command, steps, killed, 3)
    assert summary["resumes"] == 2 and summary["restarts"] == dict(killed)
    walls = [record["wall_s"] for record in read(command.run)["step"]]
    assert walls == sorted(walls)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "learner", "replay", str(command.run)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith(f"equal to the bit: the loss and gradient of {steps} steps") and "final" in verdict
    command.resume()
    assert command.finish(60)[0] == 0 and "there is nothing to go on with" in command.text()
