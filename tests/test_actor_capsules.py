"""A skipped step is kept whole and found again; the diagnosis names the token; what is damaged is refused."""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from learner_peers import make_lease

from actors import capsules
from actors.batches import Views, training_batch
from actors.capsules import Capsules, diagnose, newest_first, read
from stream_rl import messages as m
from stream_rl.config import Algorithm, Learner
from stream_rl.errors import ConfigError
from stream_rl.types import Float32Array, TrainingBatch, Version

ALGORITHM = Algorithm(kl_coefficient=0.1, masks={"veto": (1e-4, math.inf)}, importance_cap=math.inf)
METRICS = {"skipped": 1.0, "gradient_norm": math.nan}


class FakeEngine:
    """Log-probs of -1 / (id + 1); `bad` sequences, by their first token, have a gradient that is not finite."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad, self.logprob = set(bad), -1.0

    def logprobs(self, token_ids: Any, temperature: float) -> list[Float32Array]:
        return [(self.logprob / (ids + 1)).astype(np.float32) for ids in token_ids]

    def train_step(self, batch: TrainingBatch, loss: Any) -> dict[str, float]:
        assert len(batch.lengths) == 1
        return {"skipped": float(int(batch.token_ids[0]) in self.bad)}


STEP = Version(2, 7)


def lease_of(step: Version = STEP, **changes: Any) -> m.Lease:
    return make_lease(step, **changes)


def kept(directory: pathlib.Path, lease: m.Lease, engine: FakeEngine, **changes: Any) -> pathlib.Path:
    views = Views(reference_logprobs=np.full(len(lease.token_ids), -1.5, np.float32))
    batch = dataclasses.replace(training_batch(lease, ALGORITHM, 0.7, views), **changes)
    path = Capsules(directory, 3, "run-1", ALGORITHM, engine).keep(lease, batch, METRICS)
    assert path is not None
    return path


def test_what_is_kept_is_read_back_whole(tmp_path: pathlib.Path) -> None:
    lease, engine = lease_of(), FakeEngine()
    path = kept(tmp_path / "capsules", lease, engine)
    assert path == tmp_path / "capsules" / "step-2-7"
    capsule = read(path)
    assert (capsule.run, capsule.version, capsule.algorithm) == ("run-1", (2, 7), ALGORITHM)
    assert capsule.metrics == {"skipped": 1.0, "gradient_norm": None}
    views = Views(reference_logprobs=np.full(len(lease.token_ids), -1.5, np.float32))
    wanted = training_batch(lease, ALGORITHM, 0.7, views)
    for field in dataclasses.fields(TrainingBatch):
        np.testing.assert_array_equal(getattr(capsule.batch, field.name), getattr(wanted, field.name))
    for name in ("groups", "members", "rewards", "sampled", "histories", "steps", "ages"):
        np.testing.assert_array_equal(capsule.columns[name], getattr(lease, name))
    np.testing.assert_array_equal(
        capsule.columns["learner_logprobs"], np.concatenate(engine.logprobs(capsules.sequences(wanted), 0.7))
    )


def test_only_the_newest_are_kept_and_none_if_none_are_wanted(tmp_path: pathlib.Path) -> None:
    for version in (Version(0, 10), Version(1, 2), Version(0, 9), Version(1, 3), Version(0, 11)):
        kept(tmp_path, lease_of(version), FakeEngine())
    assert [path.name for path in newest_first(tmp_path)] == ["step-1-3", "step-1-2", "step-0-11"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0-11", "step-1-2", "step-1-3"]
    lease = lease_of()
    batch = training_batch(lease, Algorithm(), 1.0)
    assert Capsules(tmp_path / "none", 0, "r", Algorithm(), FakeEngine()).keep(lease, batch, {}) is None
    assert not (tmp_path / "none").exists()


def test_a_disk_that_refuses_costs_the_capsule_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    lease = lease_of()
    batch = training_batch(lease, Algorithm(), 1.0)
    assert Capsules(tmp_path / "file", 2, "r", Algorithm(), FakeEngine()).keep(lease, batch, {}) is None


@pytest.mark.parametrize("column", ["behavior_logprobs", "advantages", "reference_logprobs"])
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_the_token_is_named_with_its_sequence_and_version(tmp_path: pathlib.Path, column: str, poison: float) -> None:
    lease, engine = lease_of(), FakeEngine()
    whole = read(kept(tmp_path / "a", lease, engine))
    assert diagnose(whole, engine) == []
    second = int(lease.lengths[0]) + 4
    values = getattr(whole.batch, column).copy()
    values[second] = poison
    values[0] = math.nan  # a prompt's: of no weight
    findings = diagnose(read(kept(tmp_path / "b", lease, engine, **{column: values})), engine)
    assert {one.what for one in findings} >= {column}
    assert all(one.sequence == 1 for one in findings)
    named = [one for one in findings if one.what == column]
    assert [dataclasses.asdict(one) for one in named] == [
        {"what": column, "sequence": 1, "group": int(lease.groups[1]), "member": 1, "token": 4,
         "token_id": int(lease.token_ids[second]), "version": "2.7"}
    ]  # fmt: skip


def test_log_probs_of_the_learner_are_looked_at_with_the_weights_that_are_given(tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    capsule = read(kept(tmp_path, lease_of(), engine))
    engine.logprob = math.nan
    findings = diagnose(capsule, engine)
    trained = int(np.count_nonzero(capsule.batch.loss_weights))
    assert len([one for one in findings if one.what == "learner_logprobs"]) == trained
    assert not [one for one in findings if one.what == "recorded_logprobs"]
    then = kept(tmp_path / "then", lease_of(), engine)
    engine.logprob = -1.0
    assert [one.what for one in diagnose(read(then), engine)] == ["recorded_logprobs"] * trained


def test_a_gradient_that_is_not_finite_inside_the_model_is_found_by_sequence(tmp_path: pathlib.Path) -> None:
    lease = lease_of()
    starts = np.cumsum(lease.lengths) - lease.lengths
    tokens = lease.token_ids.copy()
    tokens[starts] = [1, 2, 3, 4]
    engine = FakeEngine(bad=[3])
    [finding] = diagnose(read(kept(tmp_path, lease_of(token_ids=tokens), engine)), engine)
    assert (finding.what, finding.sequence, finding.token) == ("gradient of the weights", 2, -1)
    assert (finding.group, finding.member) == (int(lease.groups[2]), 0)


def test_a_learner_that_stands_still_keeps_its_other_settings() -> None:
    section = Learner(
        threads=3, optimizer={"lr": 1.0, "clip_grad": 0.5}, schedule={"lr_warmup_steps": 9}, processes=4,
        model={"tensor_model_parallel_size": 2, "recompute_granularity": "selective"},
        ddp={"overlap_grad_reduce": True},
    )  # fmt: skip
    still = capsules.still(section)
    assert (still.processes, still.model, still.ddp) == (1, {"recompute_granularity": "selective"}, {})
    assert (still.threads, still.optimizer["clip_grad"], still.schedule) == (3, 0.5, {})
    assert still.optimizer["lr"] < 1e-20 and still.optimizer["weight_decay"] == 0.0


def damaged(path: pathlib.Path, how: str) -> None:
    told = json.loads((path / "capsule.json").read_text())
    batch = path / "batch.npz"
    columns = dict(np.load(batch))
    match how:
        case "no directory":
            shutil.rmtree(path)
        case "no batch":
            batch.unlink()
        case "torn batch":
            batch.write_bytes(batch.read_bytes()[:-40])
        case "torn json":
            (path / "capsule.json").write_text("{")
        case "a list":
            (path / "capsule.json").write_text("[]")
        case "another format":
            (path / "capsule.json").write_text(json.dumps(told | {"format": 99}))
        case "an unknown loss":
            told["algorithm"]["loss"] = "dpo"
            (path / "capsule.json").write_text(json.dumps(told))
        case "a column too few":
            np.savez(batch, **{name: column for name, column in columns.items() if name != "ages"})
        case "no advantages":
            np.savez(batch, **{name: column for name, column in columns.items() if name != "advantages"})
        case "a short column":
            np.savez(batch, **(columns | {"steps": columns["steps"][1:]}))
        case "objects":
            np.savez(batch, **(columns | {"ages": np.array([object()])}))


@pytest.mark.parametrize(
    "how",
    ["no directory", "no batch", "torn batch", "torn json", "a list", "another format", "an unknown loss",
     "a column too few", "no advantages", "a short column", "objects"],
)  # fmt: skip
def test_what_is_damaged_is_refused(tmp_path: pathlib.Path, how: str) -> None:
    path = kept(tmp_path, lease_of(), FakeEngine())
    damaged(path, how)
    with pytest.raises(ConfigError, match="step-2-7"):
        read(path)
