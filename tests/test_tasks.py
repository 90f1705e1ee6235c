import itertools
import json
import math
import pathlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from actors.tasks.cashier import Cashier, fewest_coins, part_of
from actors.tasks.jsonl import JsonLines
from engines.megatron.model_shape import FAMILIES
from scripts.tiny_model import EOS, PAD, create
from stream_rl import config
from stream_rl.errors import ConfigError, TaskError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt, load_task

ROOT = pathlib.Path(__file__).parent.parent


def payment(amount: str, coins: str) -> str:
    """A true record of paying `amount` with these coins."""
    left, written = [int(digit) for digit in amount], []
    for coin in coins:
        left["abcdefgh".index(coin.lower())] -= 5 if coin.isupper() else 1
        written.append(coin + "".join(map(str, left)))
    return "".join(written)


def reward(amount: str, completion: str) -> float:
    return Cashier().reward(Prompt(text=amount + "=", data={"amount": amount}), completion)


# -- the cashier -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "coins", "expected"),
    [
        ("00709", "CccEeeee", 1.0),
        ("00709", "EeeeeCcc", 1.0),
        ("00005", "eeeee", (1 / 5) ** 3),
        ("00709", "cccccccEeeee", (8 / 12) ** 3),
    ],
)
def test_a_payment_is_worth_the_cube_of_its_economy(amount: str, coins: str, expected: float) -> None:
    assert reward(amount, payment(amount, coins)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "E00003e00002",
        "E00003e00002e00001e00000e",
        "E00003e00002e00001e00000e00000",
        "E00003e00002e00001e0000",
        "E00002e00001e00000",
        "E10003e00002e00001e00000",
        "d00007E00002e00001e00000",
        "x00003e00002e00001e00000",
        "f00008",
        "E0000３e00002e00001e00000",
    ],
)
def test_whatever_is_wrong_makes_a_payment_worthless(completion: str) -> None:
    assert reward("00008", completion) == 0.0


@given(st.integers(1, 99999), st.text(alphabet="abcdeABCDE0123456789", max_size=40))
def test_no_text_scores_outside_zero_to_one(amount: int, completion: str) -> None:
    assert 0.0 <= reward(f"{amount:05d}", completion) <= 1.0


def test_demonstrations_are_right_and_wasteful_and_never_held_out() -> None:
    shown = list(itertools.islice(Cashier().demonstrations(3), 2000))
    scores = [reward(prompt[:-1], completion) for prompt, completion in shown]
    assert min(scores) > 0
    assert 0.2 < sum(scores) / len(scores) < 0.6
    assert {part_of(prompt[:-1]) for prompt, _ in shown} == {"train"}
    assert shown[:50] == list(itertools.islice(Cashier().demonstrations(3), 50))


def test_heldout_prompts_are_many_distinct_and_never_trained_on() -> None:
    heldout = [prompt.text for prompt in itertools.islice(Cashier().prompts("heldout", 0), 1000)]
    assert len(set(heldout)) == 1000
    train = {prompt.text for prompt in itertools.islice(Cashier().prompts("train", 0), 5000)}
    assert not train & set(heldout)
    again = [prompt.text for prompt in itertools.islice(Cashier().prompts("heldout", 0), 1000)]
    assert heldout == again


def test_shortest_answers_are_long_tailed() -> None:
    amounts = itertools.islice(Cashier().amounts("train", 0), 5000)
    p50, p99 = np.percentile([6 * fewest_coins(amount) + 1 for amount in amounts], [50, 99])
    assert 20 <= p50 <= 40
    assert p99 >= 3.5 * p50


@pytest.mark.parametrize("options", [{"digits": 0}, {"digits": 9}, {"spread": 0.0}, {"fondness": 2.0}])
def test_the_cashier_refuses_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cashier"):
        load_task("actors.tasks.cashier:Cashier", options)


def test_prompt_data_travels_to_the_reward() -> None:
    prompt = next(Cashier().prompts("train", random.randrange(100)))
    assert unpack(pack(dict(prompt.data))) == prompt.data


# -- JSON lines ------------------------------------------------------------------------------------------------


def lines(path: pathlib.Path, *records: Any) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


def backwards(completion: str, record: Mapping[str, Any]) -> Mapping[str, float]:
    return {"reward": float(completion == record["answer"][::-1]), "length": len(completion)}


def test_training_lines_are_shuffled_by_seed_and_repeat(tmp_path: pathlib.Path) -> None:
    records: list[dict[str, Any]] = [{"prompt": f"p{i}", "answer": i} for i in range(20)]
    task = JsonLines(lines(tmp_path / "train.jsonl", *records))
    first, second = ([p.text for p in itertools.islice(task.prompts("train", seed), 60)] for seed in (0, 1))
    for epoch in (first[:20], first[20:40], first[40:], second[:20]):
        assert sorted(epoch) == sorted(r["prompt"] for r in records)
    assert len({tuple(first[:20]), tuple(first[20:40]), tuple(second[:20])}) == 3
    assert first == [p.text for p in itertools.islice(task.prompts("train", 0), 60)]


def test_heldout_lines_come_once_and_in_order(tmp_path: pathlib.Path) -> None:
    train = lines(tmp_path / "train.jsonl", {"prompt": "t", "answer": ""})
    heldout = lines(tmp_path / "heldout.jsonl", {"prompt": "a", "answer": "1"}, "", {"prompt": "b", "answer": "2"})
    assert [p.text for p in JsonLines(train, heldout_path=heldout).prompts("heldout", 5)] == ["a", "b"]
    assert list(JsonLines(train).prompts("heldout", 5)) == []


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact", " 12\n", "12", 1.0),
        ("exact", "it is 12", "12", 0.0),
        ("contains", "it is 12.", "12", 1.0),
        ("contains", "it is 13.", "12", 0.0),
        ("number", "7 + 5 = 12", 12, 1.0),
        ("number", "so $1,200.00.", "1200", 1.0),
        ("number", "12, no, 13", "12", 0.0),
        ("number", "none", "12", 0.0),
        ("number", "-3", "-3", 1.0),
        ("tests.test_tasks:backwards", "21", "12", {"reward": 1.0, "length": 2}),
    ],
)
def test_rewards_by_name(tmp_path: pathlib.Path, name: str, completion: str, answer: Any, expected: Any) -> None:
    task = JsonLines(lines(tmp_path / "t.jsonl", {"prompt": "?", "answer": answer}), reward=name)
    assert task.reward(next(task.prompts("train", 0)), completion) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "expected an object"),
        ('{"answer": "1"}', '"prompt" must be'),
        ('{"prompt": 3, "answer": "1"}', '"prompt" must be'),
        ('{"prompt": "", "answer": "1"}', '"prompt" must be'),
        ('{"prompt": "p"}', '"answer" must be'),
        ('{"prompt": "p", "answer": "twelve"}', "needs a number"),
        (f'{{"prompt": "p", "answer": 1, "id": {1 << 70}}}', "cannot go to the reward process"),
    ],
)
def test_a_bad_line_is_named(tmp_path: pathlib.Path, line: str, says: str) -> None:
    path = lines(tmp_path / "bad.jsonl", {"prompt": "fine", "answer": 1}, "", line)
    with pytest.raises(TaskError, match=says) as caught:
        JsonLines(path, reward="number").prompts("train", 0)
    assert f"{path}:3" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "nowhere.jsonl"}, "no file"),
        ({"reward": "exactly"}, "one of contains, exact, number"),
        ({"reward": "no.such.module:f"}, "cannot import"),
        ({"reward": "tests.test_tasks:forwards"}, "no function"),
    ],
)
def test_options_that_lead_nowhere_are_refused(tmp_path: pathlib.Path, options: dict[str, str], says: str) -> None:
    path = lines(tmp_path / "t.jsonl", {"prompt": "?", "answer": "!"})
    with pytest.raises(ConfigError, match=says):
        JsonLines(**{"path": path, **options})


def test_files_that_are_empty_or_no_text_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, says in (("empty.jsonl", "has no lines"), ("binary.jsonl", "UTF-8")):
        with pytest.raises(TaskError, match=says):
            JsonLines(str(tmp_path / name)).prompts("train", 0)


# -- the tiny model --------------------------------------------------------------------------------------------


def test_the_tiny_model_is_small_reproducible_and_its_text_round_trips(tmp_path: pathlib.Path) -> None:
    create(tmp_path / "a", seed=1)
    create(tmp_path / "b", seed=1)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    parameters = sum(math.prod(tensor.shape) for tensor in load_file(tmp_path / "a" / "model.safetensors").values())
    assert 0.5e6 <= parameters <= 2e6
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    text = "00709=C00209 Käse\n日本 \t "
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["vocab_size"] == tokenizer.get_vocab_size() > max(ids)
    assert tokenizer.id_to_token(settings["eos_token_id"]) == EOS
    assert tokenizer.id_to_token(settings["pad_token_id"]) == PAD


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_transformers_loads_the_tiny_model(tmp_path: pathlib.Path, architecture: str) -> None:
    from tests import huggingface_reference  # noqa: F401  its import makes transformers importable beside a CPU torch

    transformers = pytest.importorskip("transformers")
    create(tmp_path, architecture=architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "00709=C00209 x\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == architecture
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_quick_start_recipe_fits_its_task() -> None:
    recipe = config.load(ROOT / "recipes" / "quickstart.toml")
    task = load_task(recipe.task.use, recipe.task.options)
    assert next(task.prompts("train", recipe.run.seed)).text.endswith("=")
    assert callable(getattr(task, "demonstrations", None))
