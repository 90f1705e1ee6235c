"""Checkpoints to go on from: Hugging Face directories with a training state and a record of what they are.

`training.json` is written last and holds the size and digest of every other file, so a checkpoint that was damaged
after it was written is told from a whole one.
"""

import dataclasses
import hashlib
import logging
import pathlib
import re
import shutil
from dataclasses import dataclass

import msgspec

from engines.megatron.model_shape import ModelShape
from stream_rl.errors import WeightsError
from stream_rl.types import Version

log = logging.getLogger(__name__)
FORMAT = 1
STATE = "training"
"""The directory of the training state's safetensors: beside the weights, loaders of models would take them for some."""
_RECORD = "training.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """training.json."""

    format: int
    run: str
    history: int
    step: int
    shape: str
    """Digest of the model's shape."""
    optimizer: str
    """Name of what the optimizer's states are for."""
    schedule_steps: int
    """Steps that the schedule has counted; those that were skipped are not among them."""
    files: dict[str, tuple[int, str]]
    """Bytes and sha256 of every other file, by its path from here."""
    digest: str = ""
    """Of this record, with this field empty."""

    @property
    def version(self) -> Version:
        return Version(self.history, self.step)


def directory_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"step-{step}"


def seal(
    directory: pathlib.Path, run: str, version: Version, shape: ModelShape, optimizer: str, schedule_steps: int
) -> None:
    """Write the record of a checkpoint whose other files are there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    record = Record(
        format=FORMAT,
        run=run,
        history=version.history,
        step=version.step,
        shape=_shape_digest(shape),
        optimizer=optimizer,
        schedule_steps=schedule_steps,
        files={str(path.relative_to(directory)): (path.stat().st_size, _digest(path)) for path in files},
    )
    record = dataclasses.replace(record, digest=_record_digest(record))
    (directory / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)))


def read(directory: pathlib.Path) -> Record:
    """Raises WeightsError if the directory has no record that can be read."""
    path = directory / _RECORD
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise WeightsError(f"{directory} cannot be resumed from: cannot read {path.name}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise WeightsError(f"{directory} cannot be resumed from: {path.name} is damaged: {error}") from error
    if record.format != FORMAT:
        raise WeightsError(f"{directory} cannot be resumed from: expected format {FORMAT}, got {record.format}")
    if record.digest != _record_digest(record):
        raise WeightsError(f"{directory} cannot be resumed from: {path.name} is damaged: it has another digest")
    return record


def check(directory: pathlib.Path, shape: ModelShape, optimizer: str) -> Record:
    """The record of a checkpoint that is whole, and of this model and optimizer.

    Raises WeightsError saying what is wrong with it.
    """
    record = read(directory)
    if record.shape != _shape_digest(shape):
        raise WeightsError(f"{directory} cannot be resumed from: it is of a model of another shape than {shape}")
    if record.optimizer != optimizer:
        raise WeightsError(f"{directory} cannot be resumed from: its optimizer is {record.optimizer}, ours {optimizer}")
    for name, (size, digest) in record.files.items():
        path = directory / name
        try:
            found = path.stat().st_size
            if found != size:
                raise WeightsError(f"{directory} is damaged: {name} should have {size} bytes, it has {found}")
            if _digest(path) != digest:
                raise WeightsError(f"{directory} is damaged: {name} does not have the digest it was written with")
        except OSError as error:
            raise WeightsError(f"{directory} is damaged: cannot read {name}: {error.strerror}") from error
    return record


def newest_first(parent: pathlib.Path, run: str) -> list[pathlib.Path]:
    """The run's checkpoints in `parent`, by their records alone; what has none, or another run's, is logged by name."""
    found: list[tuple[Version, pathlib.Path]] = []
    for directory in sorted(path for path in parent.glob("*") if path.is_dir() and not path.name.startswith(".")):
        try:
            record = read(directory)
        except WeightsError as error:
            log.warning("%s", error)
            continue
        if record.run == run:
            found.append((record.version, directory))
        else:
            log.warning("%s is of run %s, this is %s", directory, record.run, run)
    return [directory for _, directory in sorted(found, reverse=True)]


def retire(parent: pathlib.Path, step: int) -> None:
    """Keep the checkpoint of `step` and the one before it.

    One of a later step goes too: it was refused, or the line of training that it was of has ended.
    """
    steps = sorted(int(match[1]) for path in parent.iterdir() if (match := _STEP.fullmatch(path.name)))
    kept = {step, *[earlier for earlier in steps if earlier < step][-1:]}
    for gone in steps:
        if gone not in kept:
            shutil.rmtree(parent / directory_name(gone))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_digest(record: Record) -> str:
    return hashlib.sha256(msgspec.json.encode(dataclasses.replace(record, digest=""))).hexdigest()


def _shape_digest(shape: ModelShape) -> str:
    return hashlib.sha256(repr(dataclasses.asdict(shape)).encode()).hexdigest()
