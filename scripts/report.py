"""`report.png`: reward, staleness and throughput of a run over time, from its metrics file."""

import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts import records

SMOOTH_STEPS = 5
"""Few trajectories finish during one step: its mean alone is noisy."""


def _smooth(steps: list[dict[str, Any]]) -> list[float]:
    """Mean reward of the trajectories that finished during the last few steps, up to each step."""
    means = []
    for end in range(1, len(steps) + 1):
        window = [r for r in steps[max(0, end - SMOOTH_STEPS) : end] if r["finished"]]
        finished = sum(r["finished"] for r in window)
        means.append(sum(r["reward_mean"] * r["finished"] for r in window) / finished if finished else math.nan)
    return means


def _number(value: float | None) -> float:
    """JSON has no NaN; matplotlib has."""
    return math.nan if value is None else value


def plot(directory: pathlib.Path) -> pathlib.Path:
    """Draw the three panels, with a line through them where a process was started again; the file's path."""
    kinds = records.read(directory)
    steps = kinds["step"]
    statuses = [record for record in kinds["status"] if record.get("received_tokens")]  # not while processes start
    figure, (reward, age, rate) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, constrained_layout=True)
    figure.suptitle(directory.name)
    times = [r["wall_s"] for r in steps]

    reward.plot(times, [_number(r["reward_mean"]) for r in steps], ".", alpha=0.4, label="finished during a step")
    reward.plot(times, _smooth(steps), label=f"finished during the last {SMOOTH_STEPS} steps")
    reward.set(ylabel="mean reward, before any filter")
    reward.legend(loc="lower right")

    age.plot(times, [_number(r["token_age_mean"]) for r in steps], ".-", label="mean age of trained tokens")
    age.plot(times, [r["token_age_max"] for r in steps], ".", label="oldest trained token")
    age.set(ylabel="age (versions)")
    age.legend(loc="upper left", framealpha=0.6)

    for name, label in (("received_tokens", "generated"), ("trained_tokens", "trained")):
        points = [(r["wall_s"], r.get(name) or 0.0) for r in statuses]
        window = 5  # statuses come once a second; five smooth over the learner's steps
        pairs = list(zip(points, points[window:], strict=False))
        rate.plot([b[0] for a, b in pairs], [(b[1] - a[1]) / max(b[0] - a[0], 1e-9) for a, b in pairs], label=label)
    rate.set(ylabel="tokens / s", xlabel="seconds since the start", ylim=(0, None))
    rate.legend(loc="lower right")
    for start in [*kinds["restart"], *kinds["resume"]]:
        for panel in (reward, age, rate):
            panel.axvline(start["wall_s"], color="gray", linewidth=0.8, linestyle=":")
        words = {"rotation": 90, "va": "top", "fontsize": 7, "color": "gray"}
        of = start.get("name", "resumed")
        reward.text(start["wall_s"], 0.98, of, transform=reward.get_xaxis_transform(), **words)
    path = directory / "report.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
