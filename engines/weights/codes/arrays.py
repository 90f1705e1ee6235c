"""The loops over all elements, in numpy: what `loops` must agree with, and what runs where numba is not installed.

Functions that read what came over a wire raise WeightsError for what cannot be; so do the others for positions that
do not ascend within the tensor, which only a bug could bring about.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from engines.weights.codes.layout import (
    BLOCK,
    ESCAPE,
    HASH_BITS,
    HASH_INDEX,
    HASH_MIX_1,
    HASH_MIX_2,
    LARGEST,
    SKIP,
    Bits,
    Table,
)
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

STRIP = 1 << 17
"""Elements compared at once: what they are compared to is still in the cache when the few that differ are read."""


def diff(old: Bits, new: Bits) -> tuple[Int64Array, Bits]:
    """Positions where the two differ, and by how many steps."""
    found = []
    for start in range(0, old.size, STRIP):
        found.append(np.flatnonzero(old[start : start + STRIP] != new[start : start + STRIP]) + start)
    indices = np.concatenate(found) if found else np.empty(0, np.int64)
    return indices, _ordinal(new[indices]) - _ordinal(old[indices])


def apply(bits: Bits, indices: Int64Array, steps: Bits) -> None:
    """Move the elements at `indices` on by `steps`, in place."""
    check_positions(indices, bits.size)
    bits[indices] = _ordinal(_ordinal(bits[indices]) + steps)


def merge(first: Int64Array, first_steps: Bits, second: Int64Array, second_steps: Bits) -> tuple[Int64Array, Bits]:
    """Both differences as one: steps at the same position add up, and vanish if they come to 0."""
    indices = np.concatenate([first, second])
    order = np.argsort(indices, kind="stable")
    indices, steps = indices[order], np.concatenate([first_steps, second_steps])[order]
    twice = indices[1:] == indices[:-1]
    steps[:-1][twice] += steps[1:][twice]
    kept = steps != 0
    kept[1:] &= ~twice
    return indices[kept], steps[kept]


def fast_encode(indices: Int64Array, steps: Bits, elements: int) -> tuple[Table, ByteArray, ByteArray, Bits]:
    """Table, gaps, nibbles and escapes, as `fast` describes them."""
    check_positions(indices, elements)
    blocks = -(-elements // BLOCK)
    block = indices // BLOCK
    changed = np.bincount(block, minlength=blocks)
    first = np.cumsum(changed) - changed
    before = np.empty_like(indices)
    before[1:] = indices[:-1]
    nonempty = np.flatnonzero(changed)
    before[first[nonempty]] = nonempty * BLOCK - 1
    skips, rest = np.divmod(indices - before - 1, SKIP)
    gaps = np.full(indices.size + int(skips.sum()), SKIP, np.uint8)
    gaps[np.cumsum(skips + 1) - 1] = rest

    small = np.abs(steps.astype(np.int64)) <= LARGEST
    codes = np.where(small, steps + (LARGEST + 1), ESCAPE).astype(np.uint8)
    nibbles = np.zeros(int(((changed + 1) // 2).sum()) * 2, np.uint8)
    nibbles[_places(changed)] = codes
    table = np.stack([changed, _per_block(skips, block, blocks), _per_block(~small, block, blocks)], axis=1)
    packed = np.bitwise_or(nibbles[0::2], nibbles[1::2] << 4, dtype=np.uint8)
    return table.astype(np.uint16), gaps, packed, steps[~small]


def fast_decode(
    table: Table, gaps: ByteArray, nibbles: ByteArray, escapes: Bits, start: int, elements: int
) -> tuple[Int64Array, Bits]:
    """Positions and steps of the blocks in `table`, the first of which begins at element `start` of `elements`.

    The sizes of the streams have been checked against the table; what is in them has not.
    """
    changed, skips, escaped = table.astype(np.int64).T
    is_change = gaps != SKIP
    ends = np.cumsum(changed + skips)
    if (_running(is_change)[ends] != np.cumsum(changed)).any() or not is_change[ends[changed + skips > 0] - 1].all():
        raise WeightsError("a block has other changes than its table says")
    block = np.repeat(np.arange(len(table)), changed)
    begin = start + np.arange(len(table), dtype=np.int64) * BLOCK
    reached = _running(gaps.astype(np.int64) + is_change)
    indices = reached[1:][is_change] - 1 + (begin - reached[ends - changed - skips])[block]
    if (indices >= np.minimum(begin + BLOCK, elements)[block]).any():
        raise WeightsError("a change lies beyond the end of its block")

    places, codes = _places(changed), np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(-1)
    padding, codes = np.delete(codes, places), codes[places]
    escape = codes == ESCAPE
    if (_running(escape)[np.cumsum(changed)] != np.cumsum(escaped)).any():
        raise WeightsError("a block has other escapes than its table says")
    steps = (codes.astype(np.int8) - (LARGEST + 1)).astype(escapes.dtype)
    steps[escape] = escapes
    if padding.any() or not steps.all() or (np.abs(escapes.astype(np.int64)) <= LARGEST).any():
        raise WeightsError("a step is not in the code that is meant for it")
    return indices, steps


def fast_decode_frames(
    data: ByteArray, starts: Int64Array, ends: Int64Array, elements: Int64Array, dtype: np.dtype[Any]
) -> tuple[Int64Array, Int64Array, Bits]:
    """How many changes each frame data[start:end] has, of a tensor of so many elements; positions in their tensors and
    steps of all of them, frame after frame.  `dtype`: of the steps."""
    from engines.weights.codes import fast  # it asks for these functions itself

    found = []
    for start, end, size in zip(starts.tolist(), ends.tolist(), elements.tolist(), strict=True):
        streams = fast.streams(data[start:end], dtype.itemsize, size, range(fast.num_blocks(size)))
        found.append(fast_decode(*streams, 0, size))
    indices, steps = [np.empty(0, np.int64)], [np.empty(0, dtype)]
    return (
        np.array([each.size for each, _ in found], np.int64),
        np.concatenate(indices + [each for each, _ in found]),
        np.concatenate(steps + [each for _, each in found]),
    )


def locate(
    positions: Int64Array,
    values: Bits,
    spans: Int64Array,
    boxes: Int64Array,
    places: Int64Array,
    linear: Int64Array,
    kept: Bits,
) -> Int64Array:
    """Where changes of slices of tensors go in live memory that holds boxes of them.

    spans       [segments, 2]: the first and the number of the positions that are of one slice and may be in one box;
                within a span they ascend, and spans may share some
    boxes       [segments, 7]: position 0 of the slice as counted from the box; positions from the box's first element
                to its last; its stride and columns; stride in live memory, place there; seed
    places, linear, kept   written from the front: place, hash so far (fingerprint.linear) and value of what is there

    Returns how many of each segment are there.
    """
    firsts, counts = spans.T
    of = np.repeat(np.arange(counts.size), counts)
    chosen = np.arange(of.size) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    position, (shift, extent, stride, columns, live_stride, live, seed) = positions[chosen], boxes.T[:, of]
    row, column = np.divmod(position + shift, stride)
    here = (row >= 0) & (position + shift < extent) & (column < columns)
    count = int(here.sum())
    places[:count] = (live + row * live_stride + column)[here]
    linear[:count] = (position.view(np.uint64) * HASH_INDEX + seed.view(np.uint64)).view(np.int64)[here]
    kept[:count] = values[chosen[here]]
    found: Int64Array = np.bincount(of[here], minlength=counts.size).astype(np.int64)
    return found


def ranks(base: Bits, bounds: Int64Array, indices: Int64Array) -> tuple[ByteArray, Int64Array]:
    """Class of each position, and its number among the elements of that class.

    An element is in the last class whose bound its magnitude reaches; `bounds` ascend from 0.
    """
    check_positions(indices, base.size)
    classes = _classes(base, bounds)
    found, rank = classes[indices], np.empty(indices.size, np.int64)
    for c in range(bounds.size):
        here = found == c
        if here.any():
            rank[here] = np.searchsorted(np.flatnonzero(classes == c), indices[here])
    return found, rank


def select(base: Bits, bounds: Int64Array, counts: Int64Array, ranks: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Inverse of `ranks`: `counts` of them are of each class, class by class and ascending.

    Gives the positions, ascending, and for each where it stood in `ranks`.
    """
    classes = _classes(base, bounds)
    found, start = np.empty(ranks.size, np.int64), 0
    for c, count in enumerate(counts.tolist()):
        if count:
            members, of_class = np.flatnonzero(classes == c), ranks[start : start + count]
            if of_class[0] < 0 or of_class[-1] >= members.size or (of_class[1:] <= of_class[:-1]).any():
                raise WeightsError("the changes of a class do not ascend among its elements")
            found[start : start + count] = members[of_class]
            start += count
    order = np.argsort(found, kind="stable")
    return found[order], order


def element_sum(seed: int, indices: Int64Array, bits: Bits) -> int:
    """Sum of the fingerprint's hashes of elements of a tensor, mod 2^64."""
    total = 0
    for start in range(0, indices.size, STRIP):
        strip = slice(start, start + STRIP)
        x = indices[strip].astype(np.uint64) * HASH_INDEX + bits[strip].astype(np.int64).view(np.uint64) * HASH_BITS
        x += np.uint64(seed % (1 << 64))
        x = (x ^ (x >> np.uint64(30))) * HASH_MIX_1
        x = (x ^ (x >> np.uint64(27))) * HASH_MIX_2
        x ^= x >> np.uint64(31)
        total += int(x.sum(dtype=np.uint64))
    return total % (1 << 64)


def run_sum(seed: int, start: int, bits: Bits) -> int:
    """The same for elements that follow each other from position `start`."""
    strips = range(0, bits.size, STRIP)
    return sum(
        element_sum(seed, np.arange(start + i, start + min(i + STRIP, bits.size)), bits[i : i + STRIP]) for i in strips
    ) % (1 << 64)


def check_positions(indices: Int64Array, elements: int) -> None:
    if indices.size and not (indices[0] >= 0 and indices[-1] < elements and bool((indices[1:] > indices[:-1]).all())):
        raise WeightsError(f"positions must ascend below {elements}")


def _classes(base: Bits, bounds: Int64Array) -> ByteArray:
    magnitudes = base & np.iinfo(base.dtype).max
    classes = np.zeros(base.size, np.uint8)
    for bound in bounds[1:].tolist():
        classes += magnitudes >= bound
    return classes


def _places(changed: Int64Array) -> Int64Array:
    """Where the nibbles of blocks of so many changes are, when each block begins with a whole byte."""
    room = (changed + 1) // 2 * 2
    shift = (np.cumsum(room) - room) - (np.cumsum(changed) - changed)
    places: Int64Array = np.arange(int(changed.sum())) + np.repeat(shift, changed)
    return places


def _per_block(values: npt.NDArray[Any], block: Int64Array, blocks: int) -> Int64Array:
    sums: Int64Array = np.bincount(block, weights=values, minlength=blocks).astype(np.int64)
    return sums


def _running(values: npt.NDArray[Any]) -> Int64Array:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])


def _ordinal(bits: Bits) -> Bits:
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)
