"""Tasks to measure with: answers of given lengths, and small sums of which none that is held out is ever trained on."""

import itertools
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts import pack_problem, unpack_problem
from actors.tasks.arithmetic import KINDS, Arithmetic, is_heldout
from actors.tasks.lengths import Lengths
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt


def taken(task: Any, split: Any, count: int, seed: int = 0) -> list[Prompt]:
    return list(itertools.islice(task.prompts(split, seed), count))


def test_lengths_have_the_mean_and_the_tail_that_were_asked_for() -> None:
    drawn = [
        n
        for prompt in taken(Lengths(mean=512, sigma=1.2, longest=100_000), "train", 4000)
        for n in prompt.max_new_tokens
    ]
    assert statistics.fmean(drawn) == pytest.approx(512, rel=0.1)
    assert sum(n > 8000 for n in drawn) / len(drawn) == pytest.approx(0.002, rel=0.5)
    cut = [n for prompt in taken(Lengths(longest=600), "train", 500) for n in prompt.max_new_tokens]
    assert max(cut) == 600 and min(cut) >= 1


def test_members_differ_and_a_seed_gives_the_same_again() -> None:
    prompts = taken(Lengths(members=4), "train", 20, seed=3)
    assert prompts == taken(Lengths(members=4), "train", 20, seed=3) != taken(Lengths(members=4), "train", 20, seed=4)
    assert all(len(prompt.max_new_tokens) == 4 for prompt in prompts)
    assert len(set(prompts[0].max_new_tokens)) > 1


def test_budgets_survive_the_way_to_another_actor() -> None:
    [prompt] = taken(Lengths(), "train", 1)
    assert unpack_problem(pack_problem(prompt)) == prompt


@pytest.mark.parametrize(("completion", "reward"), [("", 0.0), ("1a2b", 0.5), ("12", 1.0), ("ab", 0.0)])
def test_what_is_wanted_is_counted(completion: str, reward: float) -> None:
    assert Lengths().reward(Prompt(text=""), completion) == reward


@pytest.mark.parametrize("wrong", [{"mean": 0.5}, {"mean": 9000.0}, {"sigma": -1.0}, {"members": 0}, {"wanted": ""}])
def test_lengths_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Lengths(**wrong)


@given(st.integers(0, 1000))
def test_no_held_out_question_is_trained_on_and_all_kinds_are_evaluated(seed: int) -> None:
    task = Arithmetic(dict.fromkeys(KINDS, 1.0), ramp=20)
    asked = {
        split: [p.text.split("user\n")[1].split(" Give")[0] for p in taken(task, split, 40, seed)]
        for split in ("train", "heldout")
    }
    assert all(is_heldout(question) for question in asked["heldout"])
    assert not any(is_heldout(question) for question in asked["train"])
    kinds = [prompt.data["kind"] for prompt in taken(task, "heldout", len(KINDS), seed)]
    assert sorted(kinds) == sorted(KINDS)


def test_what_is_asked_grows_until_the_ramp_is_over() -> None:
    def largest(prompts: list[Prompt]) -> int:
        return max(int(prompt.data["answer"]) for prompt in prompts)

    task = Arithmetic({"addition": 1.0}, ramp=2000)
    prompts = taken(task, "train", 4000)
    assert largest(prompts[:100]) < largest(prompts[1000:1100]) < largest(prompts[2000:]) <= 40


@pytest.mark.parametrize(
    ("completion", "right"),
    [("12", 1.0), ("7 + 5 = 12.", 1.0), ("12 or 13", 0.0), ("", 0.0), ("twelve", 0.0), ("-12", 0.0), ("9" * 5000, 0.0)],
)
def test_the_last_number_counts(completion: str, right: float) -> None:
    prompt = Prompt(text="", data={"kind": "addition", "answer": 12})
    assert Arithmetic().reward(prompt, completion) == {"reward": right, "addition": right, "addition_asked": 1.0}


@pytest.mark.parametrize(
    "wrong", [{"kinds": {}}, {"kinds": {"x": 1.0}}, {"kinds": {"addition": 0.0}}, {"ramp": -1}, {"template": "x"}]
)
def test_sums_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Arithmetic(**wrong)
