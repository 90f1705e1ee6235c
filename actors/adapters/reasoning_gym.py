"""Tasks of the package `reasoning-gym`, whose datasets make their own problems and judge the answers.

    [task]
    use = "actors.adapters.reasoning_gym:ReasoningGymChat"

    [task.options.datasets.leg_counting]
    [task.options.datasets.chain_sum]
    weight = 2.0        # drawn twice as often
    max_terms = 4       # the dataset's own option

`ReasoningGym` gives a question as it is, for a model that continues text; `ReasoningGymChat` as messages in the model's
own template.  The answer is what stands between the last <answer> and </answer>, or else all that the model said.
"""

import ast
import inspect
import itertools
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from stream_rl.episode import Model
from stream_rl.errors import ConfigError, TaskError
from stream_rl.task import Prompt, Split

INSTRUCTION = "Think it through, then give only your final answer between <answer> and </answer>."
_ANSWER = re.compile(r".*<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym:
    """Questions of several datasets, drawn by weight.  A hash of the question decides whether it is held out, so that
    no seed ever trains on what another evaluates."""

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any]],
        size: int = 10_000,
        heldout_share: float = 0.1,
        instruction: str = INSTRUCTION,
    ) -> None:
        """datasets: for each its options, and its weight.  size: problems that each has, for one seed.

        Raises ConfigError for a dataset that there is none of, or options that it has not.
        """
        if not datasets or size < 1 or not 0.0 <= heldout_share < 1.0:
            raise ConfigError(
                f"reasoning_gym: needs datasets, size of at least 1 and heldout_share in 0..1, got {dict(datasets)}, "
                f"{size} and {heldout_share}"
            )
        self._gym = _import_gym()
        self._weights = {name: float(options.get("weight", 1.0)) for name, options in datasets.items()}
        self._options = {name: {k: v for k, v in own.items() if k != "weight"} for name, own in datasets.items()}
        self._size, self._heldout_share, self._instruction = size, heldout_share, instruction
        if min(self._weights.values()) < 0 or not sum(self._weights.values()):
            raise ConfigError(f"reasoning_gym: weights must be 0 or more, one above, got {self._weights}")
        self._judges = {name: self._make(name, 0) for name in datasets}

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Training questions come again as they are drawn; no held-out question comes twice.

        Raises TaskError when a dataset makes nothing that belongs to the split.
        """
        rng, seen, missed = random.Random(f"{split}/{seed}"), set[str](), 0
        names, weights = list(self._weights), list(self._weights.values())
        made = {name: self._make(name, seed) for name in names if self._weights[name]}
        for _ in range(self._size * len(names)) if split == "heldout" else itertools.count():
            (name,) = rng.choices(names, weights)
            entry = made[name][rng.randrange(self._size)]
            question = entry["question"]
            missed += 1
            if missed > self._size and split == "train":
                raise TaskError(f"reasoning_gym: {self._size} draws in a row were all held out; raise size")
            if self._is_heldout(name, question) == (split == "heldout") and question not in seen:
                if split == "heldout":
                    seen.add(question)
                missed = 0
                yield Prompt(text=self._text(question), data={"dataset": name, "entry": _literal(name, entry)})

    def reward(self, prompt: Prompt, completion: str) -> float:
        """The dataset's own score, from 0 to 1."""
        found = _ANSWER.match(completion)
        answer = (found[1] if found else completion).strip()
        entry = ast.literal_eval(prompt.data["entry"])
        return float(self._judges[prompt.data["dataset"]].score_answer(answer, entry))

    def _text(self, question: str) -> str:
        return f"{question}\n"

    def _make(self, name: str, seed: int) -> Any:
        gym = self._gym
        if name not in gym.factory.DATASETS or name == "composite":
            raise ConfigError(f"reasoning_gym has no dataset {name!r}; it has {sorted(gym.factory.DATASETS)}")
        try:
            return gym.create_dataset(name, seed=seed, size=self._size, **self._options[name])
        except (TypeError, AssertionError, ValueError) as error:
            known = [field for field in inspect.signature(gym.factory.DATASETS[name][1]).parameters if field != "seed"]
            raise ConfigError(f"reasoning_gym: {name} cannot be made: {error}; its options are {known}") from error

    def _is_heldout(self, name: str, question: str) -> bool:
        return zlib.crc32(f"{name}/{question}".encode()) < self._heldout_share * (1 << 32)


class ReasoningGymChat(ReasoningGym):
    """The same in one turn of a chat."""

    async def play(self, prompt: Prompt, model: Model) -> float:
        messages = [{"role": "system", "content": self._instruction}] if self._instruction else []
        question = ast.literal_eval(prompt.data["entry"])["question"]
        turn = await model.turn([*messages, {"role": "user", "content": question}])
        return self.reward(prompt, turn.text)

    def _text(self, question: str) -> str:
        return ""


def _literal(name: str, entry: Mapping[str, Any]) -> str:
    """An entry for the process that judges it, exactly: some datasets tell tuples from lists, and some would not make
    the same one again.  Raises TaskError for one that is more than Python's literals."""
    text = repr(dict(entry))
    try:
        same = ast.literal_eval(text) == entry
    except (ValueError, SyntaxError) as error:
        raise TaskError(f"reasoning_gym: an entry of {name} cannot travel to the reward process: {error}") from error
    if not same:
        raise TaskError(f"reasoning_gym: an entry of {name} is another after travelling to the reward process")
    return text


def _import_gym() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"actors.adapters.reasoning_gym needs the package reasoning-gym ({error}): pip install 'stream-rl"
            "[reasoning-gym]'"
        ) from error
    return reasoning_gym
