"""GGUF files, as llama.cpp writes them: what is in one, and its tensors as float32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks as in ggml-quants.c there.
"""

import mmap
import pathlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_rl.errors import ConfigError

Float32s = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
VERSIONS = (2, 3)
MOST = 1 << 28
"""Entries of any list, and bytes of any text: a damaged file must not take the memory."""
BLOCK = 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9


def _f32(blocks: Bytes) -> Float32s:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Float32s:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Float32s:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Float32s:
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Float32s:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: Bytes) -> Float32s:
    return _f16(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _f16(blocks[:, 2:4])


def _nibbles(packed: Bytes) -> Float32s:
    """[blocks, 16] -> [blocks, 32]: the low halves are the first sixteen."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    elements: int
    """Of a block."""
    bytes: int
    read: Callable[[Bytes], Float32s]
    """[blocks, bytes] -> [blocks, elements]"""


_KINDS = {
    0: _Kind("F32", 1, 4, _f32),
    1: _Kind("F16", 1, 2, _f16),
    2: _Kind("Q4_0", BLOCK, 18, _q4_0),
    3: _Kind("Q4_1", BLOCK, 20, _q4_1),
    8: _Kind("Q8_0", BLOCK, 34, _q8_0),
    30: _Kind("BF16", 1, 2, _bf16),
}
_OTHERS = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}


@dataclass(frozen=True, slots=True)
class _Stored:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """`fields` by name, and tensors, each read when it is asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        """Raises ConfigError for anything that is no GGUF file of a version that is known here."""
        self._path, self.fields = path, {}
        self._stored: dict[str, _Stored] = {}
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_head()
        except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no GGUF file: {error}") from error

    fields: dict[str, Any]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, rows first."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Float32s:
        """Raises ConfigError if it is not there, or in a format that is not read here."""
        stored = self._stored.get(name)
        if stored is None:
            raise ConfigError(f"{self._path} has no tensor {name}")
        kind = _KINDS.get(stored.kind)
        if kind is None:
            called = _OTHERS.get(stored.kind, f"of type {stored.kind}")
            known = ", ".join(each.name for each in _KINDS.values())
            raise ConfigError(f"{self._path}: {name} is {called}; read here are {known}.  Take a file of one of those")
        elements = int(np.prod(stored.shape, dtype=np.int64))
        blocks, rest = divmod(elements, kind.elements)
        end = stored.offset + blocks * kind.bytes
        if rest or end > len(self._bytes):
            raise ConfigError(f"{self._path} is cut off or damaged at {name}: {elements} elements of {kind.name}")
        raw = np.frombuffer(self._bytes, np.uint8, blocks * kind.bytes, stored.offset).reshape(blocks, kind.bytes)
        return kind.read(raw).reshape(stored.shape)

    def _read_head(self) -> None:
        at = _Reader(self._bytes)
        if (magic := self._bytes[:4]) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        at.position = 4
        if (version := at.scalar("<I")) not in VERSIONS:
            raise ValueError(f"expected version {' or '.join(map(str, VERSIONS))}, got {version}")
        tensors, fields = at.count(), at.count()
        for _ in range(fields):
            name = at.text()
            self.fields[name] = at.value(at.scalar("<I"))
        infos = {}
        for _ in range(tensors):
            name = at.text()
            shape = tuple(at.count() for _ in range(at.scalar("<I")))[::-1]  # ggml has the fastest dimension first
            infos[name] = shape, at.scalar("<I"), at.scalar("<Q")
        alignment = int(self.fields.get("general.alignment", 32))
        start = -(-at.position // alignment) * alignment
        self._stored = {name: _Stored(shape, kind, start + offset) for name, (shape, kind, offset) in infos.items()}


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.position = data, 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.position)
        self.position += struct.calcsize(form)
        return value

    def count(self) -> int:
        if (number := int(self.scalar("<Q"))) > MOST:
            raise ValueError(f"a size of {number} at byte {self.position}")
        return number

    def text(self) -> str:
        length = self.count()
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise ValueError("it is cut off")
        return self._data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            of = self.scalar("<I")
            if of == _LIST:
                raise ValueError("it has a list of lists")
            return [self.value(of) for _ in range(self.count())]
        if kind not in _SCALARS:
            raise ValueError(f"it has a field of type {kind}")
        return self.scalar(_SCALARS[kind])
