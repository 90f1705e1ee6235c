"""What a user writes: prompts, and a reward; or, for a task of many turns, `play` (see stream_rl/episode.py).

A task is one small class in one file.  It is imported in two places, the rollout actor (prompts) and the reward or
environment processes (reward, play), so it must be cheap to make and must not share state between the two.

    class Reverse:
        def __init__(self, words: int = 3) -> None: ...

        def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
            rng = random.Random(f"{split}/{seed}")
            while True:
                word = "".join(rng.choices("abc", k=self.words))
                yield Prompt(text=word + "=", data={"answer": word[::-1]})

        def reward(self, prompt: Prompt, completion: str) -> float:
            return float(completion == prompt.data["answer"])
"""

import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from stream_rl.errors import ConfigError, TaskError

Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to continue, and what the reward needs."""

    text: str
    """Tokenized once, as it is."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Anything that msgpack can carry to the reward process."""
    max_new_tokens: tuple[int, ...] = ()
    """Of the answer of each member of its group, the last standing for all further ones; within
    `rollout.max_new_tokens`, which holds for all if there are none here.  For tasks with `reward`."""


class Task(Protocol):
    """Prompts, and a reward or `play`."""

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Prompts in a reproducible order: endless (or repeating) for training, finite or endless for held-out."""
        ...

    def reward(self, prompt: Prompt, completion: str) -> float | Mapping[str, float]:
        """Score of one completion, its stop token left out.  A mapping gives parts; its key "reward" is the score.
        Raising, or taking too long, costs this one trajectory."""
        ...


def plays(task: Task) -> bool:
    """Whether it has `play`, whose episodes have as many turns as they like; then it needs no `reward`."""
    return callable(getattr(task, "play", None))


def load_task(target: str, options: Mapping[str, Any]) -> Task:
    """The task named by `target`: "package.module:Class" or "path/to/file.py:Class", made with `options`.

    Raises ConfigError for a name that leads nowhere or options that do not fit, TaskError if its constructor raises.
    """
    module_name, _, class_name = target.rpartition(":")
    if not module_name or not class_name:
        raise ConfigError(f'task.use must be "package.module:Class" or "path/file.py:Class", got {target!r}')
    cls = getattr(_module(module_name, target), class_name, None)
    if cls is None:
        raise ConfigError(f"task.use: {module_name} has no {class_name!r}; check the name after the colon")
    try:
        task = cls(**options)
    except ConfigError:
        raise
    except TypeError as error:
        raise ConfigError(f"task.options do not fit {target}: {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise TaskError(f"{target} raised while it was made: {type(error).__name__}: {error}") from error
    if not callable(getattr(task, "prompts", None)):
        raise ConfigError(f"{target} is no task: it needs a method prompts(); see stream_rl/task.py")
    if plays(task):
        if not inspect.iscoroutinefunction(task.play):
            raise ConfigError(f"{target}: play must be a coroutine: async def play(self, prompt, model)")
    elif not callable(getattr(task, "reward", None)):
        raise ConfigError(f"{target} is no task: it needs a method reward(), or play() for many turns; see stream_rl/")
    return cast(Task, task)


def task_file(target: str) -> pathlib.Path:
    """The source file of a task that `load_task` takes."""
    name = target.rpartition(":")[0]
    if name.endswith(".py"):
        return pathlib.Path(name)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"task.use: {name!r} has no source file")
    return pathlib.Path(spec.origin)


def _module(name: str, target: str) -> Any:
    if name.endswith(".py"):
        path = pathlib.Path(name).resolve()
        if not path.is_file():
            raise ConfigError(f"task.use: no file {path}")
        spec = importlib.util.spec_from_file_location(f"stream_rl_task_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loader = spec.loader.exec_module
    else:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"task.use: cannot import {name!r} of {target!r}: {error}") from error
    try:
        loader(module)
    except Exception as error:  # the user's file may raise anything
        raise TaskError(f"{target} raised while it was imported: {type(error).__name__}: {error}") from error
    return module
