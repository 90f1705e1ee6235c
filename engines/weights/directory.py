"""Updates in a directory, for engines that are too far away for a socket: the same parts, chain and fingerprints.

    HISTORY.STEP.anchor                       all weights of a version
    HISTORY.STEP.from.HISTORY.STEP.update     what leads from one version to the next, in the small code

A file is a line that names the format, the length of a msgpack map that says what is in it, the map, and then every
part as it would be sent: the number of its frames, their lengths, the frames.  Files appear whole or not at all.
"""

import contextlib
import logging
import os
import pathlib
import re
import struct
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from engines.weights.chain import Chain
from engines.weights.codes.payload import Code
from engines.weights.parts import Line, Piece, cut
from stream_rl import config, wire
from stream_rl.errors import WeightsError, WireError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

log = logging.getLogger(__name__)
MAGIC = b"stream_rl update 1\n"
MAX_ABOUT_BYTES = 1 << 16
KEEP_ANCHORS = 2
"""The newest, and the one before it for whoever is still reading from there."""
_NAME = re.compile(r"(\d{6})\.(\d{9})(?:\.from\.(\d{6})\.(\d{9})\.update|\.anchor)")


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a file says of itself."""

    run: str
    base: tuple[int, int]
    target: tuple[int, int]
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
    """Raises WeightsError for a file that is not one of ours, or not whole."""
    with _opened(path) as file:
        about = _about(file, path)
        return about, [_part(file, path) for _ in range(about.parts)]


class Outbox:
    """The publisher's side: writes each version, and prunes."""

    def __init__(self, directory: pathlib.Path, part_bytes: int, anchor_every: int) -> None:
        self._directory, self._part_bytes, self._anchor_every = directory, part_bytes, anchor_every
        self._anchored = False
        """What was written last leads on from an anchor, without a gap."""
        self._elements = 0

    @classmethod
    def of(cls, recipe: config.Recipe) -> "Outbox | None":
        """None if the recipe wants none."""
        weights = recipe.weights
        if not weights.directory:
            return None
        return cls(recipe.run_directory / weights.directory, weights.part_bytes, weights.anchor_every)

    def write(self, line: Line, pieces: list[Piece]) -> None:
        """A version is about to be taken; `pieces` have the old bits, which the small code needs."""
        if not self._anchored:
            return  # an anchor will be written
        try:
            parts = cut(pieces, line, Code.SMALL, self._part_bytes)
            self._save(line, "small", parts, sum(piece.change.changed for piece in pieces))
        except WeightsError:
            log.exception("version %s is not in the directory; the next one will be an anchor", line.target)
            self._anchored = False

    def settle(self, chain: Chain) -> None:
        """A version has been taken: an anchor if one is due."""
        version = chain.version
        assert version is not None
        self._elements = chain.elements
        if self._anchored and (self._anchor_every < 1 or version.step % self._anchor_every):
            return
        anchor = chain.prepare(None)
        line = Line(anchor.parts[0].run, version, version, True, target_hash=chain.hashes[version])
        try:
            self._save(line, "dense", anchor.parts, chain.elements)
            self._anchored = True
            self._prune()
        except WeightsError:
            log.exception("the anchor %s is not in the directory", version)

    def _save(self, line: Line, code: str, parts: list[UpdatePart], changed: int) -> None:
        about = About(
            run=line.run,
            base=line.base,
            target=line.target,
            anchor=line.anchor,
            code=code,
            target_hash=line.target_hash,
            changed=changed,
            elements=self._elements,
            parts=len(parts),
            seconds=time.time(),
        )
        save(self._directory / file_name(line.base, line.target, line.anchor), about, parts)

    def _prune(self) -> None:
        """What is older than the last anchors leads nobody anywhere."""
        files = sorted(listing(self._directory), key=lambda entry: entry[1])
        anchors = [target for base, target, _ in files if base is None]
        if len(anchors) > KEEP_ANCHORS:
            for _, target, path in files:
                if target < anchors[-KEEP_ANCHORS]:
                    path.unlink(missing_ok=True)


def listing(directory: pathlib.Path) -> Iterator[tuple[Version | None, Version, pathlib.Path]]:
    """Base (None of an anchor), target and path of every file there is."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) is not None:
            numbers = [None if each is None else int(each) for each in match.groups()]
            base = None if numbers[2] is None else Version(numbers[2], numbers[3] or 0)
            yield base, Version(numbers[0] or 0, numbers[1] or 0), path


def following(
    directory: pathlib.Path, held: Version | None, unusable: Container[pathlib.Path] = ()
) -> pathlib.Path | None:
    """The file that leads on from `held`: the update from there if there is one, else a newer anchor, else None."""
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
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
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
