"""The published line of versions: one host copy of the newest, the differences that led to it, a hash of each.

An update goes from one version that an engine holds to the next one, or from nothing to the newest (an anchor).
Versions of another history, or too far behind, get an anchor.
"""

import math
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engines.weights import codec, fingerprint
from engines.weights.codec import TensorUpdate
from stream_rl.errors import WeightsError
from stream_rl.messages import Snapshot, UpdatePart
from stream_rl.types import ByteArray, Version


@dataclass(frozen=True, slots=True)
class Update:
    """An encoded update, shared by all engines that need it."""

    base: Version
    target: Version
    anchor: bool
    parts: list[UpdatePart]
    changed: int
    encode_seconds: float

    @property
    def bytes(self) -> int:
        """Payload bytes of all parts."""
        return sum(part.payload.size for part in self.parts)


def snapshot_parts(
    run: str, version: Version, tensors: Iterable[tuple[str, torch.Tensor]], part_bytes: int
) -> list[Snapshot]:
    """A copy of checkpoint tensors as messages to the publisher, each of about `part_bytes`."""
    groups: list[list[tuple[str, torch.Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if size >= part_bytes:
            groups.append([])
            size = 0
        groups[-1].append((name, tensor))
        size += tensor.numel() * tensor.element_size()
    return [
        Snapshot(
            run=run,
            version=version,
            part=i,
            parts=len(groups),
            names=[name for name, _ in group],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in group],
            shapes=[list(tensor.shape) for _, tensor in group],
            payload=np.concatenate([_bytes(tensor) for _, tensor in group]) if group else np.empty(0, np.uint8),
        )
        for i, group in enumerate(groups)
    ]


def _bytes(tensor: torch.Tensor) -> ByteArray:
    return fingerprint.bits_of(tensor.detach().cpu().contiguous()).reshape(-1).numpy().view(np.uint8)


def snapshot_tensors(snapshot: Snapshot) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    """Name to (dtype, flat bits) of a snapshot's tensors.  Raises WeightsError if the payload does not fit."""
    if not len(snapshot.names) == len(snapshot.dtypes) == len(snapshot.shapes):
        raise WeightsError("a snapshot part needs one dtype and one shape for each name")
    tensors, offset = {}, 0
    for name, dtype_name, shape in zip(snapshot.names, snapshot.dtypes, snapshot.shapes, strict=True):
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype) or dtype.itemsize not in (1, 2, 4, 8):
            raise WeightsError(f"{name}: {dtype_name!r} is no dtype of weights")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or offset + size > snapshot.payload.size:
            raise WeightsError(f"{name}: shape {shape} of {dtype_name} does not fit {snapshot.payload.size} bytes")
        tensors[name] = (dtype, fingerprint.bits_from_bytes(snapshot.payload[offset : offset + size].copy(), dtype))
        offset += size
    if offset != snapshot.payload.size:
        raise WeightsError(f"a snapshot part of {snapshot.payload.size} bytes holds tensors of {offset} bytes")
    return tensors


class Chain:
    """Everything that the publisher knows of the weights."""

    def __init__(self, run: str, part_bytes: int, keep: int) -> None:
        self._run, self._part_bytes, self._keep = run, part_bytes, keep
        self._bits: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
        self._sums: dict[str, int] = {}
        self._updates: OrderedDict[Version, Update] = OrderedDict()
        """By base, oldest first; at most `keep`."""
        self._anchor: Update | None = None
        self.version: Version | None = None
        self.hashes: dict[Version, str] = {}
        """Of every version ever published in this process: 100 bytes each."""

    @property
    def full_bytes(self) -> int:
        return sum(bits.numel() * bits.element_size() for _, bits in self._bits.values())

    @property
    def elements(self) -> int:
        return sum(bits.numel() for _, bits in self._bits.values())

    def has(self, version: Version) -> bool:
        """True if this chain is at `version`, or further on in the same history."""
        return self.version is not None and version.history == self.version.history and version <= self.version

    def advance(self, version: Version, tensors: Mapping[str, tuple[torch.dtype, torch.Tensor]]) -> None:
        """`version` is the newest from here on.  Raises WeightsError, as `check` does."""
        self.check(version, tensors)
        base = self.version
        if base is None:
            self._bits = dict(tensors)
            self._sums = {name: fingerprint.tensor_sum(name, bits) for name, (_, bits) in tensors.items()}
        start = time.perf_counter()
        changes = self._take(tensors) if base is not None else []
        self.version, self._anchor = version, None
        self.hashes[version] = fingerprint.text(sum(self._sums.values()) % (1 << 64))
        if base is None:
            return
        if version.history != base.history:
            self._updates.clear()  # a line of training that ended leads nowhere: its engines get an anchor
            return
        parts = self._encode(base, version, False, changes)
        changed = sum(change.changed for change in changes)
        self._updates[base] = Update(base, version, False, parts, changed, time.perf_counter() - start)
        while len(self._updates) > self._keep:
            self._updates.popitem(last=False)

    def check(self, version: Version, tensors: Mapping[str, tuple[torch.dtype, torch.Tensor]]) -> None:
        """Raises WeightsError if `version` is not newer or has other tensors.  All of it before any of it is taken: a
        refused version changes nothing."""
        if self.version is None:
            return
        if version <= self.version:
            raise WeightsError(f"version {version} came after {self.version}; versions only grow")
        if set(tensors) != set(self._bits):
            raise WeightsError(f"version {version} has other tensors than {self.version}")
        for name, (dtype, bits) in tensors.items():
            old_dtype, old = self._bits[name]
            if dtype != old_dtype or bits.numel() != old.numel():
                raise WeightsError(f"{name} is {bits.numel()} x {dtype}, was {old.numel()} x {old_dtype}")

    def _take(self, tensors: Mapping[str, tuple[torch.dtype, torch.Tensor]]) -> list[TensorUpdate]:
        """Make these the newest bits, and say what they changed."""
        changes = []
        for name, (dtype, bits) in tensors.items():
            old = self._bits[name][1]
            if (change := codec.diff(name, dtype, old, bits)) is not None:
                changes.append(change)
                self._sums[name] = self._new_sum(change, old)
                self._bits[name] = (dtype, bits)
        return changes

    def _new_sum(self, change: TensorUpdate, old: torch.Tensor) -> int:
        if change.indices is None:
            return fingerprint.tensor_sum(change.name, change.bits)
        seed = fingerprint.seed_of(change.name)
        gone = fingerprint.element_sum(seed, change.indices, old[change.indices])
        come = fingerprint.element_sum(seed, change.indices, change.bits)
        return (self._sums[change.name] - gone + come) % (1 << 64)

    def update_from(self, held: Version) -> Update | None:
        """What brings an engine that holds `held` one version on (or all the way, by an anchor); None at the newest."""
        assert self.version is not None
        if held == self.version:
            return None
        return self._updates.get(held) or self.anchor()

    def anchor(self) -> Update:
        """All of the newest version."""
        assert self.version is not None
        if self._anchor is None:
            start = time.perf_counter()
            everything = [TensorUpdate(name, dtype, None, bits) for name, (dtype, bits) in self._bits.items()]
            parts = self._encode(self.version, self.version, True, everything)
            seconds = time.perf_counter() - start
            self._anchor = Update(self.version, self.version, True, parts, self.elements, seconds)
        return self._anchor

    def _encode(self, base: Version, target: Version, anchor: bool, changes: list[TensorUpdate]) -> list[UpdatePart]:
        groups: list[list[tuple[TensorUpdate, str, list[ByteArray]]]] = [[]]
        size = 0
        for change in changes:
            if size >= self._part_bytes:
                groups.append([])
                size = 0
            code, buffers = codec.encode(change)
            groups[-1].append((change, code, buffers))
            size += sum(buffer.size for buffer in buffers)
        return [self._part(base, target, anchor, i, len(groups), group) for i, group in enumerate(groups)]

    def _part(
        self,
        base: Version,
        target: Version,
        anchor: bool,
        part: int,
        parts: int,
        group: list[tuple[TensorUpdate, str, list[ByteArray]]],
    ) -> UpdatePart:
        buffers = [buffer for _, _, several in group for buffer in several]
        payload = np.concatenate(buffers) if buffers else np.empty(0, np.uint8)
        return UpdatePart(
            run=self._run,
            base=base,
            target=target,
            anchor=anchor,
            part=part,
            parts=parts,
            names=[change.name for change, _, _ in group],
            codes=[code for _, code, _ in group],
            sizes=[[buffer.size for buffer in several] for _, _, several in group],
            dtypes=[str(change.dtype).removeprefix("torch.") for change, _, _ in group],
            checksum=zlib.crc32(payload.data),
            target_hash=self.hashes[target],
            payload=payload,
        )
