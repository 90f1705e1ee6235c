"""Weight updates inside an engine: received in parts, checked, staged in the background, live between two steps.

Two threads share this.  The plugin's thread receives, decodes, checks and stages; the scheduler's thread only runs
`commit`.  At most one update is under way: the publisher sends the next after it heard `Live`.

Invariant: nothing is written to a live parameter before the whole update is here, fits the live version, and is known
to lead to the fingerprint that the publisher stated.
"""

import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from engines.sglang.load_map import LoadMap, Write
from engines.weights import fingerprint
from engines.weights.codec import TensorUpdate, decode
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version


class LiveWeights:
    """The live version of one rank, and the update on its way to replace it."""

    def __init__(self, run: str, load_map: LoadMap, version: Version) -> None:
        self._run = run
        self._map = load_map
        self.version = version
        """Read by the scheduler's thread at every launch; flipped there by `commit`."""
        self._sums = {name: load_map.live_sum(name) for name in load_map.shapes}
        self._under_way: tuple[object, ...] = ()
        """What the parts that are here have in common."""
        self._parts: dict[int, _Part] = {}
        self._started = 0.0
        self._staged: _Staged | None = None
        self._previous: _Staged | None = None
        """Kept until the next commit: on a GPU the writes may still be reading it."""
        self._written: torch.cuda.Event | None = None
        """On a GPU: when the last commit's writes are done; the plugin's stream waits for it before it reads them."""

    @property
    def device(self) -> torch.device:
        """Where the live weights are."""
        return next(iter(self._map.pieces.values()))[0].live.device

    @property
    def fingerprint(self) -> int:
        """Incremental fingerprint of the live weights."""
        return sum(self._sums.values()) % (1 << 64)

    @property
    def staged(self) -> Version | None:
        """Target of the update that waits for its commit."""
        return self._staged.target if self._staged else None

    def forget_staged(self) -> None:
        """Who sent what is here is gone.  Not between the order of a commit and the commit: it is in use there."""
        self._parts.clear()
        self._staged, self._under_way = None, ()

    def receive(self, part: UpdatePart) -> Version | None:
        """Take one part; the target once the whole update is staged, None before.

        Raises WeightsError if it cannot be applied here, saying why; what was received of it is then forgotten.
        """
        try:
            return self._receive(part)
        except WeightsError:
            self._parts.clear()
            raise

    def _receive(self, part: UpdatePart) -> Version | None:
        columns = {len(column) for column in (part.names, part.codes, part.sizes, part.dtypes)}
        if not 0 <= part.part < part.parts or len(columns) != 1:
            raise WeightsError(f"part {part.part} of {part.parts} of version {part.target} is malformed")
        if part.run != self._run:
            raise WeightsError(f"this engine belongs to run {self._run!r}, the update to run {part.run!r}")
        if part.target.history < self.version.history:
            raise WeightsError(
                f"version {part.target} is of a line of training that has ended, this engine holds {self.version}"
            )
        if self._staged is not None and part.attempt == self._staged.attempt:
            return None  # sent again; it is staged already and the publisher was told
        self._staged = None  # the publisher gave that one up, or it would have waited
        if zlib.crc32(part.payload.data) != part.checksum:
            raise WeightsError(f"part {part.part} of version {part.target} is corrupt")
        if not part.anchor and part.base != self.version:
            raise WeightsError(
                f"the update to {part.target} needs version {part.base}, this engine holds {self.version}"
            )
        if _same(part) != self._under_way:
            self._parts.clear()
            self._under_way, self._started = _same(part), time.perf_counter()
        if part.part not in self._parts:
            self._parts[part.part] = self._decoded(part)
        if len(self._parts) < part.parts:
            return None
        self._staged = self._whole(part)
        self._parts.clear()
        return part.target

    def _whole(self, last: UpdatePart) -> "_Staged":
        """Every part is here, each decoded when it came, so that the thread had time for other things in between."""
        sums, writes = dict(self._sums), []
        for number in range(last.parts):
            writes += self._parts[number].writes
            sums |= self._parts[number].sums
        total = sum(sums.values()) % (1 << 64)
        if fingerprint.text(total) != last.target_hash:
            raise WeightsError(
                f"version {last.target} would have fingerprint {fingerprint.text(total)} here, "
                f"the publisher states {last.target_hash}"
            )
        if self._written is not None or any(write.target.is_cuda for write in writes):
            torch.cuda.current_stream().synchronize()  # staged means on the device, whatever stream reads it next
        return _Staged(last.target, last.attempt, writes, sums, time.perf_counter() - self._started)

    def _wait_for_writes(self) -> None:
        if self._written is not None:
            torch.cuda.current_stream().wait_event(self._written)

    def _decoded(self, part: UpdatePart) -> "_Part":
        self._wait_for_writes()
        decoded, offset = _Part([], {}), 0
        for name, code, sizes, dtype in zip(part.names, part.codes, part.sizes, part.dtypes, strict=True):
            shape = self._map.shapes.get(name)
            if shape is None or str(shape.dtype) != f"torch.{dtype}":
                raise WeightsError(f"the update has {name} as {dtype}; this engine's checkpoint has {shape}")
            buffers = []
            for size in sizes:
                buffers.append(part.payload[offset : offset + size])
                offset += size
            update = decode(name, shape.dtype, shape.elements, code, buffers)
            decoded.sums[name] = self._new_sum(update, self._sums[name])
            decoded.writes.extend(self._map.writes(update))
        return decoded

    def _new_sum(self, update: TensorUpdate, old: int) -> int:
        if update.indices is None:
            return fingerprint.tensor_sum(update.name, update.bits)
        seed = fingerprint.seed_of(update.name)
        before = self._map.read(update.name, update.indices).to(update.bits.device)
        gone = fingerprint.element_sum(seed, update.indices, before)
        come = fingerprint.element_sum(seed, update.indices, update.bits)
        return (old - gone + come) % (1 << 64)

    def commit(self, target: Version, on_forward_stream: Callable[[], AbstractContextManager[object]]) -> float:
        """Scheduler's thread, between two steps: write, then flip the version.  Returns the seconds it took.

        The writes are enqueued on the stream of the forward passes, behind the last launched one and before the next,
        so a pass computes with the weights of exactly one version.
        """
        start = time.perf_counter()
        staged = self._staged
        if staged is None or staged.target != target:
            raise WeightsError(f"asked to make {target} live, staged is {staged.target if staged else 'nothing'}")
        self._previous, self._staged = staged, None
        with torch.no_grad(), on_forward_stream():
            for write in staged.writes:
                write.apply()
            if staged.writes and staged.writes[0].target.is_cuda:
                self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._written.record()
        self.version = target
        self._sums = staged.sums
        return time.perf_counter() - start

    @property
    def stage_seconds(self) -> float:
        """From the first part of the last committed update until it was staged."""
        return self._previous.seconds if self._previous else 0.0

    def recompute(self) -> int:
        """Fingerprint recomputed from all live parameters.  Raises WeightsError if replicas within the rank differ."""
        self._wait_for_writes()
        self._sums = {name: self._map.live_sum(name) for name in self._map.shapes}
        return self.fingerprint


def _same(part: UpdatePart) -> tuple[object, ...]:
    """What the parts of one update have in common."""
    return part.attempt, part.target, part.anchor, part.parts


class _Part(NamedTuple):
    """One part of an update, decoded."""

    writes: list[Write]
    sums: dict[str, int]
    """What the fingerprints of its tensors will be."""


class _Staged:
    """A whole update, ready to be written."""

    __slots__ = ("attempt", "seconds", "sums", "target", "writes")

    def __init__(
        self, target: Version, attempt: int, writes: list[Write], sums: dict[str, int], seconds: float
    ) -> None:
        self.target, self.attempt, self.writes, self.sums, self.seconds = target, attempt, writes, sums, seconds
