"""What `stream-rl bench updates` found, phase by phase, and the object that it becomes.

A phase that failed leaves what the others found; what was not measured is null.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.publish import interval
from stream_rl.messages import EngineStats, EngineVerified, VersionReport
from stream_rl.metrics import Histogram, quantile

FEW, MANY = 0.01, 0.05
"""Shares of the elements that a version changes."""
BEATS_PER_SECOND = 2
STALL_MS = 3.0
THROUGHPUT = 0.97
COMMITS = 500
TARGETS = {
    "stall_few": f"p99 <= {STALL_MS} ms at {FEW:.0%}",
    "stall_many": f"p99 <= the median decode step at {MANY:.0%}",
    "throughput": f">= {THROUGHPUT} with {BEATS_PER_SECOND} versions a second, at least {0.95:.0%} of which came",
    "commits": f">= {COMMITS}",
}
INCLUDES = {
    "stall_ms": "scheduler thread's time in the commit hook, and on a GPU the time of the writes there by its own "
    "events; of the slower rank",
    "decode_step_ms": "from one decode launch to the next in windows without versions, to 4.4 %",
    "throughput_ratio": "tokens a second with versions over those with none, by the scheduler's counters: geometric "
    "mean and 95 % interval over pairs of windows that alternate in order",
    "commit_ms": "from handing a version's parts to the engine's socket until all ranks had said Live",
    "every_hash_matches": "the engine's incremental fingerprint at each commit, added over ranks, is the publisher's",
    "live_is_a_fresh_load": "the fingerprint that the engine recomputed from all live parameters is that of the last "
    "version's weights, written as a checkpoint from the original's bytes and read back; that SGLang's own load of a "
    "checkpoint has such a fingerprint is seen when it starts: with another one it would be sent an anchor",
    "every_token_has_its_version": "tokens of a request come once and in order and are those of SGLang's own answer, "
    "each under one version; none older than the one before or than what was live when the request was made, none that "
    "was not yet published, none that was never live here.  That it is the version whose weights sampled the token is "
    "shown by tests/test_gpu.py, where a version's weights can say one token only",
}


@dataclass(slots=True)
class Window:
    """Some seconds of an engine at work."""

    rate: float
    """Tokens a second."""
    seconds: float
    versions: int
    """That became live."""
    steps: Histogram
    """Decode steps by their time."""


@dataclass(slots=True)
class Measured:
    """Filled phase by phase."""

    start_seconds: float = math.nan
    seconds: float = math.nan
    pairs: list[tuple[Window, Window]] = field(default_factory=list)
    """With versions and without."""
    reports: list[tuple[str, VersionReport]] = field(default_factory=list)
    """With the phase in which they came."""
    stats: EngineStats | None = None
    """At the end."""
    verified: EngineVerified | None = None
    fresh_load: str | None = None
    """Fingerprint of the exported weights."""
    tokens: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    """Of tokens, by name."""
    errors: dict[str, str] = field(default_factory=dict)
    """By phase."""


def figures(m: Measured) -> dict[str, Any]:
    """One object; `met` says of each target and each proof whether it holds, null if that was not seen."""
    commits = [report for _, report in m.reports]
    few, many = (_costs([report for at, report in m.reports if at == phase]) for phase in ("few", "many"))
    without, beaten = Histogram(), [on for on, _ in m.pairs]
    for _, window in m.pairs:
        without.merge(window.steps.counts())
    step_ms = 1e3 * without.quantile(0.5)
    ratio = interval([math.log(on.rate / off.rate) for on, off in m.pairs]) if len(m.pairs) > 2 else None
    beats = sum(w.versions for w in beaten) / sum(w.seconds for w in beaten) if beaten else math.nan
    counters = {} if m.stats is None else m.stats.counters
    return {
        "start_seconds": m.start_seconds,
        "seconds": m.seconds,
        "commits": len(commits),
        "anchors": sum(report.anchor for report in commits),
        "parameters": commits[-1].elements if commits else None,
        "few": few,
        "many": many,
        "decode_step_ms": {"p50": step_ms, "p99": 1e3 * without.quantile(0.99), "steps": without.total},
        "throughput_ratio": ratio,
        "versions_per_second": beats,
        "tokens_per_second": {
            "with_versions": _mean([on.rate for on, _ in m.pairs]),
            "without": _mean([off.rate for _, off in m.pairs]),
            "pairs": [[on.rate, off.rate] for on, off in m.pairs],
        },
        "tokens_looked_at": m.tokens,
        "problems": m.problems,
        "engine": {name: counters.get(name) for name in ("faults", "retractions", "aborts", "commits", "pauses")},
        "fingerprints": {
            "engine": m.verified and m.verified.weights_hash,
            "publisher": m.verified and m.verified.expected,
            "fresh_load": m.fresh_load,
        },
        "met": {
            "stall_few": _seen(few["commits"], few["stall_ms"]["p99"] <= STALL_MS),
            "stall_many": _seen(many["commits"] and without.total, many["stall_ms"]["p99"] <= step_ms),
            "throughput": ratio and ratio["mean"] >= THROUGHPUT and beats >= 0.95 * BEATS_PER_SECOND,
            "commits": len(commits) >= COMMITS,
            "every_hash_matches": _seen(commits, all(report.hash_matches for report in commits)),
            "no_anchor": _seen(commits, not any(report.anchor for report in commits)),
            "ranks_switch_at_the_same_step": _seen(commits, all(len(r.forward_counts) == 1 for r in commits)),
            "every_token_has_its_version": _seen(m.tokens and m.stats, not m.problems),
            "live_is_a_fresh_load": _seen(
                m.verified and m.fresh_load,
                m.verified is not None and m.verified.weights_hash == m.verified.expected == m.fresh_load,
            ),
        },
        "errors": m.errors,
        "targets": TARGETS,
        "includes": INCLUDES,
    }


def _seen(evidence: object, holds: bool) -> bool | None:
    return holds if evidence else None


def _costs(reports: Sequence[VersionReport]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {name: quantile([1e3 * v for v in values], q) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1))}

    changed, elements = (sum(getattr(report, name) for report in reports) for name in ("changed", "elements"))
    return {
        "commits": len(reports),
        "changed_share": changed / elements if elements else math.nan,
        "bits_per_changed": 8 * sum(report.update_bytes for report in reports) / changed if changed else math.nan,
        "stall_ms": spread([report.stall_seconds for report in reports]),
        "stage_ms": spread([report.stage_seconds for report in reports]),
        "send_ms": spread([report.send_seconds for report in reports]),
        "commit_ms": spread([report.commit_seconds for report in reports]),
    }


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
