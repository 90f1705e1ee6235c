"""The agent recipe's task: find out where a parcel goes, from news that may be old, before the office closes.

Names are three letters.  The prompt is whom the parcel is for, and every observation a name and how many days old the
news of it is.  A turn is one letter, for the tool, and one name:

    prompt   kfd0
    turn     akfd     ask around where kfd's parcels go now: one hour
    told     mrt7     to mrt, they say; that was seven days ago
    turn     cmrt     check the name in the register: three hours
    told     bwx0     it is bwx, as of today
    turn     abwx
    told     QPO2     a name in capitals is where the parcel goes in the end
    turn     gQPO     give it to QPO; this ends the episode

News is right if it is at most `trusted_days` old, and leads astray if it is older; the register is always right.  The
reward is 1 for the right receiver in time, and 0 for all else.  There is time for a check of all that is too old, and
for none beside, so neither trust nor caution by itself gets far.

The warm start copies `demonstrations` of a courier who knows the tools but not the town: the older the news, the more
often it is checked, but with no day from which on it always or mostly is; the oldest with probability `caution`.  What
reinforcement learning has to find out, from late and lost parcels alone, is that day.
"""

import random
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stream_rl.episode import Model
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split

ASK, CHECK, GIVE = "a", "c", "g"
HOURS = {ASK: 1, CHECK: 3}
OLDEST = 9
"""Days: one digit."""
Part = Literal["train", "validation", "heldout"]


class Courier:
    """A hash of the first name decides which part an errand belongs to: a tenth is held out, a tenth is for choosing
    settings (`part="validation"` of `errands`), and no training errand begins with these names."""

    def __init__(
        self, fewest: int = 2, most: int = 6, trusted_days: int = 4, spare_hours: int = 2, caution: float = 0.5
    ) -> None:
        """fewest, most: names that are to be found on an errand."""
        if not 1 <= fewest <= most <= 20:
            raise ConfigError(f"courier: needs 1 <= fewest <= most <= 20, got {fewest} and {most}")
        if not (0 <= trusted_days < OLDEST and spare_hours >= 0 and 0 < caution < 1):
            raise ConfigError(
                f"courier: needs trusted_days in 0..{OLDEST - 1}, spare_hours >= 0 and caution between 0 and 1, "
                f"got {trusted_days}, {spare_hours} and {caution}"
            )
        self.fewest, self.most = fewest, most
        self.trusted_days, self.spare_hours = trusted_days, spare_hours
        self.caution = caution

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        return self.errands(split, seed)

    async def play(self, prompt: Prompt, model: Model) -> float:
        errand = self.errand(prompt)
        turn = await model.turn()
        while (told := errand.take(turn.text if turn.finish == "stop" else "")) is not None:
            turn = await model.turn(told)
        return errand.reward

    def errands(self, part: Part, seed: int | str) -> Iterator[Prompt]:
        """Endless errands of one part, each through a town of its own, in a reproducible order."""
        rng = random.Random(f"{part}/{seed}")
        while True:
            name, links, town = _name(rng), rng.randint(self.fewest, self.most), rng.getrandbits(60)
            if part_of(name) == part:
                yield Prompt(text=name + "0", data={"links": links, "town": town})

    def errand(self, prompt: Prompt) -> "Errand":
        """From its start."""
        return Errand(prompt.text[:-1], prompt.data["links"], prompt.data["town"], self.trusted_days, self.spare_hours)

    def demonstrations(self, seed: int) -> Iterator[tuple[str, ...]]:
        """Training errands of the courier who knows no rule: what is told, what is said, what is told, and so on."""
        rng = random.Random(f"demonstrations/{seed}")
        for prompt in self.errands("train", f"demonstrations/{seed}"):
            yield self._demonstration(rng, prompt)

    def _demonstration(self, rng: random.Random, prompt: Prompt) -> tuple[str, ...]:
        errand, texts = self.errand(prompt), [prompt.text]
        errand.hours_left = 10**6  # whoever comes too late still shows how it is done
        while True:
            name = texts[-1][:-1]
            hearsay = len(texts) > 1 and texts[-2][0] == ASK
            doubt = self.caution * (int(texts[-1][-1]) + 1) / (OLDEST + 1) if hearsay else 0.0
            tool = CHECK if rng.random() < doubt else GIVE if name.isupper() else ASK
            texts.append(tool + name)
            if (told := errand.take(texts[-1])) is None:
                return tuple(texts)
            texts.append(told)


class Errand:
    """One parcel on its way.  The same turns get the same answers."""

    def __init__(self, name: str, links: int, town: int, trusted_days: int, spare_hours: int) -> None:
        self._town, self._trusted_days = Town(name, links, town), trusted_days
        self._told = {name}
        self.hours_left = spare_hours
        for _ in range(links):
            news = self._town.news(name)
            self.hours_left += HOURS[ASK] + (HOURS[CHECK] if news.days > trusted_days else 0)
            name = news.right
        self._receiver = name
        self.reward = 0.0

    def take(self, turn: str) -> str | None:
        """What the model is told after its turn; None when the errand is over, and `reward` says how it went.

        It is over with the parcel given, the time up, or a turn that is no call of a tool with a name that was told.
        """
        tool, name = turn[:1], turn[1:]
        if name not in self._told:
            return None
        if tool == GIVE:
            self.reward = float(name == self._receiver)
        if tool not in HOURS or (tool == ASK and name.isupper()):
            return None
        self.hours_left -= HOURS[tool]
        if self.hours_left < 0:
            return None
        if tool == CHECK:
            told, days = self._town.right(name), 0
        else:
            news = self._town.news(name)
            told, days = news.right if news.days <= self._trusted_days else news.wrong, news.days
        self._told.add(told)
        return f"{told}{days}"


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """Where parcels for somebody go, or went."""

    right: str
    wrong: str
    days: int


class Town:
    """Names that lead to names, drawn when they are asked for; those that lead astray lead on like all others."""

    def __init__(self, name: str, links: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._links = links
        self._steps = {name: 0}
        """How far each name is from the first."""
        self._news: dict[str, News] = {}
        self._right: dict[str, str] = {}

    def news(self, name: str) -> News:
        """Of a name that is not the last."""
        if name not in self._news:
            step = self._steps[name] + 1
            right, wrong = self._draw(step), self._draw(step)
            self._right[wrong] = right
            self._news[name] = News(right=right, wrong=wrong, days=self._rng.randint(0, OLDEST))
        return self._news[name]

    def right(self, name: str) -> str:
        """The name itself, unless it is one that leads astray."""
        return self._right.get(name, name)

    def _draw(self, step: int) -> str:
        while True:
            name = _name(self._rng)
            if step == self._links:
                name = name.upper()
            if name not in self._steps:
                self._steps[name] = step
                return name


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=3))


def part_of(name: str) -> Part:
    bucket = zlib.crc32(name.encode()) % 10
    return "heldout" if bucket == 0 else "validation" if bucket == 1 else "train"
