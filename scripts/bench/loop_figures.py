"""What `stream-rl bench loop` makes of a mode's run: its metrics.jsonl and summary.json, in figures.

A mode is measured from the end of its first step to the end of its last, so that the ramp counts for nobody; one that
took fewer than FEWEST steps, from when its rollouts began.
"""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scripts import records
from scripts.runs import summary_of
from stream_rl.metrics import quantile

FEWEST = 4
"""Steps; of fewer, a cycle more or less is too much of the whole."""
SMOOTH = 3
"""Steps that a point of the reward's curve is the mean of."""
STREAMING, SYNCHRONOUS, COLOCATED, RELOAD = "streaming", "synchronous", "colocated", "reload"
TARGETS = {
    "over_synchronous": ">= 2.0 times the trained tokens a second",
    "wall_of_synchronous": "<= 0.55 of the time to the same reward",
    "over_colocated": ">= 1.0 times the trained tokens a second",
    "slower_side_busy": ">= 95 %",
    "other_side_idle": "what G and T predict, within 5 points",
    "stall_of_reload": "<= 1/50 of the stall for each version",
    "accounted": "books balanced, live weights those of the learner; where versions go live, no pause and no abort",
}
INCLUDES = {
    "G": "seconds a step that an engine was busy: turns of its scheduler's loop that ran a batch, mean over engines",
    "T": "seconds a step that the learner was busy: from a lease to the end of its optimizer step",
    "u": "tokens of a busy engine second over those in the mode where it is highest: how full its batches were",
    "predicted_idle": "of the side that is not the slower one: 1 - min(G, T) / max(G, T)",
    "stall_ms": "of one engine for one version: the scheduler thread's time, or from the pause until it went on",
    "reward": f"mean over all trajectories that finished during the last {SMOOTH} steps",
}


def figures(directory: pathlib.Path) -> dict[str, Any]:
    """Of one mode's run, whether it came to its end or not."""
    kinds, summary = records.read(directory), summary_of(directory) or {}
    steps, statuses = kinds["step"], [r for r in kinds["status"] if r.get("received_tokens")]
    if not steps or not statuses:
        return {"steps": len(steps), "error": "no step was taken"}
    origin = statuses[0]["wall_s"]
    counted = steps[1:] if len(steps) > FEWEST else steps
    start = steps[0]["wall_s"] if len(steps) > FEWEST else origin
    end = steps[-1]["wall_s"]
    seconds, count = max(end - start, 1e-9), len(counted)
    engines = max(1, sum(key.startswith("engine") for key in _engines(kinds)))
    busy = (_at(statuses, "engine_busy_s", end) - _at(statuses, "engine_busy_s", start)) / engines
    generated = _at(statuses, "received_tokens", end) - _at(statuses, "received_tokens", start)
    trained, masked = (sum(r[name] for r in counted) for name in ("trained_tokens", "masked_tokens"))
    learned = sum(r["learner.busy_seconds"] for r in counted)
    g, t = busy / count, learned / count
    paused = [1e3 * r["pause_seconds"] for r in kinds["stock"] if not r["problem"]]
    stalls = [1e3 * r["stall_seconds"] for r in kinds["version"]] or paused
    deltas = [r for r in kinds["version"] if not r["anchor"]]
    return {
        "steps": len(steps),
        "window_seconds": seconds,
        "from_first_step": len(steps) > FEWEST,
        "engines": engines,
        "trained_tokens_per_second": trained / seconds,
        "generated_tokens_per_second": generated / seconds,
        "tokens_per_step": trained / count,
        "G": g,
        "T": t,
        "engine_tokens_per_busy_second": generated / busy / engines if busy else math.nan,
        "engine_busy": busy / seconds,
        "learner_busy": learned / seconds,
        "slower_side": "engines" if g >= t else "learner",
        "predicted_idle": 1 - min(g, t) / max(g, t) if max(g, t) else math.nan,
        "age_mean": sum((r["token_age_mean"] or 0.0) * r["trained_tokens"] for r in counted) / max(trained, 1),
        "age_max": max(r["token_age_max"] for r in counted),
        "ages": [r["token_age_mean"] for r in steps],
        "masked_share": masked / max(trained + masked, 1),
        "stall_ms": {name: quantile(stalls, q) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "stalls_ms": [round(stall, 3) for stall in stalls],
        "versions": len(stalls),
        "update_bytes": sum(r["update_bytes"] for r in deltas) / len(deltas) if deltas else math.nan,
        "full_bytes": deltas[0]["full_bytes"] if deltas else math.nan,
        "curve": curve(steps, origin),
        "timeline": _timeline(steps, statuses, origin, engines),
        "books": {name: summary.get(name) for name in BOOKS},
        "weights_equal": bool(summary) and summary["weights_hash_engine"] == summary["weights_hash_learner"],
    }  # fmt: skip


BOOKS = (
    "conserved", "generation_pauses", "aborted_requests", "hash_mismatches", "plugin_faults", "restarts", "resumed",
    "dropped", "retractions", "received_tokens", "trained_tokens", "token_age_p99", "masked_by_length", "length_bias",
)  # fmt: skip


def compared(modes: Mapping[str, Mapping[str, Any]], reward: float | None) -> dict[str, Any]:
    """All modes beside each other, and whether each target is met; null where a mode that it needs has no figures."""
    whole = {name: mode for name, mode in modes.items() if "error" not in mode}
    rates = {name: mode["engine_tokens_per_busy_second"] for name, mode in whole.items()}
    full = max((rate for rate in rates.values() if not math.isnan(rate)), default=math.nan)
    reached = [max((r for _, r in mode["curve"]), default=-math.inf) for mode in whole.values()]
    goal = reward if reward is not None else min(reached, default=math.nan)
    walls = {name: time_to(mode["curve"], goal) for name, mode in whole.items()}
    ours = whole.get(STREAMING)

    def over(name: str) -> float | None:
        other = whole.get(name)
        if ours is None or other is None or not other["trained_tokens_per_second"]:
            return None
        return float(ours["trained_tokens_per_second"] / other["trained_tokens_per_second"])

    wall = None
    if (here := walls.get(STREAMING)) is not None and (there := walls.get(SYNCHRONOUS)):
        wall = here / there
    stall = None
    if ours and RELOAD in whole and ours["versions"] and whole[RELOAD]["versions"]:
        stall = ours["stall_ms"]["p50"] / whole[RELOAD]["stall_ms"]["p50"]
    ratios = {"over_synchronous": over(SYNCHRONOUS), "wall_of_synchronous": wall, "over_colocated": over(COLOCATED)}
    ratios |= {"stall_of_reload": stall}
    return {
        "u": {name: rate / full for name, rate in rates.items()},
        "reward": goal,
        "seconds_to_reward": walls,
        "ratios": ratios,
        "met": _met(ratios, whole),
    }


def _met(ratios: Mapping[str, float | None], modes: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | None]:
    met: dict[str, bool | None] = {}
    for name, most, least in (
        ("over_synchronous", math.inf, 2.0),
        ("wall_of_synchronous", 0.55, 0.0),
        ("over_colocated", math.inf, 1.0),
        ("stall_of_reload", 1 / 50, 0.0),
    ):
        ratio = ratios[name]
        met[name] = None if ratio is None else least <= ratio <= most
    ours = modes.get(STREAMING)
    if ours is not None:
        slower, other = ("engine", "learner") if ours["slower_side"] == "engines" else ("learner", "engine")
        met["slower_side_busy"] = ours[f"{slower}_busy"] >= 0.95
        met["other_side_idle"] = abs(1 - ours[f"{other}_busy"] - ours["predicted_idle"]) <= 0.05
    met["accounted"] = all(_is_accounted(name, mode) for name, mode in modes.items()) if modes else None
    return met


def _is_accounted(name: str, mode: Mapping[str, Any]) -> bool:
    books = mode["books"]
    lossless = books["conserved"] is True and not books["hash_mismatches"] and mode["weights_equal"]
    return bool(lossless and (name == RELOAD or not (books["generation_pauses"] or books["aborted_requests"])))


def curve(steps: Sequence[Mapping[str, Any]], origin: float) -> list[tuple[float, float]]:
    """(seconds, reward) at the end of each step during which, or shortly before, any trajectory finished."""
    points = []
    for i in range(len(steps)):
        recent = [r for r in steps[max(0, i + 1 - SMOOTH) : i + 1] if r["finished"]]
        if finished := sum(r["finished"] for r in recent):
            mean = sum(r["reward_mean"] * r["finished"] for r in recent) / finished
            points.append((round(steps[i]["wall_s"] - origin, 3), mean))
    return points


def time_to(points: Sequence[tuple[float, float]], reward: float) -> float | None:
    """Seconds until the curve first is at `reward`, on straight lines between its points; None if it never is."""
    before: tuple[float, float] | None = None
    for seconds, value in points:
        if value >= reward:
            if before is None or value == before[1]:
                return seconds
            share = (reward - before[1]) / (value - before[1])
            return before[0] + share * (seconds - before[0])
        before = seconds, value
    return None


def _engines(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[str]:
    """Names of those that got a version, by whichever way."""
    return {f"engine {r['engine']}" for r in kinds["version"]} or {f"engine {r['server']}" for r in kinds["stock"]}


def _at(statuses: Sequence[Mapping[str, Any]], name: str, when: float) -> float:
    """A growing count at a moment, on straight lines between the statuses, which come once a second."""
    before = statuses[0]
    for status in statuses:
        if status["wall_s"] >= when:
            span = status["wall_s"] - before["wall_s"]
            share = (when - before["wall_s"]) / span if span > 0 else 1.0
            return float(_number(before, name) + share * (_number(status, name) - _number(before, name)))
        before = status
    return _number(before, name)


def _number(status: Mapping[str, Any], name: str) -> float:
    return float(status.get(name) or 0.0)


def _timeline(
    steps: Sequence[Mapping[str, Any]], statuses: Sequence[Mapping[str, Any]], origin: float, engines: int
) -> dict[str, Any]:
    """engines: (seconds, busy share, tokens a second) between two statuses; learner: (begin, end) of each step."""
    rows = []
    for a, b in itertools.pairwise(statuses):
        span = max(b["wall_s"] - a["wall_s"], 1e-9)
        busy, tokens = (_number(b, name) - _number(a, name) for name in ("engine_busy_s", "received_tokens"))
        rows.append((round(b["wall_s"] - origin, 2), round(busy / span / engines, 3), round(tokens / span, 1)))
    ends = [(r["wall_s"] - origin, r["learner.busy_seconds"]) for r in steps]
    return {"engines": rows, "learner": [(round(end - busy, 3), round(end, 3)) for end, busy in ends]}
