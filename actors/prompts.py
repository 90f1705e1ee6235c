"""The task's training prompts by number: group g is of prompt g, whoever opens it and however often."""

from collections.abc import Callable, Iterator
from typing import Any

from stream_rl import plain
from stream_rl.errors import TaskError, WireError
from stream_rl.task import Prompt

MAX_SKIPPED = 1024
"""Prompts kept because a later one was asked for first; the task is run from its beginning for others."""


class TrainingPrompts:
    def __init__(self, task: str, start: Callable[[], Iterator[Prompt]]) -> None:
        """`start` begins the same endless sequence anew; `task` is its name."""
        self._task, self._start = task, start
        self._iterator: Iterator[Prompt] | None = None
        self._next = 0
        self._skipped: dict[int, Prompt] = {}

    def get(self, number: int) -> Prompt:
        """Prompt `number`, counted from 0; mostly asked for in ascending order, each once.

        Raises TaskError when the user's task ends or raises: no single trajectory can pay for that.
        """
        if number in self._skipped:
            return self._skipped.pop(number)
        if number < self._next:
            self._iterator, self._next = None, 0
            self._skipped.clear()
        while True:
            prompt, here = self._take(), self._next
            self._next += 1
            if here == number:
                return prompt
            self._skipped[here] = prompt
            if len(self._skipped) > MAX_SKIPPED:
                del self._skipped[next(iter(self._skipped))]

    def _take(self) -> Prompt:
        try:
            if self._iterator is None:
                self._iterator = self._start()
            return next(self._iterator)
        except StopIteration:
            raise TaskError(f"{self._task}: prompts('train') ended; it must be endless") from None
        except Exception as error:
            raise TaskError(f"{self._task}: prompts('train') raised {type(error).__name__}: {error}") from error


def pack_problem(prompt: Prompt) -> bytes:
    """The prompt as `OpenGroup` and `Resume` carry it.  Raises TaskError if its data cannot travel."""
    try:
        return plain.pack({"text": prompt.text, "data": dict(prompt.data), "max": list(prompt.max_new_tokens)})
    except WireError as error:
        raise TaskError(f"Prompt.data of {prompt.text[:80]!r} cannot travel: {error}") from error


def unpack_problem(problem: bytes) -> Prompt:
    """Inverse of `pack_problem`.  Raises WireError for anything else."""
    value: Any = plain.unpack(problem)
    match value:
        case {"text": str(text), "data": dict(data), "max": list(most)} if all(type(each) is int for each in most):
            return Prompt(text=text, data=data, max_new_tokens=tuple(most))
    raise WireError("bad_problem", f"expected a prompt's text, data and budgets, got {value!r:.100}")
