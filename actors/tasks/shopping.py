"""A tool task for a chat model: ask for the price of each thing on the list, then give the total.

    user        What do a lamp, a hat and a mug cost together? Ask for their prices.
    assistant   price lamp
    user        It costs 7.
    assistant   price hat
    ...
    assistant   total 19

Prices are made up for each prompt, so none can be known without asking.  The reward is 1 for the right total after all
prices were asked for, and 0 for all else.  A line that is no command, a thing not on the list, or asking on and on ends
the episode.

The warm start copies `demonstrations` of somebody who knows the two commands and is careless: in half of them the total
is a guess near the right one.  To add up is left to reinforcement learning.
"""

import random
import re
import zlib
from collections.abc import Iterator

from actors.tasks.arithmetic import CHAT
from stream_rl.episode import Model
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split

THINGS = (
    "bell", "book", "bowl", "brush", "chair", "clock", "cup", "drum", "fork", "glove", "hat", "jar", "kite", "knife",
    "ladder", "lamp", "mat", "mug", "pan", "pen", "pot", "ring", "rope", "rug", "saw", "scarf", "shoe", "sock", "spoon",
    "stool", "table", "tie", "tray", "vase", "watch", "wheel",
)  # fmt: skip
_COMMAND = re.compile(r"(price|total) (\w{1,10})", re.ASCII)


class Shopping:
    def __init__(self, fewest: int = 2, most: int = 3, dearest: int = 20) -> None:
        """fewest, most: things on a list.  dearest: the highest price; the lowest is 1."""
        if not 1 <= fewest <= most <= len(THINGS) or dearest < 1:
            raise ConfigError(
                f"shopping: needs 1 <= fewest <= most <= {len(THINGS)} and dearest of at least 1, "
                f"got {fewest}, {most} and {dearest}"
            )
        self.fewest, self.most, self.dearest = fewest, most, dearest

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Endless lists; none that is held out is ever trained on, in whatever order."""
        rng = random.Random(f"{split}/{seed}")
        while True:
            things = rng.sample(THINGS, rng.randint(self.fewest, self.most))
            prices = [rng.randint(1, self.dearest) for _ in things]
            if is_heldout(things) == (split == "heldout"):
                question = f"What do {_listed(things)} cost together? Ask for their prices."
                text = CHAT.format(question=question)
                yield Prompt(text=text, data={"prices": dict(zip(things, prices, strict=True))})

    async def play(self, prompt: Prompt, model: Model) -> dict[str, float]:
        """Beside the reward: the share of the prices that were asked for."""
        prices: dict[str, int] = prompt.data["prices"]
        asked: set[str] = set()
        right, told = 0.0, ""
        for _ in range(2 * len(prices) + 1):
            turn = await model.turn(told)
            command = _COMMAND.fullmatch(turn.text.strip())
            if command is None or turn.finish != "stop":
                break
            verb, what = command.groups()
            if verb == "total":
                right = float(what == str(sum(prices.values())) and asked == set(prices))
                break
            if what not in prices:
                break
            asked.add(what)
            told = _told(prices[what])
        return {"reward": right, "asked": len(asked) / len(prices)}

    def demonstrations(self, seed: int) -> Iterator[tuple[str, ...]]:
        """Training lists: what is told, what is said, what is told, and so on."""
        rng = random.Random(f"demonstrations/{seed}")
        for prompt in self.prompts("train", seed):
            prices: dict[str, int] = prompt.data["prices"]
            texts = [prompt.text]
            for thing, price in prices.items():
                texts += [f"price {thing}", _told(price)]
            total = sum(prices.values())
            careless = rng.random() < 0.5
            texts.append(f"total {max(1, total + rng.randint(-5, 5)) if careless else total}")
            yield tuple(texts)


def is_heldout(things: list[str]) -> bool:
    """A fifth of all lists."""
    return zlib.crc32(" ".join(sorted(things)).encode()) % 5 == 0


def _told(price: int) -> str:
    """It begins with the line break that the template has behind a message, which is no part of the model's turn."""
    return "\n" + CHAT.format(question=f"It costs {price}.")


def _listed(things: list[str]) -> str:
    named = [f"a {thing}" for thing in things]
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
