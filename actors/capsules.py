"""Capsules: the batch of a step that was skipped because its loss or gradient was not finite, to be tried again.

RUN/capsules/step-HISTORY-STEP/   batch.npz   every column of the batch, with group, member, version and age
                                  capsule.json   run, version, algorithm, temperature, metrics
"""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from algorithms.diagnosis import not_finite
from algorithms.losses import Loss, make_loss
from engines.megatron.checkpoint import replacing
from engines.megatron.learner import MegatronLearner
from stream_rl import config
from stream_rl.errors import ConfigError, WeightsError
from stream_rl.messages import Lease
from stream_rl.metrics import finite
from stream_rl.types import Float32Array, TrainingBatch, Version

log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d+)-(\d+)")
_BATCH = ("token_ids", "lengths", "behavior_logprobs", "advantages", "loss_weights", "reference_logprobs")
_LEASE = ("groups", "members", "rewards", "sampled", "histories", "steps", "ages")


class Engine(Protocol):
    """What a capsule needs of the training engine."""

    def logprobs(self, token_ids: Sequence[npt.NDArray[np.int32]], temperature: float, /) -> list[Float32Array]: ...

    def train_step(self, batch: TrainingBatch, loss: Loss, /) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capsule:
    run: str
    version: Version
    """The weights that the step began with, and was skipped at."""
    algorithm: config.Algorithm
    metrics: Mapping[str, float]
    batch: TrainingBatch
    columns: Mapping[str, npt.NDArray[Any]]
    """Of the lease: groups, members and rewards [S], sampled, histories, steps and ages [T]; and `learner_logprobs`
    [T], of the weights that it was skipped at."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not finite."""

    what: str
    """A column of the batch, or of the loss; "gradient of the weights" where every token's own is finite."""
    sequence: int
    """In the batch, from 0."""
    group: int
    member: int
    token: int
    """In the sequence, from 0; -1: the sequence as a whole."""
    token_id: int
    version: str
    """Of the weights that sampled the token."""


class Capsules:
    """A run's capsules, the newest `limit` of them."""

    def __init__(
        self, directory: pathlib.Path, limit: int, run: str, section: config.Algorithm, engine: Engine
    ) -> None:
        self._directory, self._limit, self._run = directory, limit, run
        self._section, self._engine = section, engine

    def keep(self, lease: Lease, batch: TrainingBatch, metrics: Mapping[str, float]) -> pathlib.Path | None:
        """Write a capsule of the step that was just skipped; None if none are kept, or the disk refuses.

        The weights must still be what the step began with.
        """
        if self._limit < 1:
            return None
        logprobs = np.concatenate(self._engine.logprobs(sequences(batch), batch.temperature))
        columns = {name: getattr(batch, name) for name in _BATCH if getattr(batch, name) is not None}
        columns |= {name: getattr(lease, name) for name in _LEASE} | {"learner_logprobs": logprobs}
        path = self._directory / f"step-{lease.step.history}-{lease.step.step}"
        told = {
            "format": FORMAT,
            "run": self._run,
            "version": list(lease.step),
            "temperature": batch.temperature,
            "algorithm": dataclasses.asdict(self._section),
            "metrics": finite(metrics),
        }
        try:
            with replacing(path) as new:
                np.savez_compressed(new / "batch.npz", **columns)
                (new / "capsule.json").write_text(json.dumps(told, indent=2))
            for old in newest_first(self._directory)[self._limit :]:
                shutil.rmtree(old)
        except (WeightsError, OSError) as error:
            log.error("the skipped step %s is not kept: %s", lease.step, error)
            return None
        log.warning("step %s was skipped; its batch is kept in %s", lease.step, path)
        return path


def newest_first(directory: pathlib.Path) -> list[pathlib.Path]:
    """The whole capsules in `directory`, by version."""
    found = [(match, path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda one: (int(one[0][1]), int(one[0][2])), reverse=True)]


def read(path: str | pathlib.Path) -> Capsule:
    """A capsule's directory.  Raises ConfigError if it is none, damaged, or of another format."""
    path = pathlib.Path(path)
    try:
        told = json.loads((path / "capsule.json").read_text())
        if told["format"] != FORMAT:
            raise ConfigError(f"{path} has format {told['format']}; this release reads {FORMAT}")
        with np.load(path / "batch.npz", allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        batch = TrainingBatch(
            **{name: columns.get(name) for name in _BATCH},  # type: ignore[arg-type]  # refused below
            temperature=float(told["temperature"]),
        )
        capsule = Capsule(
            run=told["run"],
            version=Version(*map(int, told["version"])),
            algorithm=config.build(config.Algorithm, told["algorithm"], f"{path}: algorithm"),
            metrics=told["metrics"],
            batch=batch,
            columns={name: columns[name] for name in (*_LEASE, "learner_logprobs")},
        )
        _check(capsule)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a whole capsule: {error!r}; capsule.json and batch.npz go together"
        ) from error
    return capsule


def _check(capsule: Capsule) -> None:
    num_sequences = capsule.batch.lengths.shape
    tokens = (int(capsule.batch.lengths.sum(dtype=np.int64)),)
    of_batch = {name: getattr(capsule.batch, name) for name in _BATCH if name != "lengths"}
    for name, column in (of_batch | dict(capsule.columns)).items():
        if name == "reference_logprobs" and column is None:
            continue
        wanted = num_sequences if name in ("groups", "members", "rewards") else tokens
        if column is None or column.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {None if column is None else column.shape}")


def sequences(batch: TrainingBatch) -> list[npt.NDArray[np.int32]]:
    return np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1])


def diagnose(capsule: Capsule, engine: Engine) -> list[Finding]:
    """Train on the capsule again with the engine's weights: everything that is not finite, in the batch's order.

    With other weights than it was skipped at, `recorded_logprobs` are what the learner's were then.  The engine's
    optimizer must not move the weights (`still`): sequences are tried one by one.
    """
    batch, loss = capsule.batch, make_loss(capsule.algorithm.loss, capsule.algorithm)
    logprobs = np.concatenate(engine.logprobs(sequences(batch), batch.temperature))
    recorded = capsule.columns["learner_logprobs"]
    then = np.flatnonzero((batch.loss_weights != 0.0) & ~np.isfinite(recorded) & np.isfinite(logprobs))
    found = {**not_finite(batch, logprobs, loss), "recorded_logprobs": then}
    findings = [_finding(capsule, name, int(token)) for name, tokens in found.items() for token in tokens]
    if not findings:
        ends = np.cumsum(batch.lengths)
        for sequence, end in enumerate(ends.tolist()):
            alone = _one_sequence(batch, sequence, end)
            if alone.loss_weights.any() and engine.train_step(alone, loss)["skipped"]:
                findings.append(_of_sequence(capsule, "gradient of the weights", sequence))
    return sorted(findings, key=lambda one: (one.sequence, one.token))


def try_again(path: pathlib.Path, weights: pathlib.Path) -> tuple[Capsule, list[Finding]]:
    """`read` and `diagnose` in this process, with the weights of a Hugging Face directory.

    Raises ConfigError for what is no capsule or no model, WeightsError for weights that do not fit.
    """
    capsule = read(path)
    recipe = path.resolve().parents[1] / "recipe.toml"
    section = config.load(recipe).learner if recipe.is_file() else config.Learner()
    return capsule, diagnose(capsule, MegatronLearner(weights, still(section), seed=0))


def still(section: config.Learner) -> config.Learner:
    """The same learner in one process, with an optimizer whose steps round to nothing."""
    optimizer = {**section.optimizer, "lr": 1e-30, "weight_decay": 0.0}
    model = {name: value for name, value in section.model.items() if "parallel" not in name}
    return dataclasses.replace(section, processes=1, model=model, ddp={}, optimizer=optimizer, schedule={})


def _one_sequence(batch: TrainingBatch, sequence: int, end: int) -> TrainingBatch:
    here = slice(end - int(batch.lengths[sequence]), end)
    reference = batch.reference_logprobs
    return TrainingBatch(
        token_ids=batch.token_ids[here],
        lengths=batch.lengths[sequence : sequence + 1],
        behavior_logprobs=batch.behavior_logprobs[here],
        advantages=batch.advantages[here],
        loss_weights=batch.loss_weights[here],
        temperature=batch.temperature,
        reference_logprobs=None if reference is None else reference[here],
    )


def _finding(capsule: Capsule, what: str, token: int) -> Finding:
    ends = np.cumsum(capsule.batch.lengths)
    sequence = int(np.searchsorted(ends, token, side="right"))
    columns = capsule.columns
    return dataclasses.replace(
        _of_sequence(capsule, what, sequence),
        token=token - int(ends[sequence] - capsule.batch.lengths[sequence]),
        token_id=int(capsule.batch.token_ids[token]),
        version=str(Version(int(columns["histories"][token]), int(columns["steps"][token]))),
    )


def _of_sequence(capsule: Capsule, what: str, sequence: int) -> Finding:
    group, member = (int(capsule.columns[name][sequence]) for name in ("groups", "members"))
    return Finding(what=what, sequence=sequence, group=group, member=member, token=-1, token_id=-1, version="")
