"""`stream-rl bench loop`: modes are settings, figures are what a run wrote down, comparisons see what is missing."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench import loop, loop_figures
from scripts.bench.cli import bench
from scripts.bench.loop import MODES, Plan, of_mode
from stream_rl import config
from stream_rl.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = config.load(ROOT / "recipes" / "long-tail-cpu.toml")


def plan(gpus: int = 0, learner_gpus: int = 1, **recipe: Any) -> Plan:
    return Plan(
        recipe=dataclasses.replace(RECIPE, **recipe), modes=MODES, seconds=5.0, gpus=gpus, learner_gpus=learner_gpus,
        together=False, kill_after=0.0, reward=None, start_s=60.0, directory=pathlib.Path("/nowhere"),
    )  # fmt: skip


# -- modes ---------------------------------------------------------------------------------------------------


def test_modes_differ_from_each_other_in_how_they_wait_and_where_they_run_alone() -> None:
    made = {mode: dataclasses.asdict(of_mode(plan(gpus=4), mode)) for mode in MODES}
    for mode, recipe in made.items():
        differing = {
            (section, key)
            for section in recipe
            for key in (recipe[section] if isinstance(recipe[section], dict) else ())
            if recipe[section][key] != made["streaming"][section].get(key)
        }
        allowed = {("run", "name"), ("queue", "mode"), ("weights", "delivery")}
        if mode == "colocated":
            allowed |= {(s, k) for s in ("engine", "learner") for k in ("count", "devices", "processes")}
        assert differing <= allowed, mode


def test_a_learner_waits_for_its_first_lease_until_its_mode_has_its_turn() -> None:
    last = dataclasses.replace(plan(), seconds=300.0)
    assert of_mode(last, "reload").queue.lease_timeout_s >= len(MODES) * 300.0 + 60.0
    assert (
        of_mode(plan(queue=dataclasses.replace(RECIPE.queue, lease_timeout_s=1e6)), "reload").queue.lease_timeout_s
        == 1e6
    )


def test_gpus_are_divided_or_shared() -> None:
    split, shared = (of_mode(plan(gpus=4), mode) for mode in ("streaming", "colocated"))
    assert (split.engine.count, split.engine.devices, split.learner.devices) == (3, (0, 1, 2), (3,))
    assert (shared.engine.count, shared.engine.devices, shared.learner.devices) == (4, (0, 1, 2, 3), (0, 1, 2, 3))
    one = of_mode(plan(gpus=1), "streaming")
    assert (one.engine.devices, one.learner.devices) == ((0,), (0,))
    two = of_mode(plan(gpus=4, learner_gpus=2, sglang=RECIPE.sglang | {"tp_size": 2}), "streaming")
    assert (two.engine.count, two.learner.processes) == (1, 2)


@pytest.mark.parametrize(("gpus", "learner_gpus", "tp"), [(2, 3, 1), (2, 0, 1), (4, 1, 2)])
def test_gpus_that_cannot_be_divided_are_an_error(gpus: int, learner_gpus: int, tp: int) -> None:
    with pytest.raises(ConfigError):
        of_mode(plan(gpus, learner_gpus, sglang=RECIPE.sglang | {"tp_size": tp}), "streaming")


@pytest.mark.parametrize("words", [["--modes", "streaming,nonsense"], ["--modes", ""], ["--seconds", "0"]])
def test_a_plan_that_cannot_be_carried_out_is_an_error(words: list[str]) -> None:
    result = CliRunner().invoke(bench, ["loop", str(ROOT / "recipes" / "long-tail-cpu.toml"), *words])
    assert isinstance(result.exception, ConfigError)


# -- figures -------------------------------------------------------------------------------------------------


def write(directory: pathlib.Path, steps: int, every: float = 2.0, busy: float = 0.5, **summary: Any) -> None:
    """A run whose steps take `every` seconds, each of 1000 tokens, from 10 s on; engines busy half of the time."""
    directory.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for second in range(int(10 + steps * every) + 2):
        tokens = max(0.0, 1100.0 * (second - 10) / every)
        lines.append({"kind": "status", "wall_s": float(second), "received_tokens": tokens + (second >= 10),
                      "engine_busy_s": max(0.0, 0.5 * (second - 10))})  # fmt: skip
    for step in range(steps):
        wall = 10 + (step + 1) * every
        lines.append({"kind": "step", "step": step, "wall_s": wall, "trained_tokens": 1000.0, "masked_tokens": 100.0,
                      "learner.busy_seconds": busy, "token_age_mean": 1.5, "token_age_max": 3.0, "finished": 4.0,
                      "reward_mean": 0.1 * (step + 1)})  # fmt: skip
        lines.append({"kind": "version", "wall_s": wall, "engine": "engine-0", "stall_seconds": 0.001, "anchor": False,
                      "update_bytes": 300, "full_bytes": 9000})  # fmt: skip
    lines.sort(key=lambda line: line["wall_s"])
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    books = {"conserved": True, "generation_pauses": 0, "aborted_requests": 0, "hash_mismatches": 0}
    hashes = {"weights_hash_engine": "a", "weights_hash_learner": "a"}
    (directory / "summary.json").write_text(json.dumps(books | hashes | summary))


def test_figures_are_those_of_the_steps_behind_the_first(tmp_path: pathlib.Path) -> None:
    write(tmp_path, steps=10)
    found = loop_figures.figures(tmp_path)
    assert found["trained_tokens_per_second"] == pytest.approx(500)
    assert found["generated_tokens_per_second"] == pytest.approx(550)
    assert (found["G"], found["T"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert (found["engine_busy"], found["learner_busy"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert found["slower_side"] == "engines" and found["predicted_idle"] == pytest.approx(0.5)
    assert found["masked_share"] == pytest.approx(1 / 11)
    assert found["stall_ms"]["p50"] == pytest.approx(1.0) and found["versions"] == 10
    assert found["curve"][0] == (pytest.approx(2.0), pytest.approx(0.1))
    assert found["curve"][4][1] == pytest.approx(0.4), "the mean of the last three"


def test_of_few_steps_all_count_from_when_rollouts_began(tmp_path: pathlib.Path) -> None:
    write(tmp_path, steps=2, every=20.0)
    found = loop_figures.figures(tmp_path)
    assert not found["from_first_step"] and found["trained_tokens_per_second"] == pytest.approx(50)


def test_a_run_in_which_nothing_happened_says_so(tmp_path: pathlib.Path) -> None:
    assert "error" in loop_figures.figures(tmp_path)


def modes(tmp_path: pathlib.Path, **changes: Any) -> dict[str, Any]:
    write(tmp_path / "fast", steps=20)
    write(tmp_path / "slow", steps=10, every=6.0, **changes)
    return {
        "streaming": loop_figures.figures(tmp_path / "fast"),
        "synchronous": loop_figures.figures(tmp_path / "slow"),
    }


def test_modes_are_compared_at_a_reward_that_all_reached(tmp_path: pathlib.Path) -> None:
    found = loop_figures.compared(modes(tmp_path), None)
    assert found["ratios"]["over_synchronous"] == pytest.approx(3.0)
    assert found["reward"] == pytest.approx(0.9)
    assert found["ratios"]["wall_of_synchronous"] == pytest.approx(1 / 3)
    assert found["met"]["over_synchronous"] and found["met"]["wall_of_synchronous"] and found["met"]["accounted"]
    assert found["met"]["over_colocated"] is None and found["met"]["stall_of_reload"] is None
    assert not found["met"]["slower_side_busy"]


@pytest.mark.parametrize(
    "wrong", [{"conserved": False}, {"aborted_requests": 1}, {"weights_hash_engine": "b"}, {"hash_mismatches": 1}]
)
def test_books_that_are_wrong_in_one_mode_are_seen(wrong: dict[str, Any], tmp_path: pathlib.Path) -> None:
    assert loop_figures.compared(modes(tmp_path, **wrong), None)["met"]["accounted"] is False


def test_a_mode_that_failed_is_compared_with_nothing(tmp_path: pathlib.Path) -> None:
    broken = modes(tmp_path) | {"synchronous": {"steps": 0, "error": "no step was taken"}}
    found = loop_figures.compared(broken, None)
    assert found["ratios"]["over_synchronous"] is None and math.isfinite(found["reward"])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_the_time_to_a_reward_is_where_the_line_first_crosses_it(rewards: list[float], goal: float) -> None:
    points = [(float(i), reward) for i, reward in enumerate(rewards)]
    found = loop_figures.time_to(points, goal)
    above = [i for i, reward in enumerate(rewards) if reward >= goal]
    if not above:
        assert found is None
    else:
        assert found is not None and above[0] - 1 <= found <= above[0]


def test_a_bench_that_is_interrupted_shows_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(plan: Plan, ended: dict[str, str], say: Any) -> None:
        write(plan.directory / "streaming", steps=20)
        write(plan.directory / "synchronous", steps=3)
        ended["streaming"] = ""
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_all", interrupted)
    asked = dataclasses.replace(plan(), directory=tmp_path / "runs", modes=("streaming", "synchronous", "reload"))
    found = loop.measure(asked, lambda line: None)
    errors = {mode: figures.get("error") for mode, figures in found["modes"].items()}
    assert errors == {"streaming": None, "synchronous": "interrupted", "reload": "interrupted"}
    assert found["modes"]["streaming"]["steps"] == 20 and found["met"]["accounted"] is True


@pytest.mark.server
@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_modes_run_on_real_parts_and_are_accounted_for(tmp_path: pathlib.Path) -> None:
    from scripts import tiny_model

    tiny_model.create(tmp_path / "model")
    words = ["loop", str(ROOT / "recipes" / "long-tail-cpu.toml"), f"model.path={tmp_path / 'model'}"]
    words += ["--modes", "streaming,synchronous,reload", "--seconds", "10", "--directory", str(tmp_path / "runs")]
    result = CliRunner().invoke(bench, [*words, "--json", str(tmp_path / "loop.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "loop.json").read_text())
    assert found["met"]["accounted"] is True
    assert all(mode["steps"] > 0 and mode["weights_equal"] for mode in found["modes"].values())
    assert found["modes"]["synchronous"]["age_max"] == 0
    assert found["modes"]["reload"]["books"]["generation_pauses"] > 0
