"""The pass over memory of `settling`, as a triton kernel."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _hash(linear, bits, BITS: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `fingerprint.hashes`."""
    x = linear + bits * BITS
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


# whether 16 divides begin and end must not matter: it would be compiled again in the middle of a run
@triton.jit(do_not_specialize=["begin", "end"])  # type: ignore[untyped-decorator]
def settle(  # type: ignore[no-untyped-def]
    arena, places, linear, values, new, gains, begin, end,
    DENSE: tl.constexpr, ANCHOR: tl.constexpr, LOW: tl.constexpr, FREE: tl.constexpr,
    BITS: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """New bits of the elements from `begin` to `end` of the changes; of each block, what the fingerprint gains.

    LOW: all bits of an element but its sign; FREE: bits by which it is narrower than the 64 that are computed with.
    """
    at = begin + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < end
    place = tl.load(places + at, mask=here, other=0)
    old = tl.load(arena + place, mask=here, other=0).to(tl.int64)
    after = tl.load(values + at, mask=here, other=0).to(tl.int64)
    if not DENSE:
        after += old ^ ((old >> 63) & LOW)
        after = (after << FREE) >> FREE
        after = after ^ ((after >> 63) & LOW)
    tl.store(new + at, after.to(new.dtype.element_ty), mask=here)
    so_far = tl.load(linear + at, mask=here, other=0)
    gain = _hash(so_far, after, BITS, MIX_1, MIX_2)
    if not ANCHOR:
        gain -= _hash(so_far, old, BITS, MIX_1, MIX_2)
    tl.store(gains + tl.program_id(0), tl.sum(tl.where(here, gain, 0), axis=0))
