"""Bytes to write and to read: whole numbers, and arrays of them in Rice's code.

Rice's code of v with parameter k is v >> k ones and a zero, then the k low bits of v: the best there is for values
that fall off geometrically, within 0.03 to 0.12 bits.  Here the first parts of all values come first, then their low
bits by place (all bits 0, all bits 1, ...), so that arrays are coded at once rather than value by value.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

MAX_PARAMETER = 32
NUMBER_BYTES = 9
"""Of the longest whole number."""


class Writer:
    """What was written so far, in pieces."""

    def __init__(self) -> None:
        self.pieces: list[ByteArray] = []

    def array(self, values: npt.NDArray[np.generic]) -> None:
        self.pieces.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def numbers(self, *values: int) -> None:
        """Whole numbers from 0, seven bits to a byte."""
        out = bytearray()
        for value in values:
            while value >= 128:
                out.append(value & 127 | 128)
                value >>= 7
            out.append(value)
        self.pieces.append(np.frombuffer(out, np.uint8))

    def bits(self, bits: npt.NDArray[np.bool_]) -> None:
        self.pieces.append(np.packbits(bits, bitorder="little"))

    def rice(self, values: Int64Array, parameters: Int64Array) -> None:
        high = values >> parameters
        ends = np.cumsum(high + 1)
        unary = np.ones(int(ends[-1]) if ends.size else 0, np.bool_)
        unary[ends - 1] = False
        self.numbers(-(-unary.size // 8))
        self.bits(unary)
        for place in range(int(parameters.max(initial=0))):
            self.bits((values[parameters > place] >> place & 1).astype(np.bool_))


class Reader:
    """Bytes from a peer, from the front.  Everything raises WeightsError where the bytes end too soon."""

    def __init__(self, data: ByteArray) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes that have not been taken."""
        return self._data.size - self._at

    def array(self, count: int, dtype: str) -> npt.NDArray[Any]:
        """A copy, so that it is aligned and may be written."""
        return self.take(count * np.dtype(dtype).itemsize).copy().view(dtype)

    def numbers(self, count: int) -> list[int]:
        """So many of them, in one go: an engine's scheduler waits while this thread is in the interpreter."""
        values, value, place, at = list[int](), 0, 0, 0
        data = self._data[self._at : self._at + NUMBER_BYTES * count].tobytes()
        while len(values) < count:
            if place > 7 * (NUMBER_BYTES - 1):
                raise WeightsError("a number has more than 63 bits")
            if at == len(data):
                raise WeightsError(f"{count} numbers were promised, {len(values)} are there")
            value |= (data[at] & 127) << place
            if data[at] < 128:
                values.append(value)
                value, place = 0, 0
            else:
                place += 7
            at += 1
        self._at += at
        return values

    def number(self) -> int:
        return self.numbers(1)[0]

    def bits(self, count: int) -> npt.NDArray[np.bool_]:
        packed = self.take(-(-count // 8))
        bits = np.unpackbits(packed, bitorder="little")
        if bits[count:].any():
            raise WeightsError("there are bits beyond the last")
        return bits[:count].astype(np.bool_)

    def rice(self, parameters: Int64Array, limit: Int64Array) -> Int64Array:
        """As many values as there are parameters; each must be below its `limit`, which bounds what is computed."""
        unary = np.unpackbits(self.take(self.number()), bitorder="little")
        ends = np.flatnonzero(unary == 0)[: parameters.size]
        if ends.size < parameters.size:
            raise WeightsError(f"{parameters.size} values were promised, {ends.size} are there")
        if unary.size - 8 > ends.max(initial=-1):
            raise WeightsError("there are bits beyond the last")
        high = np.diff(ends, prepend=-1) - 1
        if (high > limit >> parameters).any():
            raise WeightsError("a value is beyond what it may be")
        values = high << parameters
        for place in range(int(parameters.max(initial=0))):
            having = np.flatnonzero(parameters > place)
            values[having] |= self.bits(having.size).astype(np.int64) << place
        if (values >= limit).any():
            raise WeightsError("a value is beyond what it may be")
        return values

    def end(self) -> None:
        if self.left:
            raise WeightsError(f"{self.left} bytes are left over")

    def take(self, size: int) -> ByteArray:
        if size > self.left:
            raise WeightsError(f"{size} more bytes were promised, {self.left} are there")
        self._at += size
        return self._data[self._at - size : self._at]


def best_parameter(values: Int64Array) -> int:
    """The Rice parameter with which `values` take the fewest bits."""
    guess = int(max(np.log2(max(float(values.mean()), 0.5) * np.log(2)), 0)) if values.size else 0
    near = range(max(guess - 1, 0), min(guess + 2, MAX_PARAMETER) + 1)
    return min(near, key=lambda k: int((values >> k).sum()) + k * values.size)
