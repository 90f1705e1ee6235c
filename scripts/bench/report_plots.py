"""The pictures of `stream-rl bench report`, as SVG text: one figure each, drawn from a bench's object."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "stream-rl"  # the same figures give the same bytes
Modes = Mapping[str, Mapping[str, Any]]


def reward_over_time(modes: Modes, since: str = "rollouts began") -> str:
    figure, panel = plt.subplots(figsize=(8, 4), constrained_layout=True)
    for name, mode in modes.items():
        if points := mode.get("curve"):
            panel.plot([p[0] for p in points], [p[1] for p in points], ".-", label=name)
    panel.set(xlabel=f"seconds since {since}", ylabel="mean reward of what finished")
    panel.legend(loc="lower right")
    return _svg(figure)


def timelines(modes: Modes) -> str:
    """For each mode: share of each second that the engines were busy, and the learner's steps under it."""
    shown = {name: mode["timeline"] for name, mode in modes.items() if mode.get("timeline")}
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(9, 1.5 * len(shown) + 0.6), sharex=True, squeeze=False, constrained_layout=True
    )
    for panel, (name, line) in zip(panels[:, 0], shown.items(), strict=True):
        rows = line["engines"]
        panel.fill_between([r[0] for r in rows], [min(r[1], 1.0) for r in rows], step="pre", alpha=0.5, label="engines")
        panel.broken_barh([(a, b - a) for a, b in line["learner"]], (-0.45, 0.35), color="tab:orange", label="learner")
        panel.set(ylabel=name, ylim=(-0.5, 1.05), yticks=[0, 1])
    panels[0, 0].legend(loc="upper right", fontsize=8)
    panels[-1, 0].set(xlabel="seconds since rollouts began")
    return _svg(figure)


def ages(modes: Modes) -> str:
    figure, panel = plt.subplots(figsize=(8, 3.2), constrained_layout=True)
    for name, mode in modes.items():
        if values := mode.get("ages"):
            panel.plot([math.nan if value is None else value for value in values], ".-", label=name)
    panel.set(xlabel="step", ylabel="mean age of trained tokens (versions)")
    panel.legend()
    return _svg(figure)


def stalls(samples: Mapping[str, Sequence[float]]) -> str:
    """Histograms of the stall of a version, in milliseconds, on one logarithmic axis."""
    figure, panel = plt.subplots(figsize=(8, 3.2), constrained_layout=True)
    values = [value for each in samples.values() for value in each if value > 0]
    if values:
        low, high = math.log10(min(values)), math.log10(max(values)) + 1e-6
        edges = [10 ** (low + (high - low) * i / 40) for i in range(41)]
        for name, each in samples.items():
            panel.hist(each, bins=edges, alpha=0.5, label=name)
    panel.set(xscale="log", xlabel="milliseconds of an engine for one version", ylabel="versions")
    panel.legend()
    return _svg(figure)


def ratios(arms: Mapping[str, Mapping[str, float]], targets: Mapping[str, float]) -> str:
    """Throughput of each arm over plain SGLang, with its interval and its target."""
    figure, panel = plt.subplots(figsize=(8, 0.5 * len(arms) + 1), constrained_layout=True)
    for place, (name, ratio) in enumerate(arms.items()):
        below, above = ratio["mean"] - ratio["low"], ratio["high"] - ratio["mean"]
        panel.errorbar(ratio["mean"], place, xerr=[[below], [above]], marker="o", capsize=3, color="tab:blue")
        if name in targets:
            panel.plot([targets[name]] * 2, [place - 0.3, place + 0.3], color="tab:red")
    panel.set(yticks=range(len(arms)), yticklabels=list(arms), xlabel="tokens a second over plain SGLang's")
    panel.axvline(1.0, color="gray", linewidth=0.8)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
