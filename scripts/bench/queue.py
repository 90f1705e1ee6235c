"""`stream-rl bench queue`: the real queue process, its journal on disk, and somebody to fill it.

    rounds    groups are opened, streamed as fast as the queue takes them, and closed, until all of it is durable.
              Then a learner takes everything, and the baselines run, both beside the clock.
    schedule  100,000 tokens a second, whether or not the queue keeps up, and a learner that waits for each group.
    cost      what the queue process does with a chunk, done here, by part.

One engine's traffic, one queue process, one run.
"""

import asyncio
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil

from scripts.bench import baselines, cost
from scripts.bench.running import RunningQueue, Usage, running_queue
from scripts.bench.traffic import (
    CHUNK_TOKENS,
    GROUP_TOKENS,
    MEMBERS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Interval,
    Traffic,
    num_rows,
)
from stream_rl import config
from stream_rl.errors import ConfigError, StreamRLError
from stream_rl.metrics import finite, quantile
from stream_rl.types import Version

T = TypeVar("T")
ROUNDS = 6
LEASE_GROUPS = 8
"""Of one step when a round is drained."""
MOST_LEASED = 64
"""Groups in one step on schedule: all that are ready, so that none waits for the learner to take those before it."""
PACE = 100_000
"""Tokens a second of the schedule."""
MOST_ON_SCHEDULE = 3_000_000
"""Tokens: half a minute, 700 groups."""
MOST_FOR_COST = 1_000_000
"""Tokens."""
BASELINE_SECONDS = 2.0
"""At most; and no longer than a round takes at the target rate."""
TARGETS = {"tokens_per_s": (1e6, ">="), "ingest_p99_ms": (30.0, "<="), "bytes_per_token": (40.0, "<=")}
INCLUDES = {
    "tokens_per_s": "from the first OpenGroup sent until the last chunk and close is acknowledged, which is after its "
    "fsync: opening, streaming and closing whole groups; the sender's own work overlaps; no leases",
    "tokens_per_s_with_learner": "the same, plus the time in which a learner then leases, applies and commits it all",
    "cpu_us_per_chunk": "unpack, core, journal: CPU time of one thread that makes the process's calls for chunk "
    "messages over the same frames; whole_process: all CPU of the queue process in the rounds, over their chunks: "
    "also its sockets, event loop, acknowledgements, groups that open and close",
    "ingest_p99_ms": "from sending the last chunk of a group's last member, closed before, until the lease that holds "
    "the group has arrived at a learner that waits for it; open loop at a fixed schedule",
    "bytes_per_token": "growth of the private memory of the queue process (USS) over the first round, when all of its "
    "tokens are ready and none is leased; with everything that the process holds for them, the page cache of SQLite "
    "(2 MB) among it; not the operating system's cache of the journal's files",
    "journal_bytes_per_token": "growth of the journal's files over the same round",
    "written_bytes_per_token": "what the queue process wrote to the disk: the log, and its copy in the database",
    "baselines": "tokens a second received by one process from another that sends the same frames round and round; "
    "nothing is kept, checked, understood or answered; queue_over_baseline: mean and 95 % interval over the rounds",
}
_T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    tokens: int
    """Of all rounds together, about."""
    requests: int
    """That run at once: rows of a chunk message."""
    fsync: bool = True

    def __post_init__(self) -> None:
        least = ROUNDS * LEASE_GROUPS * GROUP_TOKENS
        if self.requests < MEMBERS or self.requests % MEMBERS:
            raise ConfigError(f"requests must be a multiple of {MEMBERS}, the members of a group, got {self.requests}")
        if self.tokens < least:
            raise ConfigError(f"tokens must be at least {least}, {ROUNDS} rounds of a lease each, got {self.tokens}")

    @property
    def round_groups(self) -> int:
        return self.tokens // (ROUNDS * LEASE_GROUPS * GROUP_TOKENS) * LEASE_GROUPS

    @property
    def round_tokens(self) -> int:
        return self.round_groups * GROUP_TOKENS

    @property
    def schedule_groups(self) -> int:
        return min(self.tokens, MOST_ON_SCHEDULE) // GROUP_TOKENS

    @property
    def message_seconds(self) -> float:
        """Between two messages on schedule."""
        return self.requests * CHUNK_TOKENS / PACE

    def recipe(self, directory: pathlib.Path, name: str, groups: int, least: int, most: int) -> config.Recipe:
        """Of a queue that admits `groups` groups at once and leases `least` to `most` of them in each step."""
        return config.Recipe(
            run=config.Run(name=name, steps=1, directory=str(directory)),
            model=config.Model(path="none"),
            task=config.TaskChoice(use="none:None"),
            rollout=config.Rollout(group_size=MEMBERS, max_new_tokens=RESPONSE_TOKENS),
            queue=config.Queue(
                min_tokens=least * GROUP_TOKENS,
                max_tokens=most * (GROUP_TOKENS + MEMBERS * PROMPT_TOKENS),
                first_groups=least,
                in_flight="fixed",
                over_provision=groups / least,
                max_token_age=-1,
                fsync=self.fsync,
            ),
        )


@dataclass(slots=True)
class Round:
    tokens: int
    chunks: int
    messages: int
    seconds: float
    usage: Usage
    """Of the queue process, meanwhile."""
    drain_seconds: float
    others_cpu_seconds: float
    """Of processes that have nothing to do with it, meanwhile: they take from what is measured."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Tokens a second by kind."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything as one JSON object; `say` hears how it goes."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stream_rl_bench_") as name:
        directory = pathlib.Path(name)
        setting = _setting(plan, directory)
        say(f"{ROUNDS} rounds of {plan.round_tokens:,} tokens, {plan.requests} rows a message, on {setting['disk']}")
        rounds, books = _run(_rounds(plan, directory, say))
        say(f"{plan.schedule_groups} groups at {PACE:,} tokens/s")
        schedule, schedule_books = _run(_schedule(plan, directory))
        say("the cost of a chunk, by part")
        figures, limits = _figures(plan, directory, rounds, schedule, books["queue"]["commit_ms_p50"])
    result = figures | {
        "baselines": {kind: _compare(kind, rounds) for kind in baselines.KINDS},
        "limits": limits,
        "schedule": schedule,
        "rounds": [{"tokens": r.tokens, "seconds": r.seconds, "cpu_seconds": r.usage.cpu_seconds} for r in rounds],
        "conserved": books["conserved"] and schedule_books["conserved"],
        "refused": books.get("refused", {}) | schedule_books.get("refused", {}),
        "trajectories": books["queue"]["trajectories"],
        "setting": setting,
        "includes": INCLUDES,
        "wall_s": time.perf_counter() - began,
    }
    answer: dict[str, Any] = finite(result)
    return answer


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Its first failure as it is, not as a group."""
    try:
        return asyncio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


# -- rounds --------------------------------------------------------------------------------------------------------


async def _rounds(
    plan: Plan, directory: pathlib.Path, say: Callable[[str], None]
) -> tuple[list[Round], dict[str, Any]]:
    """The rounds, and the queue's books after them."""
    traffic = Traffic(plan.requests)
    kinds = [kind for kind in baselines.KINDS if not baselines.missing(kind)]
    rounds: list[Round] = []
    async with running_queue(plan.recipe(directory, "rounds", plan.round_groups, LEASE_GROUPS, LEASE_GROUPS)) as queue:
        await _round(queue, traffic.round(LEASE_GROUPS, queue.peers.version))  # so that every path has run once
        for number in range(ROUNDS):
            intervals = traffic.round(plan.round_groups, queue.peers.version)
            taken = await _round(queue, intervals)
            recorded = baselines.Recorded.write(intervals, directory / "frames")
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                seconds = min(BASELINE_SECONDS, plan.round_tokens / TARGETS["tokens_per_s"][0])
                taken.baselines[kind] = await baselines.run(kind, recorded, seconds)
            rounds.append(taken)
            beside = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in taken.baselines.items())
            say(f"round {number + 1}: {taken.tokens_per_s:,.0f} tokens/s; {beside}")
        return rounds, await queue.peers.status()


async def _round(queue: RunningQueue, intervals: Sequence[Interval]) -> Round:
    chunks = num_rows(intervals)
    tokens = CHUNK_TOKENS * chunks
    busy, before, began = _others_busy(), queue.usage(), time.perf_counter()
    await queue.peers.flood(intervals)
    seconds, usage, busy = time.perf_counter() - began, queue.usage() - before, _others_busy() - busy
    drained = time.perf_counter()
    leased = await queue.peers.learn(tokens // RESPONSE_TOKENS)
    if leased != tokens:
        raise StreamRLError(f"{tokens} tokens were sent and acknowledged, and {leased} leased")
    drain_seconds, others = time.perf_counter() - drained, busy - usage.cpu_seconds
    return Round(tokens, chunks, len(intervals), seconds, usage, drain_seconds, others)


def _others_busy() -> float:
    """CPU seconds of all processes but this one."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice) - time.process_time()


# -- schedule ------------------------------------------------------------------------------------------------------


async def _schedule(plan: Plan, directory: pathlib.Path) -> tuple[dict[str, float], dict[str, Any]]:
    """How long groups took, and the queue's books afterwards."""
    intervals = Traffic(plan.requests).round(plan.schedule_groups, Version(0, 0))
    sent: dict[int, float] = {}
    leased: dict[int, float] = {}
    async with running_queue(plan.recipe(directory, "schedule", plan.schedule_groups, 1, MOST_LEASED)) as queue:
        busy, before, began = _others_busy(), queue.usage(), time.perf_counter()
        async with asyncio.TaskGroup() as both:
            learning = both.create_task(queue.peers.learn(MEMBERS * plan.schedule_groups, leased))
            sending = both.create_task(queue.peers.stream(intervals, plan.message_seconds, sent))
        usage, busy, seconds = queue.usage() - before, _others_busy() - busy, time.perf_counter() - began
        books = await queue.peers.status()
    if learning.result() != GROUP_TOKENS * plan.schedule_groups:
        raise StreamRLError(f"{GROUP_TOKENS * plan.schedule_groups} tokens were sent, and {learning.result()} leased")
    delays, late = [1000 * (leased[group] - sent[group]) for group in sent], [1000 * s for s in sending.result()]
    return {
        "tokens_per_s": PACE,
        "groups": len(delays),
        "message_every_ms": 1000 * plan.message_seconds,
        "p50_ms": quantile(delays, 0.5),
        "p99_ms": quantile(delays, 0.99),
        "max_ms": max(delays),
        "sender_late_p99_ms": quantile(late, 0.99),
        "commit_ms_p50": books["queue"]["commit_ms_p50"],
        "commit_ms_p99": books["queue"]["commit_ms_p99"],
        "queue_cores": usage.cpu_seconds / seconds,
        "others_cores": max(0.0, (busy - usage.cpu_seconds) / seconds),
    }, books


# -- figures -------------------------------------------------------------------------------------------------------


def _figures(
    plan: Plan, directory: pathlib.Path, rounds: Sequence[Round], schedule: dict[str, float], commit_ms: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures, and what stops those that miss their target."""
    tokens, chunks = sum(r.tokens for r in rounds), sum(r.chunks for r in rounds)
    seconds, cpu = sum(r.seconds for r in rounds), sum(r.usage.cpu_seconds for r in rounds)
    messages_per_s = sum(r.messages for r in rounds) / seconds
    commit_every = max(1, round(messages_per_s * commit_ms / 1000))
    recipe = plan.recipe(directory, "cost", plan.round_groups, LEASE_GROUPS, LEASE_GROUPS)
    some = Traffic(plan.requests).round(min(plan.round_groups, MOST_FOR_COST // GROUP_TOKENS), Version(0, 0))
    figures: dict[str, Any] = {
        "tokens_per_s": tokens / seconds,
        "chunks_per_s": chunks / seconds,
        "tokens_per_s_interval": _interval([r.tokens_per_s for r in rounds]),
        "tokens_per_s_with_learner": tokens / (seconds + sum(r.drain_seconds for r in rounds)),
        "cpu_us_per_chunk": cost.measure(recipe, some, directory, commit_every) | {"whole_process": 1e6 * cpu / chunks},
        "cpu_cores": {"queue": cpu / seconds, "others": max(0.0, sum(r.others_cpu_seconds for r in rounds) / seconds)},
        "ingest_p50_ms": schedule["p50_ms"],
        "ingest_p99_ms": schedule["p99_ms"],
        "bytes_per_token": rounds[0].usage.memory_bytes / rounds[0].tokens,
        "journal_bytes_per_token": rounds[0].usage.journal_bytes / rounds[0].tokens,
        "written_bytes_per_token": sum(r.usage.written_bytes for r in rounds) / tokens,
    }
    limits = {}
    for name, (bound, side) in TARGETS.items():
        if not (figures[name] >= bound if side == ">=" else figures[name] <= bound):
            limits[name] = f"{figures[name]:,.4g}, and {side} {bound:,.4g} is asked for"
    if limits:
        limits["cores"] = (
            f"of {os.cpu_count()}: in the rounds {figures['cpu_cores']['queue']:.2f} went to the queue and "
            f"{figures['cpu_cores']['others']:.2f} to strangers, on schedule {schedule['queue_cores']:.2f} and "
            f"{schedule['others_cores']:.2f}"
        )
        limits["commits"] = f"on schedule {schedule['commit_ms_p50']:.1f} ms, p99 {schedule['commit_ms_p99']:.1f} ms"
        limits["profile"] = ", ".join(cost.profile(recipe, some, directory, commit_every))
    return figures, limits


def _compare(kind: str, rounds: Sequence[Round]) -> dict[str, Any] | str:
    if why := baselines.missing(kind):
        return why
    return {
        "tokens_per_s": statistics.fmean(r.baselines[kind] for r in rounds),
        "queue_over_baseline": _interval([r.tokens_per_s / r.baselines[kind] for r in rounds]),
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval."""
    mean, half = statistics.fmean(values), _T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _setting(plan: Plan, directory: pathlib.Path) -> dict[str, Any]:
    mounts = [p for p in psutil.disk_partitions(all=True) if directory.resolve().is_relative_to(p.mountpoint)]
    disk = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return {
        "command": f"stream-rl bench queue --tokens {plan.tokens} --requests {plan.requests}",
        "date": time.strftime("%F"),
        "rows_per_message": plan.requests,
        "chunk_tokens": CHUNK_TOKENS,
        "trajectory_tokens": RESPONSE_TOKENS,
        "group_members": MEMBERS,
        "round_tokens": plan.round_tokens,
        "unacknowledged_bytes_at_most": config.Engine().buffer_bytes,
        "fsync": plan.fsync,
        "disk": f"{disk.device} ({disk.fstype})" if disk else "unknown",
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
    }
