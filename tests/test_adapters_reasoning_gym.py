"""Datasets of reasoning-gym as tasks: splits that never meet, the datasets' judgement, errors that say what to do."""

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stream_rl.episode import Message, Turn
from stream_rl.errors import ConfigError, TaskError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt, Split, load_task, plays

pytest.importorskip("reasoning_gym")

from actors.adapters.reasoning_gym import ReasoningGym, ReasoningGymChat, _literal

USE = "actors.adapters.reasoning_gym:ReasoningGym"
LEGS: dict[str, Any] = {"leg_counting": {"max_animals": 4}}


def first(task: ReasoningGym, split: Split, count: int, seed: int = 0) -> list[Prompt]:
    return list(itertools.islice(task.prompts(split, seed), count))


def right(prompt: Prompt) -> str:
    return str(eval(prompt.data["entry"])["answer"])


def test_what_one_seed_trains_on_no_seed_evaluates() -> None:
    small = ReasoningGym({"leg_counting": {"max_animals": 3, "max_instances": 2}}, size=400, heldout_share=0.3)
    trained = {prompt.text for seed in range(3) for prompt in first(small, "train", 1500, seed)}
    heldout = [prompt.text for seed in range(3) for prompt in first(small, "heldout", 50, seed)]
    assert len(heldout) == 150 and not trained & set(heldout)
    assert len(set(heldout[:50])) == 50, "no question twice"


def test_held_out_questions_end_and_training_does_not() -> None:
    task = ReasoningGym({"leg_counting": {"min_animals": 1, "max_animals": 1, "max_instances": 2}}, size=300)
    assert 0 < len(first(task, "heldout", 10_000)) < 60
    assert len(first(task, "train", 2000)) == 2000


def test_all_held_out_is_an_error_and_no_endless_loop() -> None:
    task = ReasoningGym(LEGS, size=50, heldout_share=0.999999)
    with pytest.raises(TaskError, match="50 draws in a row"):
        first(task, "train", 1)


def test_prompts_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    one, again, other = (first(ReasoningGym(LEGS), "train", 20, seed) for seed in (1, 1, 2))
    assert one == again and one != other


def test_datasets_come_by_their_weights() -> None:
    task = ReasoningGym({"chain_sum": {"weight": 3.0}, "leg_counting": {}, "basic_arithmetic": {"weight": 0}})
    names = [prompt.data["dataset"] for prompt in first(task, "train", 2000)]
    assert 0.7 < names.count("chain_sum") / 2000 < 0.8 and names.count("basic_arithmetic") == 0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("{}", 1.0),
        ("<answer>{}</answer>", 1.0),
        ("<answer>12345</answer> no, <answer> {}\n</answer>.", 1.0),
        ("<answer>{}</answer> or <answer>12345</answer>", 0.0),
        ("it is {}", None),
        ("", None),
        ("<answer>", None),
    ],
)
def test_the_last_answer_counts(completion: str, reward: float | None) -> None:
    task = ReasoningGym(LEGS)
    (prompt,) = first(task, "train", 1)
    travelled = Prompt(text=prompt.text, data=unpack(pack(dict(prompt.data))))
    scored = task.reward(travelled, completion.format(right(prompt)))
    assert scored == reward if reward is not None else scored < 1.0


@pytest.mark.parametrize("name", ["arc_agi", "countdown", "sudoku", "isomorphic_strings", "graph_color", "rearc"])
def test_an_entry_reaches_another_process_as_it_was(name: str) -> None:
    """Of these some need their tuples or whole numbers as keys, and some are made otherwise with another hash seed."""
    task = ReasoningGym({name: {}}, size=20)
    (prompt,) = first(task, "train", 1)
    entry, judge = eval(prompt.data["entry"]), task._judges[name]
    answer = entry["answer"] if entry["answer"] is not None else "nothing"
    expected = judge.score_answer(answer, entry)
    code = (
        "import sys; from stream_rl.plain import unpack; from stream_rl.task import Prompt\n"
        "from actors.adapters.reasoning_gym import ReasoningGym\n"
        "data, answer = unpack(sys.stdin.buffer.read())\n"
        f"print(ReasoningGym({{{name!r}: {{}}}}, size=20).reward(Prompt(text='', data=data), answer))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pack([dict(prompt.data), answer]), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert float(done.stdout.split()[-1]) == expected == (1.0 if entry["answer"] is not None else expected)


def test_an_entry_that_would_be_another_there_is_refused() -> None:
    with pytest.raises(TaskError, match="cannot travel"):
        _literal("x", {"question": object()})
    with pytest.raises(TaskError, match="is another"):
        _literal("x", {"question": _Odd()})


class _Odd:
    def __repr__(self) -> str:
        return "1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"datasets": {"leg_countin": {}}}, "no dataset 'leg_countin'; it has"),
        ({"datasets": {"leg_counting": {"legs": 3}}}, "its options are .*min_animals"),
        ({"datasets": {"leg_counting": {"min_animals": 0}}}, "cannot be made"),
        ({"datasets": {}}, "needs datasets"),
        ({"datasets": LEGS, "size": 0}, "size of at least 1"),
        ({"datasets": LEGS, "heldout_share": 1.5}, "heldout_share"),
        ({"datasets": {"leg_counting": {"weight": -1}}}, "weights must be"),
        ({}, "do not fit"),
    ],
)
def test_options_that_do_not_fit_are_named(options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_task(USE, options)


class Scripted:
    base_url = key = ""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, list[Message]()

    async def turn(self, observation: str | Sequence[Message] = "", *, tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
        assert not isinstance(observation, str)
        self.asked += observation
        return Turn(text=self.answer, finish="stop")

    async def reward_so_far(self, reward: float) -> None: ...


def test_in_a_chat_the_question_is_asked_as_messages() -> None:
    task = load_task(f"{USE}Chat", {"datasets": LEGS})
    assert plays(task) and not plays(load_task(USE, {"datasets": LEGS})) and isinstance(task, ReasoningGymChat)
    (prompt,) = first(task, "train", 1)
    model = Scripted(f"<answer>{right(prompt)}</answer>")
    assert prompt.text == "" and asyncio.run(task.play(prompt, model)) == 1.0
    assert [message["role"] for message in model.asked] == ["system", "user"]
    assert "legs" in model.asked[1]["content"] and "<answer>" in model.asked[0]["content"]
