"""Shopping: the reward is for the right total after all prices, whatever a model writes, and lists are honest."""

import asyncio
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts import pack_problem, unpack_problem
from actors.tasks.shopping import Shopping, is_heldout
from stream_rl import config
from stream_rl.episode import Turn
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, load_task, plays

ROOT = pathlib.Path(__file__).parent.parent
PROMPT = Prompt(text="", data={"prices": {"lamp": 7, "hat": 12}})
MOST_TURNS = 5
"""Of an episode of two things."""


class Script:
    """A model that says one line after the other, and hears what it is told."""

    def __init__(self, lines: list[str], finish: str = "stop") -> None:
        self.lines, self.finish, self.told = iter(lines), finish, list[str]()

    async def turn(self, observation: str = "") -> Turn:
        assert bool(observation) == bool(self.told), "only the prompt is there before the first turn"
        self.told.append(observation)
        return Turn(text=next(self.lines), finish=self.finish)  # type: ignore[arg-type]


def played(lines: list[str], prompt: Prompt = PROMPT, finish: str = "stop") -> tuple[dict[str, float], list[str]]:
    script = Script(lines, finish)
    return asyncio.run(Shopping().play(prompt, script)), script.told  # type: ignore[arg-type]


def lists(split: Any, count: int = 40, seed: int = 0) -> list[Prompt]:
    return list(itertools.islice(Shopping().prompts(split, seed), count))


def test_the_right_total_after_all_prices_is_rewarded() -> None:
    parts, told = played(["price lamp", " price hat\n", "total 19"])
    assert parts == {"reward": 1.0, "asked": 1.0}
    assert "7" in told[1] and "12" in told[2] and told[1].startswith("\n<|im_start|>user\n")
    assert played(["price hat", "price hat", "price lamp", "total 19"])[0]["reward"] == 1.0


@pytest.mark.parametrize(
    "lines",
    [
        ["total 19"],  # a guess
        ["price lamp", "total 19"],
        ["price lamp", "price hat", "total 18"],
        ["price lamp", "price hat", "total 019"],
        ["price lamp", "price hat", "total 19 coins"],
        ["price lamp", "price hat", "Total: 19"],
        ["price lamp", "price mug"],
        ["price lamp", "price hat", "total " + "9" * 9000],
        ["price lamp", "price hat", "total ١٩"],
        ["the lamp"],
        [""],
        ["price lamp"] * MOST_TURNS,
    ],
)
def test_all_else_is_not(lines: list[str]) -> None:
    parts, told = played(lines)
    assert parts["reward"] == 0.0
    assert len(told) == len(lines), "it ends there and not before"


def test_a_line_that_was_cut_is_no_command() -> None:
    assert played(["price lamp"], finish="length")[0] == {"reward": 0.0, "asked": 0.0}


@given(st.lists(st.one_of(st.text(), st.sampled_from(["price lamp", "price hat", "total 19"])), min_size=MOST_TURNS))
def test_any_lines_end_it(lines: list[str]) -> None:
    parts, told = played(lines)
    assert len(told) <= MOST_TURNS and 0 <= parts["asked"] <= 1
    assert parts["reward"] in (0.0, 1.0) and parts["reward"] <= parts["asked"]


def test_no_list_that_is_held_out_is_trained_on_in_any_order() -> None:
    train, heldout = (
        {frozenset(p.data["prices"]) for p in lists(split, 400, seed=1)} for split in ("train", "heldout")
    )
    assert train and heldout and not train & heldout
    assert is_heldout(["hat", "lamp"]) == is_heldout(["lamp", "hat"])


def test_a_seed_gives_the_same_again_and_it_travels() -> None:
    assert lists("train", seed=3) == lists("train", seed=3) != lists("train", seed=4)
    assert unpack_problem(pack_problem(lists("train")[0])) == lists("train")[0]


def test_demonstrations_follow_the_rules_and_half_are_careless() -> None:
    def prices(texts: tuple[str, ...]) -> Callable[[str], int]:
        told = dict(zip(texts[1:-1:2], texts[2:-1:2], strict=True))
        return lambda line: int("".join(filter(str.isdigit, told[line])))

    rewards = []
    for texts in itertools.islice(Shopping().demonstrations(0), 300):
        cost, lines = prices(texts), list(texts[1::2])
        known = Prompt(text=texts[0], data={"prices": {line.split()[1]: cost(line) for line in lines[:-1]}})
        parts, told = played(lines, known)
        assert parts["asked"] == 1.0 and told == ["", *texts[2::2]], "what is shown is what is told"
        rewards.append(parts["reward"])
    assert 0.4 < sum(rewards) / len(rewards) < 0.7


@pytest.mark.parametrize("wrong", [{"fewest": 0}, {"fewest": 4}, {"most": 99}, {"dearest": 0}])
def test_lists_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="shopping: needs"):
        Shopping(**wrong)


def test_the_recipe_plays_it() -> None:
    recipe = config.load(ROOT / "recipes" / "smollm2-tools.toml")
    assert plays(load_task(recipe.task.use, recipe.task.options))
