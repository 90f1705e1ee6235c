"""What the publisher writes into a directory of updates, and when.

An update is encoded while its version is taken, for that needs the old bits.  It is written in another thread: a file
system that is slow or hangs delays neither the engines nor the learner.  What waits to be written is bounded; a version
that finds no room is left out, and an anchor follows as soon as there is.
"""

import logging
import os
import pathlib
import threading
import time
from collections import deque
from dataclasses import dataclass

from engines.weights.chain import Chain
from engines.weights.codes.payload import Code
from engines.weights.directory import About, describe, file_name, listing, save
from engines.weights.parts import Line, Piece, cut
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart

log = logging.getLogger(__name__)
KEEP_ANCHORS = 2
"""The newest, and the one before it for whoever is still reading from there."""
MAX_WAITING_COPIES = 2
"""Bytes that wait to be written, in copies of all weights: an anchor, and as much again of updates ..."""
MAX_WAITING_FILES = 64
"""... but no more files than this, for an update may be next to nothing."""


@dataclass(frozen=True, slots=True)
class _File:
    about: About
    parts: list[UpdatePart]

    @property
    def bytes(self) -> int:
        return sum(part.payload.size for part in self.parts)


class Outbox:
    """`write` and `settle` belong to the thread that takes versions, `flush` to any other."""

    def __init__(self, directory: pathlib.Path, run: str, part_bytes: int, anchor_every: int) -> None:
        """Raises WeightsError if the directory holds updates of another run, or cannot be read."""
        self._directory, self._run = directory, run
        self._part_bytes, self._anchor_every = part_bytes, anchor_every
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._waiting: deque[_File] = deque()
        """The first is being written."""
        self._since: int | None = None
        """Updates since the last anchor; None if the files do not lead on from one to the newest version."""
        self._elements = self._full_bytes = 0
        for _, _, path in listing(directory):
            self._check_run(path)

    @classmethod
    def of(cls, recipe: config.Recipe, run: str) -> "Outbox | None":
        """None if the recipe wants none."""
        weights = recipe.weights
        if not weights.directory:
            return None
        return cls(recipe.run_directory / weights.directory, run, weights.part_bytes, weights.anchor_every)

    def write(self, line: Line, pieces: list[Piece]) -> None:
        """A version is about to be taken; `pieces` have the old bits, which the small code needs."""
        with self._lock:
            if self._since is None:
                return  # an anchor will be written
            if not self._has_room(0):
                log.warning("%s is slow: version %s is left out, an anchor will follow", self._directory, line.target)
                self._since = None
                return
        try:
            parts = cut(pieces, line, Code.SMALL, self._part_bytes)
        except WeightsError:
            log.exception("version %s cannot be written; the next one will be an anchor", line.target)
            with self._lock:
                self._since = None
            return
        file = self._file(line, "small", parts, sum(piece.change.changed for piece in pieces))
        with self._lock:
            if self._since is not None:  # what it leads on from may have failed meanwhile
                self._waiting.append(file)
                self._since += 1

    def settle(self, chain: Chain) -> None:
        """A version has been taken: an anchor if one is due and there is room for it."""
        self._elements, self._full_bytes = chain.elements, chain.full_bytes
        with self._lock:
            due = self._since is None or self._since >= self._anchor_every
            if not due or not self._has_room(self._full_bytes):
                return
        version = chain.version
        assert version is not None
        parts = chain.prepare(None).parts
        line = Line(self._run, version, version, True, target_hash=chain.hashes[version])
        with self._lock:
            self._waiting.append(self._file(line, "dense", parts, chain.elements))
            self._since = 0

    def flush(self) -> None:
        """Write all that waits.  What cannot be written costs an anchor, nothing else."""
        with self._writing:
            while (file := self._first()) is not None:
                about = file.about
                try:
                    save(self._directory / file_name(about.base, about.target, about.anchor), about, file.parts)
                except WeightsError:
                    log.exception("version %s is not in the directory; an anchor will follow", about.target)
                    with self._lock:  # nothing leads to what comes after it
                        self._waiting.clear()
                        self._since = None
                    return
                with self._lock:
                    self._waiting.popleft()
                if about.anchor:
                    self._prune()

    def _first(self) -> _File | None:
        with self._lock:
            return self._waiting[0] if self._waiting else None

    def _has_room(self, size: int) -> bool:
        """For a file of so many bytes; an update is let in unseen, and is no larger than all weights."""
        waiting = sum(file.bytes for file in self._waiting)
        return len(self._waiting) < MAX_WAITING_FILES and waiting + size <= MAX_WAITING_COPIES * self._full_bytes

    def _file(self, line: Line, code: str, parts: list[UpdatePart], changed: int) -> _File:
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
        return _File(about, parts)

    def _check_run(self, path: pathlib.Path) -> None:
        try:
            run = describe(path).run
        except WeightsError as error:  # torn by whoever wrote it
            log.warning("%s", error)
            return
        if run != self._run:
            raise WeightsError(
                f"{path} belongs to run {run!r}, this one is {self._run!r}; name another weights.directory, or empty it"
            )

    def _prune(self) -> None:
        """What is older than the last anchors leads nobody anywhere, and nobody goes on writing what a publisher that
        was killed had begun."""
        try:
            files = sorted(listing(self._directory), key=lambda entry: entry[1])
            anchors = [target for base, target, _ in files if base is None]
            oldest = anchors[-KEEP_ANCHORS:][0]
            for _, target, path in files:
                if target < oldest:
                    path.unlink(missing_ok=True)
            for path in self._directory.glob(".*.writing-*"):
                if not path.name.endswith(f".writing-{os.getpid()}"):
                    path.unlink(missing_ok=True)
        except (OSError, WeightsError) as error:
            log.warning("%s is not pruned: %s", self._directory, error)
