"""The tables, the page and the recipe name the same things; settings that cannot work are refused by name."""

import dataclasses
import math
import pathlib
import re
import typing
from typing import Any

import pytest

from algorithms import settings
from algorithms.corrections import IMPORTANCE, MASKS
from algorithms.denominators import DENOMINATORS
from algorithms.estimators import ESTIMATORS
from algorithms.kl import KL_ESTIMATORS
from algorithms.objectives import OBJECTIVES
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

PAGE = pathlib.Path(settings.__file__).with_name("README.md").read_text()
TABLES: dict[str, dict[str, Any]] = {
    "advantage": ESTIMATORS,
    "loss": OBJECTIVES,
    "importance": IMPORTANCE,
    "masks": MASKS,
    "kl_estimator": KL_ESTIMATORS,
    "aggregation": DENOMINATORS,
}
every_table = pytest.mark.parametrize("key", TABLES)


@every_table
def test_the_page_has_a_row_for_each_name_and_no_other(key: str) -> None:
    [section] = [part for part in PAGE.split("\n## ") if re.match(rf"[^\n]*`{key}\b", part)]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(TABLES[key])
    assert all(len(row.split(" | ")) == 3 for _, row in rows)


@every_table
def test_the_recipe_takes_each_name_and_no_other(key: str) -> None:
    if key == "masks":
        assert tuple(MASKS) == settings.MASK_NAMES
    else:
        assert typing.get_args(typing.get_type_hints(Algorithm)[key]) == tuple(TABLES[key])


def test_the_page_has_every_setting_and_its_default() -> None:
    for field in dataclasses.fields(Algorithm):
        assert f"`{field.name}" in PAGE, field.name
        if field.name in TABLES and isinstance(field.default, str):
            [section] = [part for part in PAGE.split("\n## ") if re.match(rf"[^\n]*`{field.name}\b", part)]
            assert f"Default: `{field.default}`." in section


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_low": 0.0}, "0 < clip_low <= 1"),
        ({"clip_low": 1.5}, "0 < clip_low <= 1"),
        ({"clip_high": math.nan}, "clip_high > 0"),
        ({"importance_cap": 0.5}, "importance_cap >= 1"),
        ({"loss": "gspo"}, 'loss = "gspo" needs importance = "ratio", got "token"'),
        ({"loss": "cispo", "importance": "none"}, 'needs importance = "ratio", got "none"'),
        ({"loss": "dual_clip", "importance": "ratio", "dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"aggregation": "constant"}, "constant must be positive"),
        ({"value_clip": -0.1}, "value_clip must be 0"),
        ({"masks": {"tokens": (0.5, 2.0)}}, r"\['token', 'sequence', 'geometric', 'veto'\], got 'tokens'"),
        ({"masks": {"token": (1.5, 2.0)}}, r"masks.token .* got \[1.5, 2.0\]"),
        ({"masks": {"veto": (0.5, 1.0)}}, "masks.veto"),
        ({"gamma": 1.1, "advantage": "gae"}, "within 0 and 1"),
        ({"gamma": 0.9}, 'no effect with advantage = "grpo"'),
        ({"kl_coefficient": -0.1}, "kl_coefficient must be 0"),
        ({"overlong_buffer": 10}, "overlong_buffer <= overlong_length"),
        ({"overlong_buffer": -1}, "0 <= overlong_buffer"),
        ({"advantage": "distillation", "kl_coefficient": 0.1, "kl_in": "reward"}, "looks at no reward"),
        ({"advantage": "distillation", "overlong_buffer": 1, "overlong_length": 2}, "looks at no reward"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings.check(Algorithm(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "importance_cap": math.inf,
            "masks": {"token": (0.5, 5.0), "geometric": (0.99, 1.01), "veto": (0.0, math.inf)},
        },
        {"loss": "cispo", "importance": "ratio", "clip_low": 1.0},
        {"loss": "gspo", "importance": "ratio", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
        {"advantage": "gae", "gamma": 0.99, "kl_coefficient": 0.01, "kl_in": "reward", "kl_estimator": "k1"},
        {"clip_high": 0.28, "overlong_buffer": 4096, "overlong_length": 20480},
    ],
)
def test_settings_that_fit_are_taken(changes: dict[str, Any]) -> None:
    settings.check(Algorithm(**changes))
