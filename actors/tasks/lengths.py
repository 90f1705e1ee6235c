"""Answers of given lengths, to measure with: how long each member of a group may go on is drawn beforehand, from a
log-normal distribution, and `rollout.sampling.ignore_eos` lets none of them end before.

The reward is the share of an answer's characters that are among `wanted`: every policy can learn that, whatever it was
before and however long its answers are.
"""

import math
import random
from collections.abc import Iterator

from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split


class Lengths:
    """Tokens of an answer: `mean` on average before they are cut at `longest`, with `sigma` the spread of their
    logarithm."""

    def __init__(
        self,
        mean: float = 512.0,
        sigma: float = 1.2,
        longest: int = 8192,
        members: int = 8,
        wanted: str = "0123456789",
        prompt: str = "Write about the number {n}.\n",
    ) -> None:
        """members: of a group.  prompt: `{n}` becomes another number each time."""
        if not (1 <= mean <= longest and sigma >= 0 and members >= 1 and wanted):
            raise ConfigError(
                f"lengths: needs 1 <= mean <= longest, sigma of at least 0, members and wanted, got {mean}, {longest}, "
                f"{sigma}, {members} and {wanted!r}"
            )
        self.longest, self.members, self.wanted, self.prompt = longest, members, frozenset(wanted), prompt
        self._mu, self._sigma = math.log(mean) - sigma**2 / 2, sigma

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        rng = random.Random(f"{split}/{seed}")
        while True:
            text = self.prompt.format(n=rng.randrange(1_000_000))
            yield Prompt(text=text, max_new_tokens=tuple(self.length(rng) for _ in range(self.members)))

    def length(self, rng: random.Random) -> int:
        return min(self.longest, max(1, round(math.exp(rng.gauss(self._mu, self._sigma)))))

    def reward(self, prompt: Prompt, completion: str) -> float:
        return sum(character in self.wanted for character in completion) / max(1, len(completion))
