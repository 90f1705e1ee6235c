"""What the queue has seen, for progress, metrics and the summary.  Counts only: nothing here decides anything."""

import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from queues.trajectories import Trajectory
from stream_rl.messages import (
    Applied,
    EngineStats,
    EngineVerified,
    Evaluated,
    LearnerDone,
    Lease,
    StockReport,
    VersionReport,
)
from stream_rl.metrics import Histogram
from stream_rl.types import Version

_BUCKET = re.compile(r"-?[0-9]{1,4}")
MAX_NAMES = 64
"""Names that peers may make us count under; bounds memory."""


@dataclass(slots=True)
class Window:
    """Episodes that finished while one step was awaited, before any filter: each as the trajectory that it began as."""

    finished: int = 0
    rewards: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    sampled: int = 0
    """With those of their branches, as the next."""
    turns: int = 0

    @property
    def reward_mean(self) -> float:
        return self.rewards / self.finished if self.finished else math.nan


@dataclass(slots=True)
class Settled:
    """What became of one lease's tokens."""

    trained: int
    masked: dict[str, int]
    ages: Counter[int]
    """Of the trained tokens."""
    lengths: tuple[int, ...] = ()
    """[S] sampled tokens of each trajectory of a trained step."""
    too_old: tuple[int, ...] = ()
    """[S] those of them that the age bound masked."""

    @property
    def sampled(self) -> int:
        return self.trained + sum(self.masked.values())

    @property
    def age_mean(self) -> float:
        """Of the trained tokens; nan if there are none."""
        return sum(age * n for age, n in self.ages.items()) / self.trained if self.trained else math.nan


@dataclass(slots=True)
class TaskTally:
    """Groups of one task, by what became of them, and the longest that one took from its opening to its step."""

    opened: int = 0
    applied: int = 0
    dropped: int = 0
    longest_s: float = 0.0


class Tallies:
    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        """Messages and chunk rows that changed nothing, by reason."""
        self.last_refusal = ""
        self.cancelled: Counter[str] = Counter({"run_end": 0})
        """Trajectories whose generation somebody of ours stopped, by reason."""
        self.aborted = 0
        """Segments that an engine aborted and that nobody cancelled."""
        self.streamed_before_end = 0
        """Tokens that came in rows without a finish."""
        self.windows: list[Window] = [Window()]
        """One for each applied step, and one for the step being awaited."""
        self.steps = 0
        self.skipped = 0
        self.short_leases = 0
        """Leases below min_tokens, because whole groups did not fit beside each other."""
        self.trained = 0
        self.masked: Counter[str] = Counter()
        self.ages: Counter[int] = Counter()
        self.lengths: array[int] = array("I")
        """Sampled tokens of each trained trajectory, in order."""
        self.too_old: array[int] = array("I")
        """Those of them that the age bound masked."""
        self.forked_steps = 0
        """Applied steps that a restart of the learner took back; their leases were handed out again."""
        self.resumed: Counter[str] = Counter()
        """Segments that went on elsewhere, by why the one before ended."""
        self.turns = 0
        """Turns of the model: segments that ended by themselves, with tokens in them."""
        self.branches = 0
        """Trajectories that were opened beside the one that their episode began as."""
        self.appended_tokens = 0
        """Of environments, tools and users; prompts that were brought in the same way are among them."""
        self.tasks: dict[str, TaskTally] = {}
        self.learner_busy_s = 0.0
        self.learner_wall_s = 0.0
        self.engine_counters: dict[tuple[str, int], dict[str, float]] = {}
        """By (engine, incarnation): counters start anew with each incarnation."""
        self.engine_histograms: dict[tuple[str, int], dict[str, dict[str, int]]] = {}
        self.actor_counters: dict[tuple[str, int], dict[str, float]] = {}
        self.stalls_ms = array("d")
        self.versions: set[Version] = set()
        """Versions that became live in an engine."""
        self.delta_bytes = 0
        self.full_bytes = 0
        self.anchors = 0
        self.hash_mismatches = 0
        self.verified: dict[str, EngineVerified] = {}
        """The last full recomputation of each engine."""
        self.stock: dict[str, dict[str, float]] = {}
        """Of each SGLang server without our plugin: updates, pauses in seconds, problems."""
        self.evaluated: dict[str, float] = {}
        """Mean held-out reward by label."""
        self.learner_done: LearnerDone | None = None

    # -- trajectories ------------------------------------------------------------------------------------------

    def finished(self, trajectory: Trajectory) -> None:
        window = self.windows[-1]
        window.sampled += trajectory.received
        window.turns += trajectory.turns
        if trajectory.episode != trajectory.member:
            return
        window.finished += 1
        window.rewards += trajectory.reward
        for name, value in trajectory.reward_parts.items():
            name = count_name(window.parts, name)
            window.parts[name] = window.parts.get(name, 0.0) + value

    def cancel(self, trajectory: Trajectory, reason: str) -> None:
        """Its generation is being stopped by us; an abort of its request needs no other explanation."""
        if not trajectory.cancelled:
            trajectory.cancelled = True
            self.cancelled[count_name(self.cancelled, reason)] += 1

    def explain_abort(self, trajectory: Trajectory) -> None:
        """The engine said that it aborted a trajectory which was dropped already: its actor had given up on it, and
        the abort is that cancellation reaching the engine; otherwise nobody asked for it."""
        if trajectory.failed:
            self.cancel(trajectory, trajectory.reason)
        elif not trajectory.cancelled:
            self.aborted += 1

    # -- steps -------------------------------------------------------------------------------------------------

    def applied(self, event: Applied, settled: Settled) -> None:
        self.steps += 1
        self.skipped += event.outcome != "trained"
        self.trained += settled.trained
        self.masked.update(settled.masked)
        self.ages.update(settled.ages)
        self.lengths.extend(settled.lengths)
        self.too_old.extend(settled.too_old)
        self.learner_busy_s += event.metrics.get("busy_seconds", 0.0)
        self.learner_wall_s += event.metrics.get("wall_seconds", 0.0)
        self.windows.append(Window())

    def taken_back(self, settled: Settled, outcome: str) -> None:
        """The newest applied step belongs to a dead history."""
        self.steps -= 1
        self.skipped -= outcome != "trained"
        self.forked_steps += 1
        self.trained -= settled.trained
        self.masked.subtract(settled.masked)
        self.ages -= settled.ages  # keeps no age of which nothing is left
        if settled.lengths:
            del self.lengths[-len(settled.lengths) :], self.too_old[-len(settled.too_old) :]

    def task(self, name: str) -> TaskTally:
        if name not in self.tasks and len(self.tasks) >= MAX_NAMES:
            name = "other"
        return self.tasks.setdefault(name, TaskTally())

    # -- reports -----------------------------------------------------------------------------------------------

    def engine_stats(self, stats: EngineStats) -> None:
        key = (stats.engine, stats.incarnation)
        self.engine_counters[key] = stats.counters
        self.engine_histograms[key] = stats.histograms

    def engine_counter(self, name: str) -> float:
        return sum(counters.get(name, 0.0) for counters in self.engine_counters.values())

    def engine_histogram(self, name: str) -> Histogram:
        merged = Histogram()
        for histograms in self.engine_histograms.values():
            merged.merge(histograms.get(name, {}))
        return merged

    def weights_report(self, report: VersionReport | StockReport) -> None:
        if isinstance(report, StockReport):
            self._stock_report(report)
            return
        self.stalls_ms.append(1000 * report.stall_seconds)
        self.versions.add(report.version)
        self.hash_mismatches += not report.hash_matches
        if report.anchor:
            self.anchors += 1
        else:
            self.delta_bytes += report.update_bytes
            self.full_bytes += report.full_bytes

    def engine_verified(self, verified: EngineVerified) -> None:
        self.hash_mismatches += verified.weights_hash != verified.expected
        held = self.verified.get(verified.engine)
        if held is None or verified.version >= held.version:
            self.verified[verified.engine] = verified

    def _stock_report(self, report: StockReport) -> None:
        if report.server not in self.stock and len(self.stock) >= MAX_NAMES:
            return
        counts = self.stock.setdefault(report.server, {"updates": 0, "pause_s": 0.0, "problems": 0})
        counts["problems" if report.problem else "updates"] += 1
        counts["pause_s"] += report.pause_seconds

    def evaluation(self, event: Evaluated) -> None:
        self.evaluated[event.label] = float(event.rewards.mean()) if event.rewards.size else math.nan


def settle(lease: Lease, outcome: str) -> Settled:
    """What becomes of a lease's sampled tokens when its step ends in `outcome`."""
    trainable = lease.trainable != 0
    sampled, unmasked = int(np.count_nonzero(lease.sampled)), int(np.count_nonzero(trainable))
    masked = {"too_old": sampled - unmasked}
    if outcome != "trained":
        return Settled(0, masked | {"skipped": unmasked}, Counter())
    ages, counts = np.unique(lease.ages[trainable], return_counts=True)
    firsts = np.cumsum(lease.lengths, dtype=np.int64) - lease.lengths
    lengths = np.add.reduceat(lease.sampled, firsts, dtype=np.int64)
    too_old = lengths - np.add.reduceat(lease.trainable, firsts, dtype=np.int64)
    of_age = Counter(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
    return Settled(unmasked, masked, of_age, tuple(lengths.tolist()), tuple(too_old.tolist()))


def stats_problem(stats: EngineStats) -> str:
    """Why an engine's statistics cannot be summed, or ""."""
    if len(stats.counters) > MAX_NAMES or len(stats.histograms) > MAX_NAMES:
        return f"expected at most {MAX_NAMES} names, got {len(stats.counters)} and {len(stats.histograms)}"
    for name, value in stats.counters.items():
        if not math.isfinite(value):
            return f"counter {name!r} is {value}"
    for name, counts in stats.histograms.items():
        for bucket, count in counts.items():
            if bucket != "zero" and not _BUCKET.fullmatch(bucket):
                return f"histogram {name!r} has a bucket {bucket!r}"
            if count < 0:
                return f"histogram {name!r} counts {count} in bucket {bucket!r}"
    return ""


def count_name(counter: Mapping[str, float], name: str) -> str:
    """The name to count under: names come from peers, so their number and length are bounded, and dots would split
    them where names are dotted."""
    name = name[:MAX_NAMES].replace(".", "_") or "failed"
    return name if name in counter or len(counter) < MAX_NAMES else "other"
