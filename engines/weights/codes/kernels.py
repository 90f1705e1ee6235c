"""The loops over all elements, in the fastest form that this machine has.

`arrays` is numpy and says what each function does.  `loops` is the same in numba, five to ten times as fast; it is
taken where numba is installed.  Loaded at the first use, because numba takes half a second to import.
"""

import functools
import importlib.util
from typing import Protocol

from engines.weights.codes.layout import Bits, Table
from stream_rl.types import ByteArray, Int64Array


class Kernels(Protocol):
    """What `arrays` and `loops` have in common.  All arrays are flat and contiguous."""

    __name__: str

    def diff(self, old: Bits, new: Bits) -> tuple[Int64Array, Bits]: ...

    def apply(self, bits: Bits, indices: Int64Array, steps: Bits) -> None: ...

    def merge(
        self, first: Int64Array, first_steps: Bits, second: Int64Array, second_steps: Bits
    ) -> tuple[Int64Array, Bits]: ...

    def fast_encode(
        self, indices: Int64Array, steps: Bits, elements: int
    ) -> tuple[Table, ByteArray, ByteArray, Bits]: ...

    def fast_decode(
        self, table: Table, gaps: ByteArray, nibbles: ByteArray, escapes: Bits, start: int, elements: int
    ) -> tuple[Int64Array, Bits]: ...

    def ranks(self, base: Bits, bounds: Int64Array, indices: Int64Array) -> tuple[ByteArray, Int64Array]: ...

    def select(
        self, base: Bits, bounds: Int64Array, counts: Int64Array, ranks: Int64Array
    ) -> tuple[Int64Array, Int64Array]: ...


@functools.cache
def kernels() -> Kernels:
    """The module to use."""
    if importlib.util.find_spec("numba") is not None:
        from engines.weights.codes import loops

        return loops
    from engines.weights.codes import arrays

    return arrays
