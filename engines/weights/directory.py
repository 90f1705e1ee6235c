"""Updates in a directory, for engines that are too far away for a socket: the same parts, chain and fingerprints.

    HISTORY.STEP.anchor                       all weights of a version
    HISTORY.STEP.from.HISTORY.STEP.update     what leads from one version to the next, in the small code

A file is a line that names the format, the length of a msgpack map that says what is in it, the map, and then every
part as it would be sent: the number of its frames, their lengths, the frames.  Files appear whole or not at all.
"""

import contextlib
import os
import pathlib
import re
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from stream_rl import wire
from stream_rl.errors import WeightsError, WireError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

MAGIC = b"stream_rl update 1\n"
MAX_ABOUT_BYTES = 1 << 16
_NAME = re.compile(r"([0-9]{6})\.([0-9]{9})(?:\.from\.([0-9]{6})\.([0-9]{9})\.update|\.anchor)")


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a file says of itself."""

    run: str
    base: Version
    target: Version
    anchor: bool
    code: str
    target_hash: str
    changed: int
    """Elements whose bits differ; all of them in an anchor."""
    elements: int
    """Of the whole model."""
    parts: int
    seconds: float
    """Unix time at which it was written."""


def file_name(base: Version, target: Version, anchor: bool) -> str:
    name = f"{target.history:06d}.{target.step:09d}"
    return f"{name}.anchor" if anchor else f"{name}.from.{base.history:06d}.{base.step:09d}.update"


def save(path: pathlib.Path, about: About, parts: list[UpdatePart]) -> None:
    """Write a file, whole or not at all.  Raises WeightsError if the disk refuses."""
    new = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            described = msgspec.msgpack.encode(about)
            file.write(MAGIC + struct.pack("<I", len(described)) + described)
            for part in parts:
                frames = wire.encode(part)
                file.write(struct.pack(f"<I{len(frames)}Q", len(frames), *(len(frame) for frame in frames)))
                file.writelines(frames)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise WeightsError(f"cannot write {path}: {error.strerror}; make room, or unset weights.directory") from error


def describe(path: pathlib.Path) -> About:
    """What a file says of itself.  Raises WeightsError if it is none of ours."""
    with _opened(path) as file:
        return _about(file, path)


def load(path: pathlib.Path) -> tuple[About, list[UpdatePart]]:
    """Raises WeightsError for a file that is not one of ours, not whole, or not what it says of itself.

    The parts' bytes are checked when they are read, see parts.read; their checksums cover what is compared here.
    """
    with _opened(path) as file:
        about = _about(file, path)
        parts = [_part(file, path) for _ in range(about.parts)]
        if not parts or file.read(1):
            raise WeightsError(f"{path} is damaged: it has other than {about.parts} parts")
    described = about.run, about.base, about.target, about.anchor, about.target_hash, about.parts, 0, 1
    for i, part in enumerate(parts):
        line = part.run, part.base, part.target, part.anchor, part.target_hash, part.parts, part.source, part.sources
        if line != described or part.part != i:
            raise WeightsError(f"{path} is damaged: what it says of itself is not so in part {i}")
    return about, parts


def listing(directory: pathlib.Path) -> list[tuple[Version | None, Version, pathlib.Path]]:
    """Base (None of an anchor), target and path of every file there is; none if there is no directory yet.  Raises
    WeightsError if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise WeightsError(f"cannot read {directory}: {error.strerror}") from error
    return [(*_versions(name), directory / name) for name in names]


def _versions(name: str) -> tuple[Version | None, Version]:
    match = _NAME.fullmatch(name)
    assert match is not None
    history, step, base_history, base_step = match.groups()
    base = None if base_history is None else Version(int(base_history), int(base_step))
    return base, Version(int(history), int(step))


def following(
    directory: pathlib.Path, held: Version | None, unusable: Container[pathlib.Path] = ()
) -> pathlib.Path | None:
    """The file that leads on from `held`: the update from there if there is one, else a newer anchor, else None.

    Raises WeightsError if the directory cannot be read.
    """
    files = [entry for entry in listing(directory) if entry[2] not in unusable]
    onward = [path for base, _, path in files if base is not None and base == held]
    anchors = [(target, path) for base, target, path in files if base is None and (held is None or target > held)]
    if onward:
        return max(onward)
    return max(anchors)[1] if anchors else None


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def _about(file: BinaryIO, path: pathlib.Path) -> About:
    if file.read(len(MAGIC)) != MAGIC:
        raise WeightsError(f"{path} is no update: it does not begin with {MAGIC.decode().strip()!r}")
    (length,) = struct.unpack("<I", _exactly(file, 4, path))
    if length > MAX_ABOUT_BYTES:
        raise WeightsError(f"{path} is damaged: it describes itself in {length} bytes")
    try:
        return msgspec.msgpack.decode(_exactly(file, length, path), type=About)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def _part(file: BinaryIO, path: pathlib.Path) -> UpdatePart:
    (count,) = struct.unpack("<I", _exactly(file, 4, path))
    if count > wire.MAX_FRAMES:
        raise WeightsError(f"{path} is damaged: a part of {count} frames")
    lengths = struct.unpack(f"<{count}Q", _exactly(file, 8 * count, path))
    try:
        part = wire.decode([_exactly(file, length, path) for length in lengths])
    except WireError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    if not isinstance(part, UpdatePart):
        raise WeightsError(f"{path} holds a {type(part).__name__}, expected an UpdatePart")
    return part


def _exactly(file: BinaryIO, size: int, path: pathlib.Path) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell()
    if size > left:
        raise WeightsError(f"{path} is cut short: {size} bytes expected, {left} left")
    return file.read(size)
