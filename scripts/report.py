"""`report.png`: reward, staleness and throughput of a run over time, from its metrics file."""

import json
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(directory: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(step records, status records) of a run's metrics.jsonl, in order."""
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in lines if r["kind"] == "step"], [r for r in lines if r["kind"] == "status"]


def _number(value: float | None) -> float:
    """JSON has no NaN; matplotlib has."""
    return math.nan if value is None else value


def plot(directory: pathlib.Path) -> pathlib.Path:
    """Draw the three panels; the file's path."""
    steps, statuses = read(directory)
    figure, (reward, age, rate) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, constrained_layout=True)
    figure.suptitle(directory.name)
    times = [r["wall_s"] for r in steps]

    reward.plot(
        times, [_number(r["reward_mean"]) for r in steps], ".-", label="mean over all finished trajectories, per step"
    )
    reward.set(ylabel="reward", ylim=(-0.02, 1.02))
    reward.legend(loc="lower right")

    age.plot(times, [_number(r["token_age_mean"]) for r in steps], ".-", label="mean age of trained tokens")
    age.plot(times, [r["token_age_max"] for r in steps], ".", label="oldest trained token")
    age.set(ylabel="age (versions)")
    age.legend(loc="upper right")

    for name, label in (("received_tokens", "generated"), ("trained_tokens", "trained")):
        points = [(r["wall_s"], r.get(name) or 0.0) for r in statuses]
        window = 5  # statuses come once a second; five smooth over the learner's steps
        pairs = list(zip(points, points[window:], strict=False))
        rate.plot([b[0] for a, b in pairs], [(b[1] - a[1]) / max(b[0] - a[0], 1e-9) for a, b in pairs], label=label)
    rate.set(ylabel="tokens / s", xlabel="seconds since the start", ylim=(0, None))
    rate.legend(loc="lower right")
    path = directory / "report.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
