"""The loops over all elements, in the fastest form that this machine has.

`arrays` is numpy and says what each function does.  `loops` is the same in numba, five to ten times as fast; it is
taken where numba is installed.  Loaded at the first use: numba takes half a second to import, and the first process on
a machine seconds to compile.
"""

import contextlib
import functools
import hashlib
import importlib.util
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from engines.weights.codes.layout import Bits, Table
from stream_rl.types import ByteArray, Int64Array

HERE = pathlib.Path(__file__).parent
PLACES = (str(HERE / "__pycache__"), "~/.cache/stream-rl")
"""For machine code.  Not a folder that others can write to: it is run."""


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

    def fast_decode_frames(
        self, data: ByteArray, starts: Int64Array, ends: Int64Array, elements: Int64Array, dtype: np.dtype[Any]
    ) -> tuple[Int64Array, Int64Array, Bits]: ...

    def locate(
        self,
        positions: Int64Array,
        values: Bits,
        spans: Int64Array,
        boxes: Int64Array,
        places: Int64Array,
        linear: Int64Array,
        kept: Bits,
    ) -> Int64Array: ...

    def ranks(self, base: Bits, bounds: Int64Array, indices: Int64Array) -> tuple[ByteArray, Int64Array]: ...

    def select(
        self, base: Bits, bounds: Int64Array, counts: Int64Array, ranks: Int64Array
    ) -> tuple[Int64Array, Int64Array]: ...

    def element_sum(self, seed: int, indices: Int64Array, bits: Bits) -> int: ...

    def run_sum(self, seed: int, start: int, bits: Bits) -> int: ...


@functools.cache
def kernels() -> Kernels:
    """The module to use."""
    if importlib.util.find_spec("numba") is not None:
        return _loops()
    from engines.weights.codes import arrays

    return arrays


def _loops() -> Kernels:
    """`loops`, with its machine code kept for the next process where there is a place for it."""
    import numba
    from llvmlite import binding

    # numba notices a change of one file only, and mixes up what processes write at the same time: so nothing is ever
    # written twice with different contents
    made_of = [numba.__version__, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    contents = [(HERE / f"{name}.py").read_bytes() for name in ("compiling", "fast_loops", "layout", "loops", "words")]
    key = hashlib.sha256(b"\0".join([*map(str.encode, made_of), *contents])).hexdigest()[:16]
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _writable(f"{place}/numba-{key}" for place in PLACES)
    try:
        from engines.weights.codes import loops
    finally:
        numba.config.CACHE_DIR = before
    return loops


def _writable(places: Iterable[str]) -> str:
    """The first of them that can be written to; "" if none can."""
    for place in places:
        with contextlib.suppress(OSError, RuntimeError):  # the latter where nobody has a home
            path = pathlib.Path(place).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            return str(path)
    return ""
