"""`stream-rl train` on a small model, started as people start it, and what tests ask and do to it."""

import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from scripts import tiny_model
from scripts.records import read

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROCESSES = {
    "queue": "queues.process",
    "publisher": "engines.weights.publisher",
    "learner": "actors.learner",
    "actor": "actors.rollout",
    "engine-0": "engines.sglang.server",
}
"""Word of its command line by name."""
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

    def __init__(self, directory: pathlib.Path, steps: int, *overrides: str) -> None:
        tiny_model.create(directory / "model", seed=0)
        (directory / "moody.py").write_text(TASK)
        (directory / "recipe.toml").write_text(RECIPE.format(directory=directory, steps=steps))
        self.run = directory / "runs" / "small"
        self.output = (directory / "output.txt").open("w+")
        self.process = self._start(str(directory / "recipe.toml"), *overrides)

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", "train", *words],
            stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def resume(self, *overrides: str) -> None:
        """Go on with the run, which has ended or been killed."""
        self.process.wait(60)
        self.process = self._start(str(self.run), "--resume", *overrides)

    def kill_everything(self) -> None:
        """kill -9 of the command and of all its processes, as a machine ends them that loses its power."""
        for process in [psutil.Process(self.process.pid), *self.tree()]:
            process.kill()

    def text(self) -> str:
        self.output.flush()
        return pathlib.Path(self.output.name).read_text()

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, word: str) -> psutil.Process:
        return next(p for p in self.tree() if word in " ".join(p.cmdline()))

    def wait_for_steps(self, count: int) -> None:
        """Until so many more steps were taken."""
        taken = len(read(self.run)["step"])
        self.wait(lambda: len(read(self.run)["step"]) >= taken + count)

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)

    def kill(self, word: str, name: str) -> None:
        """kill -9, and wait until it was started again."""
        before = self.restarts(name)
        self.find(word).kill()
        self.wait(lambda: self.restarts(name) > before)

    def restarts(self, name: str) -> int:
        return sum(record["name"] == name for record in read(self.run)["restart"])

    def finish(self, timeout: float) -> tuple[int, list[psutil.Process]]:
        """Exit status, and what is left of the processes that were there when this was called."""
        tree = self.tree()
        code = self.process.wait(timeout)
        return code, alive(tree)


Launch = Callable[..., Command]
