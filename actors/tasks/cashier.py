"""The quick start's task: pay an amount with as few coins as possible, and write down what is left after each coin.

Every decimal place has two coins, a one (lower case) and a five (upper case), "a" being the leftmost place:

    prompt      00709=
    completion  C00209c00109c00009E00004e00003e00002e00001e00000

The reward is the cube of (fewest coins possible / coins used), or 0 if anything is wrong: a coin that is not there,
a coin larger than its digit, a false remainder, anything but zeros at the end.  So it says how good a payment was,
never what to do; a long payment is worth nothing if one of its hundred tokens is false.

The warm start copies `demonstrations` of a cashier who is careful but fond of small coins: wherever a five would fit,
it takes a one with probability `fondness`.  What reinforcement learning has to find out is to take the five, whatever
the place and the digit, and to make no slips.

How long the shortest answer is follows a log-normal distribution, so output lengths are long-tailed.
"""

import math
import random
import zlib
from collections.abc import Iterator
from typing import Literal

from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split

ONES, FIVES = "abcdefgh", "ABCDEFGH"
Part = Literal["train", "validation", "heldout"]


class Cashier:
    """Amounts of a fixed number of digits.  A hash of the amount decides which part it belongs to: a tenth is held
    out, a tenth is for choosing settings (`part="validation"` of `amounts`), and training never sees either."""

    def __init__(self, digits: int = 5, median_coins: float = 4.0, spread: float = 0.85, fondness: float = 0.7) -> None:
        if not 1 <= digits <= len(ONES):
            raise ConfigError(f"cashier: digits must be 1 to {len(ONES)}, got {digits}")
        if not (median_coins >= 1 and spread > 0 and 0 <= fondness <= 1):
            raise ConfigError(
                "cashier: needs median_coins >= 1, spread > 0 and fondness in 0..1, "
                f"got {median_coins}, {spread} and {fondness}"
            )
        self.digits = digits
        self.median_coins = median_coins
        self.spread = spread
        self.fondness = fondness

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        """Training prompts repeat as their distribution has it; no held-out prompt comes twice."""
        amounts = self.amounts(split, seed)
        if split == "heldout":
            amounts = _distinct(amounts)
        return (Prompt(text=amount + "=", data={"amount": amount}) for amount in amounts)

    def reward(self, prompt: Prompt, completion: str) -> float:
        amount: str = prompt.data["amount"]
        used = coins_used(amount, completion)
        return (fewest_coins(amount) / used) ** 3 if used else 0.0

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        """(prompt, completion) of the cashier who is fond of small coins, on amounts of the training part."""
        rng = random.Random(f"demonstrations/{seed}")
        for amount in self.amounts("train", seed):
            yield amount + "=", self._pay(rng, amount)

    def amounts(self, part: Part, seed: int) -> Iterator[str]:
        """Endless amounts of one part, in a reproducible order."""
        rng = random.Random(f"{part}/{seed}")
        while True:
            coins = round(self.median_coins * math.exp(rng.gauss(0, self.spread)))
            if 1 <= coins <= 5 * self.digits and part_of(amount := self._amount(rng, coins)) == part:
                yield amount

    def _amount(self, rng: random.Random, coins: int) -> str:
        """One that takes at least this many coins."""
        places = [0] * self.digits
        while coins:
            place = rng.randrange(self.digits)
            if places[place] < 5:
                places[place] += 1
                coins -= 1
        # A place of k coins is the digit k, or k + 4 with a five in it; of five coins only 9.  Most have a five, or
        # there would be little to save.
        return "".join(str(k + 4 if k == 5 or (k and rng.random() < 0.75) else k) for k in places)

    def _pay(self, rng: random.Random, amount: str) -> str:
        left, written = [int(digit) for digit in amount], []
        for place in range(self.digits):
            while left[place]:
                five = left[place] >= 5 and rng.random() >= self.fondness
                left[place] -= 5 if five else 1
                written.append((FIVES if five else ONES)[place] + "".join(map(str, left)))
        return "".join(written)


def part_of(amount: str) -> Part:
    bucket = zlib.crc32(amount.encode()) % 10
    return "heldout" if bucket == 0 else "validation" if bucket == 1 else "train"


def fewest_coins(amount: str) -> int:
    return sum(int(digit) // 5 + int(digit) % 5 for digit in amount)


def coins_used(amount: str, completion: str) -> int:
    """Coins of a payment that is right in every letter and digit; 0 if it is not."""
    left, step = [int(digit) for digit in amount], len(amount) + 1
    for start in range(0, len(completion), step):
        coin, remainder = completion[start], completion[start + 1 : start + step]
        value, places = (1, ONES) if coin in ONES else (5, FIVES)
        place = places.find(coin)
        if not 0 <= place < len(left) or left[place] < value:
            return 0
        left[place] -= value
        if remainder != "".join(map(str, left)):
            return 0
    return 0 if any(left) else len(completion) // step


def _distinct(amounts: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for amount in amounts:
        if amount not in seen:
            seen.add(amount)
            yield amount
