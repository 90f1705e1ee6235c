"""`stream-rl bench learned`: what a run of a real model learned, as one object: held-out rewards by kind of prompt,
before and after, and curves over wall time, start-up included.

Kinds are those that a task names in its prompts' data as `kind`; a part of the reward that has a companion `PART_asked`
is an accuracy: the ratio of their means.
"""

import collections
import datetime
import importlib.metadata
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import click

from scripts import records, runs
from scripts.bench.loop_figures import BOOKS, curve
from stream_rl import config
from stream_rl.errors import ConfigError
from stream_rl.metrics import finite, read_lines

PACKAGES = ("sglang", "torch", "megatron-core")
SMOOTH = 10
"""Steps that a point of a kind's curve is the mean of."""
POINTS = 300
"""Of a curve, at most."""
RISE = 0.30
"""Of held-out accuracy, on three kinds."""
WITHIN_S = 540.0


def measure(directory: pathlib.Path) -> dict[str, Any]:
    """Raises ConfigError for a folder without a run that came to its end."""
    summary = runs.summary_of(directory)
    if summary is None:
        raise ConfigError(f"{directory} holds no run that came to its end (summary.json)")
    recipe, steps = config.load(directory / "recipe.toml"), records.read(directory)["step"]
    heldout = by_kind(list(read_lines(directory / "heldout.jsonl")))
    rises = {kind: means["last"] - means["first"] for kind, means in heldout.items() if {"first", "last"} <= set(means)}
    from engines.megatron import specimen

    return {
        "bench": "learned",
        "date": datetime.date.today().isoformat(),
        "command": f"stream-rl train recipes/{recipe.run.name}.toml",
        "device": specimen.device_name(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "wall_s": summary["wall_s"],
        "steps": summary["steps"],
        "heldout": heldout,
        "rises": rises,
        "curve": _thinned(curve(steps, 0.0)),
        "kinds": {kind: _thinned(points) for kind, points in kind_curves(steps).items()},
        "books": {name: summary.get(name) for name in BOOKS},
        "weights_equal": summary["weights_hash_engine"] == summary["weights_hash_learner"],
        "met": {
            "rises": sum(rise >= RISE for kind, rise in rises.items() if kind != "all") >= 3,
            "within": summary["wall_s"] <= WITHIN_S,
        },
        "targets": {"rises": f"three kinds rise by {RISE:.0%} or more", "within": f"{WITHIN_S:.0f} s with start-up"},
    }


def by_kind(told: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean reward of each kind, and of all, by label: first, last.  Of an evaluation told twice the newest counts."""
    means: dict[str, dict[str, float]] = {}
    for evaluation in told:
        rewards: dict[str, list[float]] = collections.defaultdict(list)
        for reward, data in zip(evaluation["rewards"], evaluation["data"], strict=True):
            rewards["all"].append(reward)
            if "kind" in data:
                rewards[str(data["kind"])].append(reward)
        for kind, each in rewards.items():
            means.setdefault(kind, {})[evaluation["label"]] = statistics.fmean(each)
    return means


def kind_curves(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(seconds, accuracy on what was trained on) of each part that has a companion."""
    asked = sorted({name for step in steps for name in step if name.startswith("reward.") and name.endswith("_asked")})
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in asked:
        part, points = name.removesuffix("_asked"), []
        for end in range(1, len(steps) + 1):
            window = steps[max(0, end - SMOOTH) : end]
            right, count = (sum((r.get(key) or 0.0) * r["finished"] for r in window) for key in (part, name))
            if count:
                points.append((round(steps[end - 1]["wall_s"], 2), right / count))
        curves[part.removeprefix("reward.")] = points
    return curves


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / POINTS))
    return [(x, round(y, 4)) for x, y in points[every - 1 :: every]]


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def learned(run: pathlib.Path, path: pathlib.Path | None) -> None:
    """What the RUN in a directory learned: held-out rewards by kind, and curves."""
    text = json.dumps(finite(measure(run)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
