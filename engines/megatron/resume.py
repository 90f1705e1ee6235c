"""Checkpoints to go on from: Hugging Face directories with training states and a record of what they are.

`training.json` is written last and holds the size and digest of every other file, so a checkpoint that was damaged
after it was written is told from a whole one.
"""

import dataclasses
import hashlib
import logging
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from engines.megatron.checkpoint import replacing
from engines.megatron.model_shape import ModelShape
from stream_rl.errors import WeightsError
from stream_rl.types import Version

log = logging.getLogger(__name__)
FORMAT = 2
STATE = "training"
"""The directory of a training state's safetensors: beside the weights, loaders of models would take them for some."""
POLICY = "policy"
"""The network whose Hugging Face files are the checkpoint's own; any other has a directory of its name in it."""
_RECORD = "training.json"
_STEP = re.compile(r"step-(\d+)")


Files = dict[str, tuple[int, str]]
"""Bytes and sha256 of files, by their paths from the checkpoint's directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRecord:
    """What the training state of a network fits."""

    shape: str
    """Family and digest of the model's shape."""
    optimizer: str
    """Name of what the optimizer's states are for."""
    schedule_unit: str
    """What the schedule counts."""
    schedule_steps: int
    """How many it has counted; steps that were skipped are not among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """training.json."""

    format: int = FORMAT
    run: str
    history: int
    step: int
    placement: str
    """How the model was cut over the ranks: the random states are for the same only."""
    networks: dict[str, NetworkRecord]
    files: Files
    """Every other file."""
    digest: str = ""
    """Of this record, with this field empty."""

    @property
    def version(self) -> Version:
        return Version(self.history, self.step)


def directory_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"step-{step}"


def home(directory: pathlib.Path, network: str) -> pathlib.Path:
    """Where a network's files lie in a checkpoint."""
    return directory if network == POLICY else directory / network


def digests(directory: pathlib.Path, paths: Iterable[pathlib.Path]) -> Files:
    """Of files in `directory`."""
    return {str(path.relative_to(directory)): (path.stat().st_size, _digest(path)) for path in sorted(paths)}


def seal(directory: pathlib.Path, record: Record) -> None:
    """Write the record of a checkpoint whose other files are there."""
    record = dataclasses.replace(record, digest=_record_digest(record))
    (directory / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)))


def read(directory: pathlib.Path) -> Record:
    """Raises WeightsError if the directory has no record that can be read."""
    path = directory / _RECORD
    try:
        content = path.read_bytes()
        # before the rest of it, which another format may not have
        found = msgspec.json.decode(content, type=_Format).format
        if found != FORMAT:
            raise WeightsError(
                f"{directory} cannot be resumed from: expected format {FORMAT}, got {found}; go on with the release "
                f"that wrote it, or begin a run with the directory as model.path"
            )
        record = msgspec.json.decode(content, type=Record)
    except OSError as error:
        raise WeightsError(f"{directory} cannot be resumed from: cannot read {path.name}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise WeightsError(f"{directory} cannot be resumed from: {path.name} is damaged: {error}") from error
    if record.digest != _record_digest(record):
        raise WeightsError(f"{directory} cannot be resumed from: {path.name} is damaged: it has another digest")
    return record


def check(directory: pathlib.Path, networks: Mapping[str, NetworkRecord], part: int = 0, of: int = 1) -> Record:
    """The record of a checkpoint that is whole, and of what these networks are, however many steps they have taken.

    part, of: look at every `of`th file only, from this on; other ranks look at the others.
    Raises WeightsError saying what is wrong with it.
    """
    record = read(directory)
    if record.networks.keys() != networks.keys():
        raise WeightsError(
            f"{directory} cannot be resumed from: expected {sorted(networks)} in it, got {sorted(record.networks)}"
        )
    for name, ours in networks.items():
        theirs = record.networks[name]
        for what, its, wanted in (
            ("shape", theirs.shape, ours.shape),
            ("optimizer", theirs.optimizer, ours.optimizer),
            ("schedule_unit", theirs.schedule_unit, ours.schedule_unit),
        ):
            if its != wanted:
                raise WeightsError(
                    f"{directory} cannot be resumed from: the {name}'s {what} is {its} in it, and {wanted} here"
                )
    _check_files(directory, dict(sorted(record.files.items())[part::of]))
    return record


def _check_files(directory: pathlib.Path, files: Files) -> None:
    for name, (size, digest) in files.items():
        path = directory / name
        try:
            found = path.stat().st_size
            if found != size:
                raise WeightsError(f"{directory} is damaged: {name} should have {size} bytes, it has {found}")
            if _digest(path) != digest:
                raise WeightsError(f"{directory} is damaged: {name} does not have the digest it was written with")
        except OSError as error:
            raise WeightsError(f"{directory} is damaged: cannot read {name}: {error.strerror}") from error


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


def export(directory: pathlib.Path, target: pathlib.Path) -> None:
    """Copy the policy of a checkpoint, a Hugging Face directory, without the training state; whole or not at all.

    Raises WeightsError if the checkpoint is damaged, or there is something at `target`.
    """
    record = read(directory)
    if target.exists():
        raise WeightsError(f"cannot write {target}: it is there already; give another place, or remove it")
    names = {name: said for name, said in record.files.items() if "/" not in name}
    _check_files(directory, names)
    with replacing(target) as new:
        for name in names:
            shutil.copy(directory / name, new)


def retire(parent: pathlib.Path, step: int) -> None:
    """Keep the checkpoint of `step` and the one before it.

    One of a later step goes too: it was refused, or the line of training that it was of has ended.
    """
    steps = sorted(int(match[1]) for path in parent.iterdir() if (match := _STEP.fullmatch(path.name)))
    kept = {step, *[earlier for earlier in steps if earlier < step][-1:]}
    for gone in steps:
        if gone not in kept:
            shutil.rmtree(parent / directory_name(gone))


class _Format(msgspec.Struct):
    format: int


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_digest(record: Record) -> str:
    return hashlib.sha256(msgspec.json.encode(dataclasses.replace(record, digest=""))).hexdigest()


def shape_digest(shape: ModelShape) -> str:
    """What a record says of a model."""
    return f"{shape.architecture} {hashlib.sha256(repr(dataclasses.asdict(shape)).encode()).hexdigest()[:16]}"
