"""The courier: its rules hold against any turns, and its errands are honest."""

import asyncio
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from actors.tasks.courier import ASK, CHECK, GIVE, HOURS, Courier, Town, part_of
from actors.warm_start import batch, demonstrations
from scripts.tiny_model import EOS, create
from stream_rl import config
from stream_rl.episode import Turn
from stream_rl.errors import ConfigError, TaskError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt, load_task, plays

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = list(itertools.islice(Courier().prompts("train", 0), 50))
errands = st.sampled_from(PROMPTS)


def careful(told: str, hearsay: bool, trusted_days: int = 4) -> str:
    """The turn of a courier who knows the rule."""
    name, days = told[:-1], int(told[-1])
    return (CHECK if hearsay and days > trusted_days else GIVE if name.isupper() else ASK) + name


class Script:
    """A model that says what a policy makes of what it was told last and of whether that is hearsay."""

    def __init__(self, prompt: Prompt, policy: Any, finish: str = "stop") -> None:
        self.told, self.hearsay, self.policy, self.finish = prompt.text, False, policy, finish
        self.texts = [prompt.text]

    async def turn(self, observation: str = "") -> Turn:
        if len(self.texts) > 1:
            assert observation, "only the prompt is there before the first turn"
            self.told = observation
            self.texts.append(observation)
        text = self.policy(self.told, self.hearsay)
        self.hearsay = text[:1] == ASK
        self.texts.append(text)
        return Turn(text=text, finish=self.finish)  # type: ignore[arg-type]


def played(prompt: Prompt, policy: Any, finish: str = "stop") -> tuple[float, list[str]]:
    script = Script(prompt, policy, finish)
    reward = asyncio.run(Courier().play(prompt, script))  # type: ignore[arg-type]
    return reward, script.texts


# -- the rules -------------------------------------------------------------------------------------------------


def test_whoever_knows_the_rule_always_succeeds_in_three_turns_or_more() -> None:
    outcomes = [played(prompt, careful) for prompt in itertools.islice(Courier().prompts("heldout", 1), 300)]
    assert all(reward == 1.0 for reward, _ in outcomes)
    turns = [len(texts) // 2 for _, texts in outcomes]
    assert min(turns) >= 3
    assert max(turns) >= 10
    assert all({text[0] for text in texts[1::2]} >= {ASK, GIVE} for _, texts in outcomes)


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        pytest.param(lambda told, hearsay: careful(told, False), 0.2, id="trusts everything"),
        pytest.param(lambda told, hearsay: careful(told, hearsay, -1), 0.2, id="checks everything"),
        pytest.param(lambda told, hearsay: careful(told, hearsay, 2), 0.5, id="checks too early"),
        pytest.param(lambda told, hearsay: careful(told, hearsay, 6), 0.5, id="checks too late"),
        pytest.param(lambda told, hearsay: GIVE + told[:-1], 0.0, id="gives at once"),
        pytest.param(lambda told, hearsay: CHECK + told[:-1], 0.0, id="only checks"),
    ],
)
def test_no_other_rule_gets_far(policy: Any, most: float) -> None:
    rewards = [played(prompt, policy)[0] for prompt in itertools.islice(Courier().prompts("train", 2), 400)]
    assert sum(rewards) / len(rewards) <= most


def test_observations_are_needed_to_go_on() -> None:
    """Two errands with one prompt: the same turns do not serve for both."""
    first, second = (Prompt(text="kfd0", data={"links": 3, "town": town}) for town in (1, 2))
    reward, texts = played(first, careful)
    turns = iter(texts[1::2])
    assert reward == 1.0
    assert played(second, lambda told, hearsay: next(turns))[0] == 0.0


@pytest.mark.parametrize(
    "turn",
    ["", "a", "akf", "akfdd", "a kfd", "Akfd", "xkfd", "akfd\n", "azzz", "gkfd", "kfd", "ａkfd", "a" * 10**6, "\0"],
)
def test_what_is_no_call_ends_the_errand_without_reward(turn: str) -> None:
    errand = Courier().errand(Prompt(text="kfd0", data={"links": 2, "town": 5}))
    assert errand.take(turn) is None
    assert errand.reward == 0.0


def test_a_turn_that_was_cut_is_no_call() -> None:
    reward, texts = played(PROMPTS[0], careful, finish="length")
    assert (reward, len(texts)) == (0.0, 2)


def test_a_name_that_was_not_told_is_of_no_use() -> None:
    """Knowing the receiver from elsewhere, a policy still has to ask its way."""
    prompt = PROMPTS[0]
    _, texts = played(prompt, careful)
    errand = Courier().errand(prompt)
    assert errand.take(texts[-1]) is None
    assert errand.reward == 0.0


@settings(max_examples=200, deadline=None)
@given(errands, st.data())
def test_any_calls_end_in_time_with_a_reward_for_the_receiver_only(prompt: Prompt, data: st.DataObject) -> None:
    errand, names = Courier().errand(prompt), [prompt.text[:-1]]
    for spent in itertools.count(1):
        turn = data.draw(st.sampled_from([ASK, CHECK, GIVE])) + data.draw(st.sampled_from(names))
        hours = errand.hours_left
        told = errand.take(turn)
        if told is None:
            break
        assert hours - errand.hours_left == HOURS[turn[0]]
        names.append(told[:-1])
        assert len(told) == 4
        assert spent <= 26
    receiver = played(prompt, careful)[1][-1][1:]
    assert errand.reward == float(turn == GIVE + receiver)


@settings(max_examples=50, deadline=None)
@given(errands, st.integers(0, 2**32))
def test_the_same_turns_get_the_same_observations(prompt: Prompt, seed: int) -> None:
    def texts() -> list[str]:
        rng = np.random.default_rng(seed)

        def policy(told: str, hearsay: bool) -> str:
            return ASK + CHECK + GIVE if rng.random() < 0.01 else careful(told, hearsay, int(rng.integers(0, 9)))

        return played(prompt, policy)[1]

    assert texts() == texts()


def test_all_names_of_a_town_are_distinct() -> None:
    for seed in range(200):
        town, name, names = Town("abc", 20, seed), "abc", ["abc"]
        for _ in range(20):
            news = town.news(name)
            names += [news.right, news.wrong]
            name = news.right
        assert len(set(names)) == len(names) == 41
        assert [name.isupper() for name in names] == [False] * 39 + [True] * 2


# -- what is shown ---------------------------------------------------------------------------------------------


def test_heldout_errands_are_never_trained_on() -> None:
    parts: dict[str, set[tuple[str, int]]] = {}
    for part in ("train", "validation", "heldout"):
        made = list(itertools.islice(Courier().errands(part, 0), 3000))  # type: ignore[arg-type]
        parts[part] = {(prompt.text, prompt.data["town"]) for prompt in made}
        assert len(parts[part]) == 3000
        assert {part_of(prompt.text[:-1]) for prompt in made} == {part}
    assert not {name for name, _ in parts["train"]} & {name for name, _ in parts["heldout"]}
    assert list(itertools.islice(Courier().prompts("train", 0), 50)) == PROMPTS


def test_demonstrations_know_the_tools_but_not_the_rule() -> None:
    shown = list(itertools.islice(Courier().demonstrations(3), 3000))
    assert shown[:50] == list(itertools.islice(Courier().demonstrations(3), 50))
    checked: dict[int, list[bool]] = {day: [] for day in range(10)}
    for texts in shown:
        assert part_of(texts[0][:-1]) == "train"
        assert len(texts) % 2 == 0
        assert texts[-1][0] == GIVE
        assert texts[1][0] == ASK
        for said, told, answer in zip(texts[1::2], texts[2::2], texts[3::2], strict=False):
            if said[0] == CHECK:
                assert answer[0] != CHECK, "what the register says is not doubted"
            else:
                checked[int(told[-1])].append(answer[0] == CHECK)
    rates = [float(np.mean(checked[day])) for day in range(10)]
    assert rates == pytest.approx([0.05 * (day + 1) for day in range(10)], abs=0.05)


def test_who_does_as_the_demonstrations_do_seldom_succeeds() -> None:
    rng = np.random.default_rng(0)

    def shown(told: str, hearsay: bool) -> str:
        return careful(told, hearsay, -1 if rng.random() < 0.05 * (int(told[-1]) + 1) else 9)

    rewards = [played(prompt, shown)[0] for prompt in itertools.islice(Courier().prompts("train", 4), 1000)]
    assert 0.1 < sum(rewards) / len(rewards) < 0.3


def test_prompt_data_travels() -> None:
    assert unpack(pack(dict(PROMPTS[0].data))) == PROMPTS[0].data


@pytest.mark.parametrize(
    "options",
    [{"fewest": 0}, {"fewest": 5, "most": 4}, {"trusted_days": 9}, {"trusted_days": -1}, {"spare_hours": -1},
     {"caution": 0.0}, {"caution": 1.0}],
)  # fmt: skip
def test_the_courier_refuses_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="courier"):
        load_task("actors.tasks.courier:Courier", options)


# -- the warm start --------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: pathlib.Path) -> Tokenizer:
    create(tmp_path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_what_is_told_is_read_and_not_learned(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(EOS)
    made = batch([("kfd0", "akfd", "mrt7", "cmrt"), ("a=", "")], tokenizer, end)
    assert made.lengths.tolist() == [18, 3]
    learned = made.loss_weights > 0
    assert learned.tolist() == [*([False] * 4 + [True] * 5) * 2, False, False, True]
    assert made.loss_weights.sum() == pytest.approx(1.0)
    ends = np.flatnonzero(made.token_ids == end)
    assert ends.tolist() == [8, 17, 20]
    assert tokenizer.decode(made.token_ids[:17].tolist(), skip_special_tokens=True) == "kfd0akfdmrt7cmrt"


@pytest.mark.parametrize("texts", ["ab", (), ("", "a"), ("a",), ("a", "b", "c")])
def test_a_demonstration_that_is_none_is_refused(tokenizer: Tokenizer, texts: Any) -> None:
    with pytest.raises(TaskError, match="demonstrations"):
        batch([("a=", "b"), texts], tokenizer, 0)


def test_the_agent_recipe_fits_its_task() -> None:
    recipe = config.load(ROOT / "recipes" / "agent.toml")
    task: Any = load_task(recipe.task.use, recipe.task.options)
    assert plays(task)
    shown = list(itertools.islice(demonstrations(recipe), 500))
    longest_call = max(len(text) + 1 for texts in shown for text in texts[1::2])
    assert longest_call <= recipe.agent.max_turn_tokens
    most_hours = task.most * sum(HOURS.values()) + task.spare_hours
    assert most_hours + 1 <= recipe.agent.max_turns
    assert (most_hours + 1) * longest_call <= recipe.rollout.max_new_tokens
