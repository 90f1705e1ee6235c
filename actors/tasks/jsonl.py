"""Prompts from a JSON-lines file, and a reward by name.

Each line is one object with at least "prompt" (text) and whatever the reward needs, usually "answer":

    {"prompt": "7 + 5 = ", "answer": "12"}

    [task]
    use = "actors.tasks.jsonl:JsonLines"
    options = { path = "train.jsonl", heldout_path = "test.jsonl", reward = "number" }

`reward` is one of the names below or a dotted path "package.module:function"; the function takes the completion and
the line's object, and returns a number, or a mapping with the key "reward".
"""

import importlib
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stream_rl.errors import ConfigError, TaskError, WireError
from stream_rl.plain import pack
from stream_rl.task import Prompt, Split

Record = Mapping[str, Any]
Reward = Callable[[str, Record], float | Mapping[str, float]]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(completion: str, record: Record) -> float:
    """1 if the completion is the answer, spaces at either end aside."""
    return float(completion.strip() == str(record["answer"]).strip())


def contains(completion: str, record: Record) -> float:
    """1 if the answer occurs in the completion."""
    return float(str(record["answer"]) in completion)


def number(completion: str, record: Record) -> float:
    """1 if the last number of the completion equals the answer: 1,200.0 is 1200."""
    found = NUMBER.findall(completion)
    return float(bool(found) and _value(found[-1]) == _value(str(record["answer"])))


REWARDS: dict[str, Reward] = {"exact": exact, "contains": contains, "number": number}


class JsonLines:
    """Lines of a file as prompts: shuffled by seed and repeated for ever for training, in order and once for
    held-out.  Without `heldout_path` there are no held-out prompts."""

    def __init__(self, path: str, reward: str = "exact", heldout_path: str = "") -> None:
        self.paths: dict[Split, str] = {"train": path, "heldout": heldout_path}
        for given in filter(None, (path, heldout_path)):
            if not pathlib.Path(given).is_file():
                raise ConfigError(f"task.options: no file {pathlib.Path(given).resolve()}")
        self.needs_answer = reward in REWARDS
        self.needs_number = reward == "number"
        self.function = REWARDS[reward] if self.needs_answer else _by_path(reward)

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """The file is read and checked here, not at the first prompt.  Raises TaskError naming file and line."""
        if not self.paths[split]:
            return iter(())
        prompts = self._read(pathlib.Path(self.paths[split]))
        return iter(prompts) if split == "heldout" else _forever(prompts, seed)

    def reward(self, prompt: Prompt, completion: str) -> float | Mapping[str, float]:
        return self.function(completion, prompt.data)

    def _read(self, path: pathlib.Path) -> list[Prompt]:
        prompts = []
        try:
            with path.open(encoding="utf-8") as file:
                for number_of_line, line in enumerate(file, 1):
                    if line.strip():
                        prompts.append(self._prompt(line, f"{path}:{number_of_line}"))
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"cannot read {path} as UTF-8 text: {error}") from error
        if not prompts:
            raise TaskError(f'{path} has no lines; expected one {{"prompt": ..., "answer": ...}} a line')
        return prompts

    def _prompt(self, line: str, where: str) -> Prompt:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TaskError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise TaskError(f'{where}: expected an object {{"prompt": ..., "answer": ...}}, got {line.strip()[:60]!r}')
        text = record.get("prompt")
        if not isinstance(text, str) or not text:
            raise TaskError(f'{where}: "prompt" must be a text that is not empty, got {text!r}')
        if self.needs_answer and not isinstance(record.get("answer"), str | int | float):
            raise TaskError(f'{where}: "answer" must be a text or a number, got {record.get("answer")!r}')
        if self.needs_number and _value(str(record["answer"])) is None:
            raise TaskError(f'{where}: reward "number" needs a number as "answer", got {record["answer"]!r}')
        try:
            pack(record)
        except WireError as error:
            raise TaskError(f"{where} cannot go to the reward process: {error}") from error
        return Prompt(text=text, data=record)


def _forever(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    epoch = 0
    while True:
        order = list(range(len(prompts)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from (prompts[i] for i in order)
        epoch += 1


def _value(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _by_path(reward: str) -> Reward:
    module_name, _, name = reward.rpartition(":")
    known = f'one of {", ".join(sorted(REWARDS))}, or "package.module:function"'
    if not module_name or not name:
        raise ConfigError(f"task.options.reward must be {known}, got {reward!r}")
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"task.options.reward: cannot import {module_name!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"task.options.reward: {module_name} has no function {name!r}; it must be {known}")
    made: Reward = function
    return made
