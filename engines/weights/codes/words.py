"""64 elements at once as the bits of one word, for the compiled loops: what numba has no Python for, in LLVM's terms.

LLVM makes of them what the processor has: one or two instructions with AVX-512, a dozen without.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from engines.weights.codes.layout import ESCAPE, LARGEST

GROUP = 64
CACHE_LINE = 64
"""Bytes."""


def _vector(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """64 elements of an array from `start`."""
    element = context.get_data_type(kind.dtype)
    address = builder.gep(context.make_array(kind)(context, builder, array).data, [start])
    vector = ir.VectorType(element, GROUP).as_pointer()
    return builder.load(builder.bitcast(address, vector), align=kind.dtype.bitwidth // 8)


def _filled(builder: Any, value: Any, width: int) -> Any:
    """`value` as each of 64 elements."""
    vector = ir.VectorType(ir.IntType(width), GROUP)
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), builder.trunc(value, ir.IntType(width)), ir.Constant(ir.IntType(32), 0)
    )
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP)
    )


def _each(vector: Any, value: int) -> Any:
    """`value` as each element of a vector of this type."""
    return ir.Constant(vector, [value] * vector.count)


def _every_other(builder: Any, vector: Any, first: int) -> Any:
    """Elements `first`, `first` + 2, ..."""
    wanted = list(range(first, GROUP, 2))
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(wanted)), wanted)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


@intrinsic  # type: ignore[untyped-decorator]
def differing(typing: Any, a: Any, b: Any, start: Any) -> Any:
    """Bit i: a[start + i] != b[start + i]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_vector(context, builder, a, array, arguments[2]) for array in arguments[:2])
        return builder.bitcast(builder.icmp_unsigned("!=", left, right), ir.IntType(64))

    return numba.uint64(a, b, start), generate


@intrinsic  # type: ignore[untyped-decorator]
def reaching(typing: Any, a: Any, start: Any, bound: Any) -> Any:
    """Bit i: a[start + i] without its sign >= bound."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = a.dtype.bitwidth
        low = _filled(builder, ir.Constant(ir.IntType(64), (1 << (width - 1)) - 1), width)
        magnitudes = builder.and_(_vector(context, builder, a, arguments[0], arguments[1]), low)
        reached = builder.icmp_unsigned(">=", magnitudes, _filled(builder, arguments[2], width))
        return builder.bitcast(reached, ir.IntType(64))

    return numba.uint64(a, numba.int64, numba.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pack_nibbles(typing: Any, steps: Any, start: Any, nibbles: Any, place: Any) -> Any:
    """Write 64 steps from `start` as the 32 bytes from nibbles[place].  Bit i: steps[start + i] is an escape."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, target, byte = arguments
        values = _vector(context, builder, steps, array, first)
        fits = builder.icmp_unsigned(
            "<", builder.add(values, _each(values.type, LARGEST)), _each(values.type, 2 * LARGEST + 1)
        )
        moved = builder.add(values, _each(values.type, LARGEST + 1))
        codes = builder.select(fits, moved, _each(values.type, ESCAPE))
        codes = builder.trunc(codes, ir.VectorType(ir.IntType(8), GROUP))
        low, high = (_every_other(builder, codes, odd) for odd in (0, 1))
        packed = builder.or_(low, builder.shl(high, _each(high.type, 4)))
        address = builder.gep(context.make_array(nibbles)(context, builder, target).data, [byte])
        builder.store(packed, builder.bitcast(address, packed.type.as_pointer()), align=1)
        return builder.bitcast(builder.not_(fits), ir.IntType(64))

    return numba.uint64(steps, start, nibbles, place), generate


@intrinsic  # type: ignore[untyped-decorator]
def lowest(typing: Any, word: Any) -> Any:
    """Number of the lowest bit that is set in a word that is not 0.

    A short number: numba adds it to signed and to unsigned ones without making floats of them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.trunc(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(8))

    return numba.uint8(numba.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(typing: Any, word: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.int64(numba.uint64), generate


def _prefetch(context: Any, builder: Any, kind: Any, array: Any, place: Any, write: int, locality: int) -> None:
    """LLVM's hint; `locality` is 3 for the first-level cache, 2 for the second."""
    number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    address = builder.bitcast(builder.gep(context.make_array(kind)(context, builder, array).data, [place]), byte)
    signature = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [address, number(write), number(locality), number(1)])


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing: Any, array: Any, place: Any) -> Any:
    """Ask for array[place], to be changed soon, to be in the cache.  Harmless wherever that is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, place = arguments
        _prefetch(context, builder, array, elements, place, write=1, locality=3)

    return numba.void(array, numba.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_group(typing: Any, array: Any, start: Any) -> Any:
    """Ask for 64 elements from `start`, to be read soon, to be in the second-level cache.  Harmless wherever that is.

    Asked for in the first-level cache, they made a comparison of 32 MiB a quarter slower than it is without.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, start = arguments
        a_line = CACHE_LINE // (array.dtype.bitwidth // 8)
        for ahead in range(0, GROUP, a_line):
            place = builder.add(start, ir.Constant(ir.IntType(64), ahead))
            _prefetch(context, builder, array, elements, place, write=0, locality=2)

    return numba.void(array, numba.uint64), generate
