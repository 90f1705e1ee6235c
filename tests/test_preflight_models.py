"""Reference, teacher and critic of a recipe: what cannot work is refused before anything starts."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from tokenizers import Tokenizer

from scripts import preflight, tiny_model
from stream_rl import config
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

GAE, DISTILLATION = Algorithm(advantage="gae"), Algorithm(advantage="distillation")
KL = Algorithm(kl_coefficient=0.1)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny_model.create(tmp_path / "model", seed=0)
    tiny_model.create(tmp_path / "other", seed=1, layers=1)
    return tmp_path


def recipe_of(directory: pathlib.Path, **changes: Any) -> config.Recipe:
    recipe = config.Recipe(
        run=config.Run(name="run", steps=1, directory=str(directory / "runs")),
        model=config.Model(path=str(directory / "model")),
        task=config.TaskChoice(use="actors.tasks.cashier:Cashier"),
        queue=config.Queue(min_tokens=100, max_tokens=4000),
        rollout=config.Rollout(group_size=4, max_new_tokens=64),
        learner=config.Learner(optimizer={"lr": 1e-3}),
    )
    return dataclasses.replace(recipe, **changes)


def beside(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """A recipe's change: the model called `name` is directory/other."""
    section = {"reference": config.Reference, "teacher": config.Teacher, "critic": config.Critic}[name]
    return {name: section(path=str(directory / "other"))}


ASKED = [("reference", KL), ("teacher", DISTILLATION), ("critic", GAE)]


@pytest.mark.parametrize(("name", "algorithm"), ASKED)
def test_a_model_of_another_size_with_the_same_tokens_is_taken(
    directory: pathlib.Path, name: str, algorithm: Algorithm
) -> None:
    preflight.check(recipe_of(directory, algorithm=algorithm, **beside(directory, name)))
    (directory / "other" / "tokenizer.json").unlink()
    preflight.check(recipe_of(directory, algorithm=algorithm, **beside(directory, name)))


@pytest.mark.parametrize("algorithm", [KL, GAE])
def test_reference_and_critic_are_the_policy_where_nothing_is_said(
    directory: pathlib.Path, algorithm: Algorithm
) -> None:
    preflight.check(recipe_of(directory, algorithm=algorithm))


@pytest.mark.parametrize("name", ["reference", "teacher", "critic"])
def test_a_model_that_nothing_asks_is_refused(directory: pathlib.Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[{name}\] is only for algorithm"):
        preflight.check(recipe_of(directory, **beside(directory, name)))
    if name == "critic":
        with pytest.raises(ConfigError, match=r"\[critic\] is only for"):
            preflight.check(recipe_of(directory, critic=config.Critic(optimizer={"lr": 1.0})))


def test_distillation_needs_a_teacher(directory: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"needs teacher\.path"):
        preflight.check(recipe_of(directory, algorithm=DISTILLATION))


@pytest.mark.parametrize(("name", "algorithm"), ASKED)
def test_a_model_with_other_tokens_is_refused(directory: pathlib.Path, name: str, algorithm: Algorithm) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "other" / "tokenizer.json"))
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (directory / "other" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=rf"{name}\.path = .*must have the policy's vocabulary"):
        preflight.check(recipe_of(directory, algorithm=algorithm, **beside(directory, name)))


@pytest.mark.parametrize(
    ("changes", "words"), [({"vocab_size": 100}, "vocabulary"), ({"max_position_embeddings": 512}, "512 positions")]
)
def test_a_model_that_is_too_small_is_refused(directory: pathlib.Path, changes: dict[str, int], words: str) -> None:
    path = directory / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        preflight.check(recipe_of(directory, algorithm=DISTILLATION, **beside(directory, "teacher")))


def test_a_model_that_is_not_there_is_named(directory: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        preflight.check(recipe_of(directory, algorithm=KL, reference=config.Reference(path="/nowhere")))
    (directory / "other" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        preflight.check(recipe_of(directory, algorithm=KL, **beside(directory, "reference")))


@pytest.mark.parametrize("advantage", ["grpo", "centered", "rloo", "reinforce_plus_plus_baseline"])
def test_what_compares_members_needs_two(directory: pathlib.Path, advantage: str) -> None:
    alone = config.Rollout(group_size=1, max_new_tokens=64)
    recipe = recipe_of(directory, rollout=alone, algorithm=Algorithm(advantage=advantage))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="group_size must be at least 2"):
        preflight.check(recipe)


def test_an_estimator_that_compares_nothing_takes_single_answers(directory: pathlib.Path) -> None:
    alone = config.Rollout(group_size=1, max_new_tokens=64)
    queue = config.Queue(min_tokens=100, max_tokens=4000, first_groups=32)
    algorithm = Algorithm(advantage="reinforce_plus_plus")
    preflight.check(recipe_of(directory, rollout=alone, queue=queue, algorithm=algorithm))
    filtering = dataclasses.replace(queue, filter="equal_rewards")
    with pytest.raises(ConfigError, match="equal_rewards"):
        preflight.check(recipe_of(directory, rollout=alone, queue=filtering, algorithm=algorithm))
