"""Environments of the package `verifiers`, played through the endpoint by their own agents.

    [task]
    use = "actors.adapters.verifiers:Verifiers"

    [task.options]
    python = "venvs/verifiers/bin/python"       # an interpreter that has the package, and the environment
    [task.options.env]                          # its own configuration, under its own names
    taskset = { id = "gsm8k" }
    agent = { harness = { id = "null" }, runtime = { type = "subprocess" } }

`verifiers` needs another version of the package openai than SGLang does, so it runs in a process with an interpreter of
its own (verifiers_program.py); each environment process starts one, for all of its episodes.  A harness is a program of
`verifiers` that its runtime installs with uv; the runtime "subprocess" runs it on this machine, unprotected.
"""

import asyncio
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from actors.adapters import verifiers_program
from stream_rl.episode import EpisodeFailed, Model
from stream_rl.errors import ConfigError, TaskError
from stream_rl.task import Prompt, Split

ANSWER_BYTES = 64 << 20
DIED = "environment_died"


class Verifiers:
    """The tasks of one taskset.  A hash of a task's data decides whether it is held out."""

    def __init__(
        self,
        env: Mapping[str, Any],
        python: str = sys.executable,
        tasks: int = 10_000,
        heldout_share: float = 0.1,
        start_timeout_s: float = 300.0,
    ) -> None:
        """tasks: that are taken of the taskset, at most."""
        if not os.access(python, os.X_OK):
            raise ConfigError(f"verifiers: python = {python!r} is no interpreter; name one that has `verifiers`")
        if tasks < 1 or not 0.0 <= heldout_share < 1.0 or start_timeout_s <= 0:
            raise ConfigError(
                "verifiers: needs tasks >= 1, heldout_share in 0..1 and start_timeout_s above 0, got "
                f"{tasks}, {heldout_share} and {start_timeout_s}"
            )
        # -P: beside the program is a module of the name of the package
        self._command = [str(pathlib.Path(python).absolute()), "-P", verifiers_program.__file__]
        self._opening = json.dumps({"env": env, "tasks": tasks}).encode() + b"\n"
        self._heldout_share, self._start_timeout_s = heldout_share, start_timeout_s
        # as uv finds Python where the interpreter is, and needs no other
        paths = f"{pathlib.Path(python).absolute().parent}:{os.environ.get('PATH', os.defpath)}"
        self._environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": paths}
        self._starting = asyncio.Lock()
        self._program: _Program | None = None

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Training tasks come in another order each time round; held-out ones once.

        Raises ConfigError if the environment cannot be loaded, TaskError if it has no tasks for the split.
        """
        keys = self._keys()
        least = self._heldout_share * (1 << 32)
        mine = [at for at, key in enumerate(keys) if (zlib.crc32(key.encode()) < least) == (split == "heldout")]
        if not mine and split == "train":
            raise TaskError(f"verifiers: all of {len(keys)} tasks are held out; lower heldout_share")
        rng = random.Random(f"{split}/{seed}")
        for _ in range(1) if split == "heldout" else itertools.count():
            rng.shuffle(mine)
            yield from (Prompt(text="", data={"task": at, "key": keys[at]}) for at in mine)

    async def play(self, prompt: Prompt, model: Model) -> Mapping[str, float]:
        """The reward of `verifiers`, with its metrics.  Raises EpisodeFailed where the environment failed."""
        async with self._starting:
            if self._program is None or self._program.is_over:
                self._program = _Program()
                await self._program.start(self._command, self._environment, self._opening, self._start_timeout_s)
        keys, task = self._program.keys, prompt.data["task"]
        if task >= len(keys) or keys[task] != prompt.data["key"]:
            raise EpisodeFailed("environment_raised", "the taskset gives other tasks each time; seed what it draws")
        return await self._program.play(task, f"{model.base_url}/v1", model.key)

    def _keys(self) -> list[str]:
        """Of the taskset's tasks, asked of a process that ends with the answer."""
        try:
            done = subprocess.run(
                self._command,
                input=self._opening,
                stdout=subprocess.PIPE,
                env=self._environment,
                timeout=self._start_timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"verifiers: the environment did not load within {self._start_timeout_s} s") from error
        first = done.stdout.partition(b"\n")[0]
        try:
            return _keys_of(json.loads(first))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError("verifiers: the environment's process ended early; its stderr says why") from error


class _Program(asyncio.SubprocessProtocol):
    """The process that plays, and what it has said.  It ends with our process, which ends its input."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.is_over = False
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        """By the number of an episode; 0: the first line."""
        self._said = bytearray()
        self._process: asyncio.SubprocessTransport

    async def start(self, command: list[str], environment: Mapping[str, str], opening: bytes, timeout_s: float) -> None:
        """Raises EpisodeFailed if it does not come up; a later episode may try again."""
        loop = asyncio.get_running_loop()
        self._process, _ = await loop.subprocess_exec(lambda: self, *command, stderr=None, env=environment)
        try:
            async with asyncio.timeout(timeout_s):
                self.keys = _keys_of(await self._ask(0, opening))
        except BaseException as error:
            self._end("it did not start")
            if isinstance(error, TimeoutError | ConfigError):
                raise EpisodeFailed(DIED, f"the process of verifiers did not start: {error}") from error
            raise

    async def play(self, task: int, url: str, key: str) -> Mapping[str, float]:
        number = next(self._numbers)
        asked = {"episode": number, "task": task, "url": url, "key": key}
        try:
            said = await self._ask(number, json.dumps(asked).encode() + b"\n")
        except asyncio.CancelledError:
            self._tell(json.dumps({"cancel": number}).encode() + b"\n")
            raise
        if "failure" in said:
            raise EpisodeFailed(str(said["failure"]), str(said["detail"]))
        return {**said["metrics"], "reward": said["reward"]}

    async def _ask(self, number: int, line: bytes) -> dict[str, Any]:
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell(line)
            return await self._waiting[number]
        finally:
            del self._waiting[number]

    def _tell(self, line: bytes) -> None:
        stdin = self._process.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        stdin.write(line)  # a line for each episode, which is one of few: what waits here is bounded

    # -- the process's side ------------------------------------------------------------------------------------

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._said += data
        *lines, rest = self._said.split(b"\n")
        self._said = bytearray(rest)
        try:
            for line in lines:
                said = json.loads(line)
                waiting = self._waiting.get(said.get("episode", 0))
                if waiting is not None and not waiting.done():
                    waiting.set_result(said)
        except (ValueError, AttributeError) as error:
            self._end(f"it said what it should not: {error}")
        if len(self._said) > ANSWER_BYTES:
            self._end(f"it said a line of more than {ANSWER_BYTES} bytes")

    def process_exited(self) -> None:
        self._end("it has ended; its stderr says why")

    def _end(self, why: str) -> None:
        self.is_over = True
        self._process.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"failure": DIED, "detail": f"the process of verifiers: {why}"})


def _keys_of(said: Mapping[str, Any]) -> list[str]:
    """Raises ConfigError for an environment that could not be loaded."""
    if "keys" not in said:
        raise ConfigError(f"verifiers: the environment cannot be loaded: {said.get('error', said.get('detail'))}")
    return list(said["keys"])
