"""`stream-rl bench updates`: wrong tokens and versions are seen, made-up versions are what they say, and a tiny run is
whole."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from engines.weights import fingerprint
from engines.weights.chain import Chain
from engines.weights.rehearsal import Rehearsal, checkpoint_hash
from scripts.bench.cli import bench
from scripts.bench.followed import Tokens
from scripts.bench.update_figures import FEW, MANY, Measured, Window, figures
from stream_rl.messages import Chunks, EngineStats, EngineVerified, VersionReport
from stream_rl.metrics import Histogram, finite
from stream_rl.types import Finish, Version

RID, OTHER = "bench/0/0/0.", "bench/0/1/0."
ONE, TWO, THREE = (Version(0, step) for step in (1, 2, 3))
PART_BYTES = 10_000

# -- tokens --------------------------------------------------------------------------------------------------


def chunk(
    rid: str, start: int, ids: list[int], *spans: tuple[Version, int], finish: Finish = Finish.NONE, sequence: int = 0
) -> Chunks:
    return Chunks(
        run="bench",
        engine="engine-0",
        incarnation=1,
        sequence=sequence,
        rids=[rid],
        finishes=[str(finish)],
        starts=np.array([start]),
        counts=np.array([len(ids)], np.int32),
        token_ids=np.array(ids, np.int32),
        logprobs=np.zeros(len(ids), np.float32),
        spans=np.array([(0, *version, count) for version, count in spans], np.int64).reshape(-1, 4),
    )


def problems(*said: Any, live: Version = ONE, newest: Version = TWO) -> dict[str, int]:
    """What is found wrong with a request's chunks, and its answer if that is a list."""
    tokens = Tokens()
    tokens.asked(RID, live)
    for each in said:
        if isinstance(each, Chunks):
            tokens.look_at(each, newest)
        else:
            tokens.answered(RID, each)
    return {name: count for name, count in tokens.problems.items() if count}


END = chunk(RID, 2, [7], (TWO, 1), finish=Finish.LENGTH)


def test_tokens_in_order_under_versions_that_grow_are_right_whichever_end_comes_first() -> None:
    first = chunk(RID, 0, [5, 6], (ONE, 1), (TWO, 1))
    assert problems(first, END, [5, 6, 7]) == {}
    assert problems(first, [5, 6, 7], END) == {}


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ([chunk(RID, 0, [5], (TWO, 1)), chunk(RID, 1, [6], (ONE, 1))], "a version older than the one before"),
        ([chunk(RID, 0, [5], (Version(0, 0), 1))], "a version older than the one before"),
        ([chunk(RID, 0, [5], (THREE, 1))], "a version that is not there yet"),
        ([chunk(RID, 0, [5, 6], (ONE, 1))], "tokens without a version"),
        ([chunk(RID, 0, [5])], "tokens without a version"),
        ([chunk(RID, 1, [5], (ONE, 1))], "tokens out of order"),
        ([chunk(RID, 0, [5], (ONE, 1)), chunk(RID, 0, [5], (ONE, 1))], "tokens out of order"),
        ([chunk(OTHER, 0, [5], (ONE, 1))], "tokens of no request"),
        ([chunk(RID, 0, [5, 6], (ONE, 2)), END, [5, 6, 8]], "a stream that is not the answer"),
        ([chunk(RID, 0, [5, 6], (ONE, 2)), [5, 6], END], "a stream that is not the answer"),
    ],
)
def test_a_wrong_token_is_named(said: list[Any], what: str) -> None:
    assert problems(*said) == {what: 1}


def test_tokens_of_a_version_that_never_was_live_are_counted() -> None:
    tokens = Tokens()
    tokens.asked(RID, ONE)
    tokens.look_at(chunk(RID, 0, [5, 6, 7], (ONE, 1), (TWO, 2)), TWO)
    assert (tokens.of_no_version([ONE, THREE]), tokens.of_no_version([ONE, TWO]), tokens.count) == (2, 0, 3)


# -- versions ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    generator = torch.Generator().manual_seed(0)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    tensors = {"a": torch.randn(300, 200, generator=generator).bfloat16(), "b": torch.randn(5000, generator=generator)}
    save_file(tensors, model / "model.safetensors")
    return model


def test_versions_change_their_share_and_end_where_the_exported_checkpoint_is(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rehearsal = Rehearsal("bench", checkpoint, PART_BYTES)
    assert rehearsal.prepare(FEW) == pytest.approx(650, rel=0.2)
    rehearsal.prepare(MANY)
    chain = Chain("bench", PART_BYTES, 3)
    chain.advance(rehearsal.anchor(Version(0, 0)))
    first = chain.hashes[Version(0, 0)]
    assert first == checkpoint_hash(checkpoint)
    # two sets of changes a share: the fifth and the sixth version undo the first and the second
    for step, share in enumerate([FEW, FEW, MANY, MANY, FEW, FEW, MANY], 1):
        base, target = Version(0, step - 1), Version(0, step)
        chain.advance(rehearsal.next(share, base, target))
        update = chain.prepared(base)
        assert update is not None and not update.anchor
        assert update.changed / 65_000 == pytest.approx(share, rel=0.2)
        rehearsal.export(tmp_path / str(step))
        assert checkpoint_hash(tmp_path / str(step)) == chain.hashes[target] != first
    chain.advance(rehearsal.next(MANY, Version(0, 7), Version(0, 8)))
    assert chain.hashes[Version(0, 8)] == first, "everything is undone"
    assert (tmp_path / "1" / "config.json").exists()


def test_a_checkpoint_with_another_bit_has_another_hash(checkpoint: pathlib.Path) -> None:
    before = checkpoint_hash(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    fingerprint.bits_of(tensors["b"])[17] ^= 1
    save_file(tensors, checkpoint / "model.safetensors")
    assert checkpoint_hash(checkpoint) != before


# -- the object ----------------------------------------------------------------------------------------------


def report(step: int, **changes: Any) -> VersionReport:
    fields: dict[str, Any] = {
        "engine": "engine-0", "version": Version(0, step), "anchor": False, "update_bytes": 1600, "full_bytes": 200_000,
        "changed": 1000, "elements": 100_000, "code": "fast", "encode_seconds": 0.0, "send_seconds": 0.1,
        "stage_seconds": 0.05, "stall_seconds": 0.002, "commit_seconds": 0.2, "weights_hash": "1", "hash_matches": True,
        "forward_counts": [step],
    }  # fmt: skip
    return VersionReport(**(fields | changes))


def window(rate: float, versions: int) -> Window:
    steps = Histogram()
    for _ in range(100):
        steps.add(0.009)
    return Window(rate, 4.0, versions, steps)


def measured() -> Measured:
    reports = [("few", report(step)) for step in range(1, 401)]
    reports += [("many", report(step, stall_seconds=0.008)) for step in range(401, 501)]
    return Measured(
        pairs=[(window(990.0 + number, 8), window(1000.0, 0)) for number in range(4)],
        reports=reports,
        stats=EngineStats(engine="engine-0", incarnation=1, version=ONE, counters={"faults": 0}, histograms={}),
        verified=EngineVerified(engine="engine-0", version=ONE, weights_hash="1", expected="1"),
        fresh_load="1",
        tokens=1000,
    )


def test_what_is_right_meets_everything() -> None:
    found = figures(measured())
    assert set(found["met"].values()) == {True}
    assert found["few"]["bits_per_changed"] == pytest.approx(12.8)
    assert found["few"]["stall_ms"] == pytest.approx({"p50": 2.0, "p99": 2.0, "max": 2.0})
    assert found["decode_step_ms"]["p50"] == pytest.approx(9.0, rel=0.05)
    assert found["versions_per_second"] == 2.0 and found["commits"] == 500


def spoil(m: Measured, what: str) -> None:
    match what:
        case "stall_few":
            m.reports[:5] = [("few", report(step, stall_seconds=0.004)) for step in range(1, 6)]
        case "stall_many":
            m.reports[-2:] = [("many", report(step, stall_seconds=0.01)) for step in (499, 500)]
        case "throughput":
            m.pairs = [(window(960.0, 8), window(1000.0, 0))] * 4
        case "commits":
            m.reports.pop()
        case "every_hash_matches":
            m.reports[7] = "warm_up", report(8, hash_matches=False)
        case "no_anchor":
            m.reports[7] = "warm_up", report(8, anchor=True)
        case "ranks_switch_at_the_same_step":
            m.reports[7] = "warm_up", report(8, forward_counts=[3, 4])
        case "every_token_has_its_version":
            m.problems["tokens out of order"] = 1
        case "live_is_a_fresh_load":
            m.fresh_load = "2"


@pytest.mark.parametrize("what", list(figures(measured())["met"]))
def test_one_thing_that_is_wrong_misses_that_alone(what: str) -> None:
    m = measured()
    spoil(m, what)
    assert [name for name, holds in figures(m)["met"].items() if not holds] == [what]


def test_versions_that_came_too_seldom_prove_no_throughput() -> None:
    m = measured()
    m.pairs = [(window(1000.0, 7), window(1000.0, 0))] * 4
    assert figures(m)["met"]["throughput"] is False


def test_what_was_not_measured_is_null_and_still_json() -> None:
    found = json.loads(json.dumps(finite(figures(Measured(errors={"start": "ProcessDied: engine-0"})))))
    assert set(found["met"].values()) == {None, False} and found["met"]["commits"] is False
    assert found["few"]["stall_ms"]["p99"] is None and found["errors"] == {"start": "ProcessDied: engine-0"}


# -- all of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--pairs", "2"), "expected 3 pairs or more"), (("--tokens", "1"), "1 request of 2 tokens or more")],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(words: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(bench, ["updates", "--tiny", *words])
    assert says in str(done.exception)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tp", ["1", "2"])
def test_a_tiny_run_is_whole(tp: str) -> None:
    words = ["--tp", tp, "--commits", "12", "--many-commits", "4", "--pairs", "3", "--window-seconds", "1"]
    done = CliRunner().invoke(bench, ["updates", "--tiny", *words, "--seconds", "300"])
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["errors"] == {} and result["problems"] == {}
    proofs = ("every_hash_matches", "no_anchor", "ranks_switch_at_the_same_step", "every_token_has_its_version",
              "live_is_a_fresh_load")  # fmt: skip
    assert [result["met"][name] for name in proofs] == [True] * len(proofs)
    assert result["few"]["commits"] == 12 and result["many"]["commits"] == 4 and result["tokens_looked_at"] > 1000
    assert result["versions_per_second"] > 0 and result["throughput_ratio"]["pairs"] == 3
