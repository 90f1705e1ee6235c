"""Recipes: what is unknown, missing or of another type is said in one line, and what is written is read back equal."""

import dataclasses
import pathlib
import typing
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_rl import config
from stream_rl.config import Recipe
from stream_rl.errors import ConfigError

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SMALLEST = """
[run]
name = "r"
steps = 3
[model]
path = "m"
[task]
use = "t:T"
[queue]
min_tokens = 1
max_tokens = 2
"""
SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}
ITEMS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
OPTIONS = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        ITEMS.filter(lambda value: value is not None),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


def write(directory: pathlib.Path, text: str = SMALLEST) -> pathlib.Path:
    path = directory / "recipe.toml"
    path.write_text(text)
    return path


def refusal(path: pathlib.Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def field_values(hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
        bool: st.booleans(),
        dict[str, int]: st.dictionaries(st.text(max_size=6), st.integers(-(2**63), 2**63 - 1), max_size=3),
        tuple[str, ...]: st.lists(st.text(max_size=20), max_size=3).map(tuple),
        tuple[int, ...]: st.lists(st.integers(0, 7), max_size=3).map(tuple),
        dict[str, tuple[float, float]]: st.dictionaries(
            st.text(max_size=6), st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), max_size=3
        ),
    }
    return simple.get(hint, OPTIONS)


def sections(cls: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: field_values(hints[f.name]) for f in dataclasses.fields(cls)})


RECIPES = st.builds(Recipe, sglang=OPTIONS, **{name: sections(cls) for name, cls in SECTIONS.items()})


def test_the_smallest_recipe_loads_with_defaults(tmp_path: pathlib.Path) -> None:
    recipe = config.load(write(tmp_path))
    assert recipe.run.steps == 3 and recipe.queue.max_tokens == 2
    assert recipe.engine == config.Engine() and recipe.sglang == {}
    assert recipe.run_directory == pathlib.Path("runs/r")


@LIGHT
@given(recipe=RECIPES)
def test_a_dumped_recipe_loads_to_an_equal_one(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    config.dump(recipe, path)
    assert config.load(path) == recipe


def test_every_section_but_options_has_a_type() -> None:
    assert set(SECTIONS) == {f.name for f in dataclasses.fields(Recipe)} - {"sglang"}


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_an_unknown_key_lists_the_known_ones_of_its_section(tmp_path: pathlib.Path, section: str) -> None:
    path = write(tmp_path)
    text = refusal(path, f"{section}.chunk_tokenz=1")
    assert str(path) in text and section in text and "chunk_tokenz" in text
    for field in dataclasses.fields(SECTIONS[section]):  # type: ignore[arg-type]
        assert repr(field.name) in text


def test_an_unknown_section_lists_the_known_ones(tmp_path: pathlib.Path) -> None:
    text = refusal(write(tmp_path, SMALLEST + "[engines]\ncount = 2\n"))
    assert "engines" in text and all(repr(name) in text for name in [*SECTIONS, "sglang"])


def test_unknown_keys_of_passed_through_options_are_not_ours_to_refuse(tmp_path: pathlib.Path) -> None:
    recipe = config.load(write(tmp_path), ["sglang.any_thing=true", "learner.model.deeper.still=[1, 2]"])
    assert recipe.sglang == {"any_thing": True}
    assert recipe.learner.model == {"deeper": {"still": [1, 2]}}


@pytest.mark.parametrize("section", ["run", "model", "task", "queue"])
def test_a_missing_section_is_named(tmp_path: pathlib.Path, section: str) -> None:
    head, _, rest = SMALLEST.partition(f"[{section}]")
    text = refusal(write(tmp_path, head + "".join(f"[{part}" for part in rest.split("[")[1:])))
    assert f"{section} is missing" in text


@pytest.mark.parametrize("key", ["name", "steps", "path", "use", "min_tokens", "max_tokens"])
def test_a_missing_key_is_named(tmp_path: pathlib.Path, key: str) -> None:
    lines = [line for line in SMALLEST.splitlines() if not line.startswith(f"{key} ")]
    assert f"{key} is missing" in refusal(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    "override",
    [
        "run.steps='3'",
        "run.steps=3.5",
        "run.steps=true",
        "run.steps=[3]",
        "run.steps={a = 1}",
        "run.steps=many",
        "run.steps=2024-01-01",
        "run.steps=nan",
        "run.name=3",
        "run.name=true",
        "run.name=[]",
        "engine.chunk_seconds=soon",
        "engine.chunk_seconds='0.1'",
        "engine.chunk_seconds=true",
        "rollout.sampling=3",
        "rollout.sampling=[1]",
        "learner.optimizer=adam",
        "task.options=1",
    ],
)
def test_a_wrong_type_says_where_what_was_expected_and_what_came(tmp_path: pathlib.Path, override: str) -> None:
    key, _, _ = override.partition("=")
    text = refusal(write(tmp_path), override)
    assert key in text and "xpected" in text and "got" in text


@pytest.mark.parametrize("value", ["3", "[]", "'x'", "true"])
def test_a_value_where_a_section_belongs_is_refused(tmp_path: pathlib.Path, value: str) -> None:
    text = refusal(write(tmp_path, f"engine = {value}\n{SMALLEST}"))
    assert "engine" in text and "table" in text
    assert "engine" in refusal(write(tmp_path, f"engine = {value}\n{SMALLEST}"), "engine.count=2")


@pytest.mark.parametrize("override", ["algorithm.loss=ppo", "algorithm.advantage=''", "algorithm.aggregation=3"])
def test_a_choice_that_does_not_exist_lists_those_that_do(tmp_path: pathlib.Path, override: str) -> None:
    text = refusal(write(tmp_path), override)
    key, _, value = override.partition("=")
    assert key in text and value.strip("'") in text
    hint = typing.get_type_hints(config.Algorithm)[key.removeprefix("algorithm.")]
    assert all(repr(choice) in text for choice in typing.get_args(hint))


def test_an_integer_is_a_float_where_one_is_expected(tmp_path: pathlib.Path) -> None:
    assert config.load(write(tmp_path), ["engine.chunk_seconds=1"]).engine.chunk_seconds == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.name=other", "other"),
        ("run.name='other'", "other"),
        ("run.name=a=b", "a=b"),
        ("run.name=", ""),
        ("run.name=a b", "a b"),
        ("run.name=ü", "ü"),
        (" run.name =x", "x"),
    ],
)
def test_an_override_is_toml_or_a_bare_word(tmp_path: pathlib.Path, override: str, expected: str) -> None:
    assert config.load(write(tmp_path), [override]).run.name == expected


def test_the_last_override_wins_and_sections_are_made_as_needed(tmp_path: pathlib.Path) -> None:
    recipe = config.load(write(tmp_path), ["run.steps=5", "engine.count=2", "run.steps=7"])
    assert (recipe.run.steps, recipe.engine.count, recipe.engine.chunk_tokens) == (7, 2, 16)


@pytest.mark.parametrize(
    "override", ["", "=", "run", "run=1", "run.steps", ".steps=1", "run.=1", "run..steps=1", "=1", "steps=1"]
)
def test_an_override_that_is_none_is_refused(tmp_path: pathlib.Path, override: str) -> None:
    assert "section.key=value" in refusal(write(tmp_path), override)


def test_an_override_below_a_value_is_refused(tmp_path: pathlib.Path) -> None:
    assert "not a section" in refusal(write(tmp_path), "run.steps.deeper=1")


def test_a_file_that_is_missing_a_folder_or_no_toml_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    assert "nowhere.toml" in refusal(tmp_path / "nowhere.toml")
    assert str(tmp_path) in refusal(tmp_path)
    assert "not TOML" in refusal(write(tmp_path, "[run\nname"))
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    assert "not TOML" in refusal(tmp_path / "recipe.toml")


@LIGHT
@given(data=st.binary(max_size=60))
def test_a_file_of_random_bytes_is_a_configuration_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        config.load(path)


def test_a_loaded_recipe_cannot_be_changed(tmp_path: pathlib.Path) -> None:
    recipe = config.load(write(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.run.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", sorted((pathlib.Path(__file__).parent.parent / "recipes").glob("*.toml")), ids=lambda p: p.name
)
def test_every_recipe_of_the_repository_loads(path: pathlib.Path) -> None:
    config.load(path)
