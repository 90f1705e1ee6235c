"""64 elements at once as the bits of one word, for the compiled loops: what numba has no Python for, in LLVM's terms.

LLVM makes of them what the processor has: one or two instructions with AVX-512, a dozen without.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

GROUP = 64


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


@intrinsic  # type: ignore[untyped-decorator]
def differing(typing: Any, a: Any, b: Any, start: Any) -> Any:
    """Bit i: a[start + i] != b[start + i]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_vector(context, builder, a, array, arguments[2]) for array in arguments[:2])
        return builder.bitcast(builder.icmp_unsigned("!=", left, right), ir.IntType(64))

    return numba.uint64(a, b, numba.int64), generate


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
def lowest(typing: Any, word: Any) -> Any:
    """Number of the lowest bit that is set in a word that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return numba.int64(numba.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(typing: Any, word: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.int64(numba.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing: Any, array: Any, place: Any) -> Any:
    """Ask for array[place] to be in the cache soon.  Harmless wherever that is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(1), number(3), number(1)])

    return numba.void(array, numba.int64), generate
