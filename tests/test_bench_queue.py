"""`stream-rl bench queue`: its traffic is what it says, a tiny run is whole, and what goes wrong ends it by name."""

import asyncio
import json
import os
import pathlib
import signal

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from scripts.bench import baselines
from scripts.bench.cli import bench
from scripts.bench.cost import PARTS
from scripts.bench.queue import INCLUDES, LEASE_GROUPS, ROUNDS, TARGETS, Plan, measure
from scripts.bench.traffic import CHUNK_TOKENS, CHUNKS, GROUP_TOKENS, MEMBERS, Traffic, num_rows
from stream_rl.errors import ConfigError, StreamRLError
from stream_rl.types import Version, parse_rid

LEAST = ROUNDS * LEASE_GROUPS * GROUP_TOKENS


# -- traffic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "groups"), [(8, 5), (64, 32), (64, 3), (256, 40)])
def test_every_trajectory_of_a_round_is_streamed_whole_and_in_order(requests: int, groups: int) -> None:
    traffic = Traffic(requests)
    for first in (0, groups):
        intervals = traffic.round(groups, Version(0, 3))
        following: dict[str, int] = {}
        ended = set()
        for interval in intervals:
            chunks = interval.chunks
            assert len(set(chunks.rids)) == len(chunks.rids) <= requests
            assert (chunks.counts == CHUNK_TOKENS).all() and len(chunks.token_ids) == CHUNK_TOKENS * len(chunks.rids)
            assert (chunks.spans == [[i, 0, 3, CHUNK_TOKENS] for i in range(len(chunks.rids))]).all()
            for rid, start, finish in zip(chunks.rids, chunks.starts.tolist(), chunks.finishes, strict=True):
                group = parse_rid(rid)[1]
                assert start == following.get(rid, 0)
                assert (start == 0) == (group in interval.starting)
                following[rid] = start + CHUNK_TOKENS
                assert bool(finish) == (following[rid] == CHUNKS * CHUNK_TOKENS) == (group in interval.ending)
                ended |= {rid} if finish else set()
        assert len(ended) == len(following) == MEMBERS * groups
        assert {parse_rid(rid)[1] for rid in ended} == set(range(first, first + groups))
        assert num_rows(intervals) == MEMBERS * groups * CHUNKS


def test_messages_are_numbered_over_rounds_and_full_while_enough_groups_are_left() -> None:
    traffic = Traffic(64)
    messages = [i.chunks for _ in range(2) for i in traffic.round(32, Version(0, 0))]
    assert [chunks.sequence for chunks in messages] == list(range(len(messages)))
    rows = np.array([len(chunks.rids) for chunks in messages[: len(messages) // 2]])
    assert (rows[CHUNKS:-CHUNKS] == 64).all() and np.median(rows) == 64


# -- a tiny run ----------------------------------------------------------------------------------------------


def test_a_tiny_run_prints_one_object_last_and_nothing_is_lost(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    done = CliRunner().invoke(bench, ["queue", "--tokens", str(LEAST), "--requests", "64", "--json", str(path)])
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert json.loads(done.output[done.output.index("\n{") :]) == result

    assert result["conserved"] is True
    assert result["refused"].keys() <= {"message_again"}  # a sender on a busy machine may repeat itself
    committed = {"committed": MEMBERS * LEASE_GROUPS * (ROUNDS + 1)}
    assert {state: count for state, count in result["trajectories"].items() if count} == committed
    assert [r["tokens"] for r in result["rounds"]] == [LEASE_GROUPS * GROUP_TOKENS] * ROUNDS
    for name in ("tokens_per_s", "tokens_per_s_with_learner", "chunks_per_s", "ingest_p50_ms", "ingest_p99_ms"):
        assert result[name] > 0, name
    assert result["chunks_per_s"] == pytest.approx(result["tokens_per_s"] / CHUNK_TOKENS)
    assert result["ingest_p50_ms"] <= result["ingest_p99_ms"] <= result["schedule"]["max_ms"]
    assert result["schedule"]["groups"] == LEAST // GROUP_TOKENS
    assert result["journal_bytes_per_token"] > 8  # the tokens and their log-probs, at least
    assert "bytes_per_token" in result  # of so few tokens the allocator's pages say little
    cost = result["cpu_us_per_chunk"]
    assert cost.keys() == {*PARTS, "whole_process"} and min(cost.values()) > 0
    assert result["baselines"].keys() == set(baselines.KINDS)
    for kind, baseline in result["baselines"].items():
        if why := baselines.missing(kind):
            assert baseline == why
        else:
            ratio = baseline["queue_over_baseline"]
            assert ratio["low"] <= ratio["mean"] <= ratio["high"] and baseline["tokens_per_s"] > 0
    # On so few tokens a target may well be missed; what stops it must then be said.
    missed = {name for name, (bound, side) in TARGETS.items() if (result[name] < bound) == (side == ">=")}
    assert missed <= result["limits"].keys()
    assert ("profile" in result["limits"]) == bool(missed)
    assert INCLUDES.keys() <= result.keys() and result["setting"]["fsync"] is True


@pytest.mark.parametrize("kind", baselines.KINDS)
def test_a_baseline_without_time_has_a_rate_all_the_same(kind: str, tmp_path: pathlib.Path) -> None:
    """As one that the machine leaves no time between its window's begin and end."""
    if why := baselines.missing(kind):
        pytest.skip(why)
    recorded = baselines.Recorded.write(Traffic(64).round(32, Version(0, 0)), tmp_path / "frames")
    assert asyncio.run(baselines.run(kind, recorded, 0.0)) > 0


# -- what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "requests", "says"),
    [(LEAST - 1, 64, "tokens must be at least"), (LEAST, 60, "multiple of 8"), (LEAST, 0, "multiple of 8")],
)
def test_a_run_that_cannot_be_made_is_refused(tokens: int, requests: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Plan(tokens=tokens, requests=requests)


@pytest.mark.parametrize("seen_first", [False, True])
def test_a_queue_that_dies_ends_the_run_by_name(seen_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: it is killed at the first word, and nobody else would ever say so."""
    plan = Plan(tokens=LEAST, requests=64)

    def kill(line: str) -> None:
        if line.startswith("round 1"):
            for pid in _queues():
                os.kill(pid, signal.SIGKILL)
            if seen_first:
                monkeypatch.setattr("scripts.bench.running.RunningQueue.usage", gone)

    def gone(_: object) -> None:
        raise psutil.NoSuchProcess(0)

    with pytest.raises(StreamRLError, match="queue ended with status -9"):
        measure(plan, kill)


def _queues() -> list[int]:
    """Queue processes that this one has started."""
    mine = psutil.Process().children()
    return [p.pid for p in mine if {"queues.process", "bench"} <= set(p.cmdline())]
