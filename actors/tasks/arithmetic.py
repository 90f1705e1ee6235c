"""Small sums for small models: additions, products, letters to count; the last number of an answer counts.

What is asked grows with the number of the prompt: over the first `ramp` of them the operands (and words) grow to their
full size, so that a model which can do little finds something that it sometimes does.  Held-out questions are of full
size, come in turn from every kind, and none of them is ever trained on.

The parts of the reward are each kind's, and how many of that kind there were: their means' ratio is its accuracy.
"""

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping

from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split

CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
"""ChatML, as SmolLM2 and Qwen have it, without a system message."""
WORDS = (
    "apple", "banana", "bottle", "butter", "cabbage", "carrot", "cheese", "cotton", "dinner", "eleven", "engine",
    "flower", "garden", "hammer", "island", "jacket", "kitten", "ladder", "letter", "mirror", "needle", "orange",
    "pepper", "puddle", "rabbit", "ribbon", "saddle", "silver", "spoon", "summer", "tomato", "tunnel", "violet",
    "wagon", "window", "yellow", "zipper", "mississippi", "committee", "assessment", "bookkeeper", "parallel",
)  # fmt: skip
_NUMBER = re.compile(r"-?\d+")
Asked = tuple[str, int]
"""A question and its answer."""


def _addition(rng: random.Random, size: float) -> Asked:
    most = max(2, round(20 * size))
    a, b = rng.randint(1, most), rng.randint(1, most)
    return f"What is {a} + {b}?", a + b


def _addition2(rng: random.Random, size: float) -> Asked:
    most = max(12, round(99 * size))
    a, b = rng.randint(10, most), rng.randint(10, most)
    return f"What is {a} + {b}?", a + b


def _subtraction(rng: random.Random, size: float) -> Asked:
    most = max(3, round(30 * size))
    a, b = sorted((rng.randint(1, most), rng.randint(1, most)), reverse=True)
    return f"What is {a} - {b}?", a - b


def _product(rng: random.Random, size: float) -> Asked:
    most = max(3, round(12 * size))
    a, b = rng.randint(2, most), rng.randint(2, most)
    return f"What is {a} times {b}?", a * b


def _letters(rng: random.Random, size: float) -> Asked:
    word = rng.choice(WORDS)[: max(4, round(12 * size))]
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeiostr")
    return f'How many times does the letter "{letter}" occur in "{word}"?', word.count(letter)


KINDS: dict[str, Callable[[random.Random, float], Asked]] = {
    "addition": _addition,
    "addition2": _addition2,
    "subtraction": _subtraction,
    "product": _product,
    "letters": _letters,
}
"""A question of a kind, from a generator and a size in 0..1."""


class Arithmetic:
    def __init__(
        self,
        kinds: Mapping[str, float] = {"addition": 1.0, "product": 1.0, "letters": 1.0},
        ramp: int = 0,
        suffix: str = " Give only the number.",
        template: str = CHAT,
    ) -> None:
        """kinds: how often each is drawn, in proportion.  ramp: prompts until questions have their full size."""
        if not kinds or not set(kinds) <= set(KINDS) or min(kinds.values()) < 0 or not sum(kinds.values()):
            raise ConfigError(f"arithmetic: kinds must be some of {sorted(KINDS)} with weights, got {dict(kinds)}")
        if ramp < 0 or "{question}" not in template:
            raise ConfigError(f"arithmetic: needs ramp of at least 0 and {{question}} in template, got {ramp}")
        self.kinds, self.ramp, self.suffix, self.template = dict(kinds), ramp, suffix, template

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        rng, names, weights = random.Random(f"{split}/{seed}"), list(self.kinds), list(self.kinds.values())
        turns = itertools.cycle(name for name in names if self.kinds[name])
        for number in itertools.count():
            name = next(turns) if split == "heldout" else rng.choices(names, weights)[0]
            size = 1.0 if split == "heldout" or number >= self.ramp else 0.3 + 0.7 * number / self.ramp
            while True:
                question, answer = KINDS[name](rng, size)
                if is_heldout(question) == (split == "heldout"):
                    break
            text = self.template.format(question=question + self.suffix)
            yield Prompt(text=text, data={"kind": name, "answer": answer})

    def reward(self, prompt: Prompt, completion: str) -> dict[str, float]:
        numbers, kind = _NUMBER.findall(completion), prompt.data["kind"]
        right = float(bool(numbers) and int(numbers[-1]) == prompt.data["answer"]) if _is_short(numbers) else 0.0
        return {"reward": right, kind: right, f"{kind}_asked": 1.0}


def is_heldout(question: str) -> bool:
    """A fifth of all questions."""
    return zlib.crc32(question.encode()) % 5 == 0


def _is_short(numbers: list[str]) -> bool:
    """Python refuses to read numbers of thousands of digits."""
    return not numbers or len(numbers[-1]) < 20
