"""The endpoint's bench, small, with a real engine."""

import os

import pytest

from scripts.bench.endpoint import Plan, measure
from stream_rl.errors import ConfigError

SMALL = {
    "model": None, "tiny": True, "sessions": 4, "turns": 2, "tokens": 8, "pairs": 3, "start_seconds": 300.0,
    "options": {},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_session_is_one_branch_and_every_figure_is_there() -> None:
    figures = measure(Plan(**SMALL), print)  # type: ignore[arg-type]
    assert figures["rate_ratio"]["pairs"] == 3
    assert 0 < figures["rate_ratio"]["low"] <= figures["rate_ratio"]["mean"] <= figures["rate_ratio"]["high"]
    assert figures["cpu_ms_per_request"] > 0
    assert figures["met"].keys() == figures["targets"].keys()
    assert "SGLANG_PLUGINS" not in os.environ, "what starts after it has our plugin"


@pytest.mark.parametrize("wrong", [{"pairs": 2}, {"sessions": 0}, {"tokens": 0}])
def test_a_plan_without_figures_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected 3 pairs"):
        measure(Plan(**SMALL | wrong), print)  # type: ignore[arg-type]
