"""`stream-rl bench learned`: held-out rewards are each kind's, and accuracies are of what was asked."""

import json
import pathlib

import pytest

from scripts.bench.learned import by_kind, kind_curves, measure
from stream_rl import config
from stream_rl.errors import ConfigError


def evaluation(label: str, *rewards: float) -> dict[str, object]:
    kinds = [{"kind": "a"}, {"kind": "b"}, {"kind": "a"}, {}]
    return {"label": label, "rewards": list(rewards), "data": kinds}


def test_a_kind_has_the_mean_of_its_own_prompts_and_the_newest_evaluation_counts() -> None:
    told = [evaluation("first", 1, 1, 1, 1), evaluation("first", 0, 1, 1, 0), evaluation("last", 1, 0, 1, 1)]
    assert by_kind(told) == {
        "all": {"first": 0.5, "last": 0.75},
        "a": {"first": 0.5, "last": 1.0},
        "b": {"first": 1.0, "last": 0.0},
    }


def test_an_accuracy_is_of_what_was_asked_and_not_of_all() -> None:
    steps = [
        {"wall_s": 12.0, "finished": 10.0, "reward.a": 0.1, "reward.a_asked": 0.2},
        {"wall_s": 14.0, "finished": 30.0, "reward.a": 0.3, "reward.a_asked": 0.3, "reward.mean": 1.0},
        {"wall_s": 15.0, "finished": 0.0},
    ]
    later = pytest.approx(10 / 11)
    assert kind_curves(steps) == {"a": [(12.0, 0.5), (14.0, later), (15.0, later)]}


def test_a_run_becomes_one_object(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="no run that came to its end"):
        measure(tmp_path)
    root = pathlib.Path(__file__).resolve().parents[1]
    config.dump(config.load(root / "recipes" / "smollm2.toml"), tmp_path / "recipe.toml")
    summary = {"wall_s": 100.0, "steps": 1, "weights_hash_engine": "a", "weights_hash_learner": "a"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    step = {"kind": "step", "wall_s": 20.0, "learner.busy_seconds": 1.0, "finished": 2.0, "reward_mean": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    lines = [evaluation("first", 0, 0, 0, 0), evaluation("last", 1, 1, 1, 1)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure(tmp_path)
    assert found["rises"] == {"all": 1.0, "a": 1.0, "b": 1.0}
    assert found["met"] == {"rises": False, "within": True}, "two kinds are not three, and all of them are no kind"
    assert found["curve"] == [(20.0, 0.5)] and found["weights_equal"]
