"""A directory of leases: what steps were taken on, a file each, to take them again.

HISTORY.STEP.lease         a line that says what it is, CRC-32 of the rest, the message's frames behind their lengths
HISTORY.STEP.logprobs.npy  [T] float32, the learner's log-probs of its tokens under the weights that the step began with
"""

import itertools
import os
import pathlib
import re
import struct
import zlib

import numpy as np

from queues.journal import pack, unpack
from stream_rl import wire
from stream_rl.errors import ConfigError, StreamRLError, WireError
from stream_rl.messages import Lease
from stream_rl.types import Float32Array, Version

DIRECTORY = "leases"
"""In a run's directory."""
_MAGIC = b"stream_rl lease 1\n"
_CRC = struct.Struct("<I")
_LOGPROBS = ".logprobs.npy"
_NAME = re.compile(r"(\d+)\.(\d+)\.lease")


def write(directory: pathlib.Path, lease: Lease) -> pathlib.Path:
    """Keep a lease: durably, whole or not at all; one of the same step is replaced.  Raises StreamRLError if the disk
    refuses."""
    path = path_of(directory, lease.step)
    body = pack(wire.encode(lease))
    new = path.with_suffix(".new")
    try:
        directory.mkdir(exist_ok=True)
        with new.open("wb") as file:
            for piece in (_MAGIC, _CRC.pack(zlib.crc32(body)), body):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise StreamRLError(f'cannot keep {path}: {error}; make room, or set learner.leases = "train"') from error
    return path


def write_logprobs(lease: pathlib.Path, logprobs: Float32Array) -> None:
    """Keep the learner's log-probs of a lease's tokens, [T], beside the lease.  Raises StreamRLError if the disk
    refuses."""
    path = lease.with_suffix(_LOGPROBS)
    try:
        with path.with_suffix(".new").open("wb") as file:
            np.save(file, logprobs, allow_pickle=False)
        path.with_suffix(".new").replace(path)
    except OSError as error:
        raise StreamRLError(f'cannot keep {path}: {error}; make room, or set learner.leases = "train"') from error


def read_logprobs(lease: pathlib.Path) -> Float32Array | None:
    """What `write_logprobs` wrote beside a lease; None if nothing was.  Raises ConfigError if it cannot be read."""
    path = lease.with_suffix(_LOGPROBS)
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float32)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read {path}: {error}; take it away to do without") from error


def path_of(directory: pathlib.Path, step: Version) -> pathlib.Path:
    return directory / f"{step.history}.{step.step}.lease"


def read(path: pathlib.Path) -> Lease:
    """The lease in a file that `write` wrote.  Raises ConfigError if it cannot be read, is damaged, or is another's."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    begin = len(_MAGIC) + _CRC.size
    if len(data) < begin or not data.startswith(_MAGIC):
        raise ConfigError(f"{path} holds no lease of this release; `stream-rl train --rollout-only` writes such files")
    body = data[begin:]
    if _CRC.unpack_from(data, len(_MAGIC)) != (zlib.crc32(body),):
        raise ConfigError(f"{path} is damaged: it has another checksum than it was written with")
    try:
        lease = wire.decode(unpack(body))
    except (WireError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a lease: {error}") from error
    if not isinstance(lease, Lease) or lease.step != step_of(path):
        raise ConfigError(f"{path} should hold the lease of its name, it holds {type(lease).__name__} of another")
    return lease


def surviving(directory: pathlib.Path) -> list[pathlib.Path]:
    """The leases of the line of training that survived, in the order of its steps, from step 0 on.

    A history forks from the ones before it at its lowest step; what they had from there on is passed over.  Raises
    ConfigError if there are none, or a step is missing.
    """
    found = sorted((step, path) for path in directory.glob("*.lease") if (step := step_of(path)) is not None)
    line: dict[int, pathlib.Path] = {}
    for history in sorted({version.history for version, _ in found}):
        own = {version.step: path for version, path in found if version.history == history}
        line = {step: path for step, path in line.items() if step < min(own)} | own
    if not line:
        raise ConfigError(
            f'{directory} holds no leases; a run keeps them with learner.leases = "record", and '
            "`stream-rl train RECIPE --rollout-only` makes some without training"
        )
    missing = next(step for step in itertools.count() if step not in line)
    if missing < max(line):
        raise ConfigError(
            f"{directory} has no lease of step {missing} and has one of step {max(line)}: files were taken away, or "
            "they were kept from a later step on only; steps can be taken again from step 0 alone"
        )
    return [line[step] for step in sorted(line)]


def step_of(path: pathlib.Path) -> Version | None:
    """The step of a lease's file; None if it is none by its name."""
    match = _NAME.fullmatch(path.name)
    return Version(int(match[1]), int(match[2])) if match else None
