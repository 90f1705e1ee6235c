"""A whole run of episodes: what the learner trains on is, id for id, what was sampled and what environments said."""

import itertools
import json
import pathlib
import time

import numpy as np
import pytest
from run_command import Command, Launch
from tokenizers import Tokenizer

from actors import leases

pytestmark = [pytest.mark.server, pytest.mark.timeout(500)]
TASK = '''
import asyncio, json, os, pathlib, random
from stream_rl.task import Prompt

HERE = pathlib.Path(__file__).parent

class Echo:
    """Three turns; says back a part of what it heard, and keeps a record of both."""
    def prompts(self, split, seed):
        rng = random.Random(f"{split}/{seed}")
        while True:
            yield Prompt(text=f"{rng.randrange(100000):05d}=", data={"split": split})

    async def play(self, prompt, model):
        said, heard = [prompt.text], []
        observation = ""
        for turn in range(3):
            answer = await model.turn(observation)
            heard.append(answer.text)
            await asyncio.sleep(0.05)
            observation = f"<{turn}:{ascii(answer.text[:3])}>"
            said.append(observation)
        if prompt.data["split"] == "train":
            with (HERE / f"played-{os.getpid()}.jsonl").open("a") as record:
                record.write(json.dumps([said[:-1], heard]) + "\\n")
        return 1.0 - len("".join(heard)) / 500
'''


def start(launch: Launch, directory: pathlib.Path, steps: int, *overrides: str) -> Command:
    (directory / "echo.py").write_text(TASK)
    return launch(
        steps,
        f"task.use={directory}/echo.py:Echo",
        "agent.max_turn_tokens=40",
        "learner.leases=record",
        *overrides,
    )


def check_leases(directory: pathlib.Path, command: Command) -> list[int]:
    """Every trajectory of every lease against what its environment said and heard.  Versions of each."""
    tokenizer = Tokenizer.from_file(str(directory / "model" / "tokenizer.json"))
    played = {
        json.dumps(json.loads(line))
        for path in directory.glob("played-*.jsonl")
        for line in path.read_text().splitlines()
    }
    versions = []
    for path in sorted((command.run / "leases").glob("*")):
        if path.suffix == ".npy" or "logprobs" in path.name:
            continue
        lease = leases.read(path)
        for end, length in zip(np.cumsum(lease.lengths), lease.lengths, strict=True):
            here = slice(end - length, end)
            ids, flags = lease.token_ids[here].tolist(), lease.sampled[here].tolist()
            runs = [
                (flag, [ids[i] for i in run]) for flag, run in itertools.groupby(range(length), key=lambda i: flags[i])
            ]
            said = [tokenizer.decode(run, skip_special_tokens=False) for flag, run in runs if not flag]
            heard = [tokenizer.decode(run, skip_special_tokens=True) for flag, run in runs if flag]
            assert json.dumps([said, heard]) in played
            assert [bool(flag) for flag, _ in runs] == [False, True] * 3
            sampled = lease.sampled[here] == 1
            assert (lease.logprobs[here][sampled] < 0).all() and not lease.logprobs[here][~sampled].any()
            steps = lease.steps[here][sampled].tolist()
            assert steps == sorted(steps)
            versions.append(len(set(steps)))
    return versions


def test_episodes_train_on_what_was_said_and_sampled(launch: Launch, tmp_path: pathlib.Path) -> None:
    command = start(launch, tmp_path, 6)
    command.wait_for_steps(1)
    command.find("environment_process").kill()  # its episodes are played again; this task is the same each time
    code, left = command.finish(300)
    assert code == 0, command.text()
    assert left == []
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["conserved"] is True
    assert set(summary["dropped"]) <= {"run_end"}, summary["dropped"]
    versions = check_leases(tmp_path, command)
    assert len(versions) >= 6 * 4 and max(versions) > 1


@pytest.mark.long
def test_episodes_survive_the_end_of_their_actor_and_of_their_engine(launch: Launch, tmp_path: pathlib.Path) -> None:
    command = start(launch, tmp_path, 25)
    command.wait_for_steps(2)
    command.kill("actors.rollout", "actor")
    command.wait_for_steps(2)
    command.kill("engines.sglang.server", "engine-0")
    command.wait_for_steps(2)
    time.sleep(0.5)
    code, left = command.finish(300)
    assert (code, left) == (0, []), command.text()
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["conserved"] is True
    assert set(summary["dropped"]) <= {"run_end", "environment_lost"}, summary["dropped"]
    check_leases(tmp_path, command)
