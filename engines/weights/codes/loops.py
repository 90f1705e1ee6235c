"""The loops over all elements, compiled by numba; `arrays` says what each of them does.

Elements are looked at 64 at a time: one vector comparison gives one word of bits, and only the few bits that are set
are followed up.  Every position is checked before it is read or written, whoever it came from.

Importing this compiles everything, or loads it from where `kernels` has numba keep it.
"""

from typing import Any

import numpy as np

from engines.weights.codes.compiling import ascended, compiled
from engines.weights.codes.fast_loops import fast_decode as fast_decode
from engines.weights.codes.fast_loops import fast_decode_frames as fast_decode_frames
from engines.weights.codes.fast_loops import fast_encode as fast_encode
from engines.weights.codes.layout import (
    HASH_BITS,
    HASH_INDEX,
    HASH_MIX_1,
    HASH_MIX_2,
    MAX_CLASSES,
    Bits,
)
from engines.weights.codes.words import GROUP, differing, fetch, fetch_group, lowest, ones, reaching
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

AHEAD = 16
"""Changes between asking for an element and changing it: without it each waits for memory in its turn."""
STRIP = 128
"""Elements compared before those that differ are followed up: both versions are in the first-level cache then, and
memory is read on, because the processor begins the next strip before this one is done."""
SOON = 1024
"""Bytes ahead of the comparison at which both versions are asked for.  Twice as many are slower than none."""
LEAST_ROOM = 4096
"""Differences that there is room for at first."""


# -- differences ------------------------------------------------------------------------------------------------------


@compiled("W[::1], W[::1], uint64")
def _step(old: Any, new: Any, place: Any) -> Any:
    low, before, after = (1 << (8 * old.itemsize - 1)) - 1, np.int64(old[place]), np.int64(new[place])
    return (after ^ ((after >> 63) & low)) - (before ^ ((before >> 63) & low))


@compiled("W[::1], W[::1], uint64, uint64[::1], W[::1]")
def _diff(old: Any, new: Any, start: Any, indices: Any, steps: Any) -> tuple[Any, Any]:
    """How many differences were found, and the element after the last that was looked at: stops for want of room.

    All that counts is unsigned: of a signed number numba asks at every use whether it is to be taken from the end.
    """
    strip, group, one, soon = np.uint64(STRIP), np.uint64(GROUP), np.uint64(1), np.uint64(SOON // old.itemsize)
    count, size, room = np.uint64(0), np.uint64(old.size), np.uint64(indices.size)
    words, places = np.empty(STRIP // GROUP, np.uint64), np.empty(STRIP // GROUP, np.uint64)
    while start + strip <= size and count + strip <= room:
        num_words = np.uint64(0)
        for place in range(start, start + strip, group):
            fetch_group(old, place + soon)
            fetch_group(new, place + soon)
            word = differing(old, new, place)  # asked for by name below: what was just stored takes long to read back
            words[num_words], places[num_words] = word, place
            num_words += np.uint64(word != 0)
        for i in range(num_words):
            # one bit or two, whichever: a loop over so few would be mispredicted at every third word
            word, place = words[i], places[i]
            rest = word & (word - one)
            first, second = place + lowest(word), place + lowest(rest if rest != 0 else word)
            indices[count], steps[count] = first, _step(old, new, first)
            indices[count + one], steps[count + one] = second, _step(old, new, second)
            count += one + np.uint64(rest != 0)
            rest &= rest - one
            while rest != 0:
                third = place + lowest(rest)
                indices[count], steps[count] = third, _step(old, new, third)
                rest &= rest - one
                count += one
        start += strip
    if size - start < strip and count + size - start <= room:
        for j in range(start, size):
            indices[count], steps[count] = j, _step(old, new, j)
            count += np.uint64(old[j] != new[j])
        start = size
    return count, start


def diff(old: Bits, new: Bits) -> tuple[Int64Array, Bits]:
    assert old.size == new.size
    pieces, start, room = [], 0, max(LEAST_ROOM, old.size // 64)
    while start < old.size:
        indices, steps = np.empty(room, np.int64), np.empty(room, old.dtype)
        count, start = _diff(old, new, start, indices.view(np.uint64), steps)
        pieces.append((indices[:count], steps[:count]))
        room = max(LEAST_ROOM, count * (old.size - start) // start * 5 // 4)
    if len(pieces) == 1:
        return pieces[0]
    empty = (np.empty(0, np.int64), np.empty(0, old.dtype))
    return np.concatenate([empty[0], *(p[0] for p in pieces)]), np.concatenate([empty[1], *(p[1] for p in pieces)])


@compiled("W[::1], int64[::1], W[::1]")
def _apply(bits: Any, indices: Any, steps: Any) -> bool:
    low, free = (1 << (8 * bits.itemsize - 1)) - 1, 64 - 8 * bits.itemsize
    previous, last = -1, indices.size - 1
    for k in range(indices.size):
        j = indices[k]
        if j <= previous or j >= bits.size:
            return False
        fetch(bits, indices[min(k + AHEAD, last)])
        before = np.int64(bits[j])
        after = (before ^ ((before >> 63) & low)) + steps[k]
        after = (after << free) >> free
        bits[j] = after ^ ((after >> 63) & low)
        previous = j
    return True


def apply(bits: Bits, indices: Int64Array, steps: Bits) -> None:
    assert indices.size == steps.size
    ascended(_apply(bits, indices, steps), bits.size)


@compiled("int64[::1], W[::1], int64[::1], W[::1], int64[::1], W[::1]")
def _merge(a: Any, a_steps: Any, b: Any, b_steps: Any, indices: Any, steps: Any) -> int:
    i = j = count = 0
    while i < a.size or j < b.size:
        if j == b.size or (i < a.size and a[i] < b[j]):
            indices[count], steps[count] = a[i], a_steps[i]
            i += 1
            count += 1
        elif i == a.size or b[j] < a[i]:
            indices[count], steps[count] = b[j], b_steps[j]
            j += 1
            count += 1
        else:
            indices[count], steps[count] = a[i], a_steps[i] + b_steps[j]
            count += steps[count] != 0
            i += 1
            j += 1
    return count


def merge(first: Int64Array, first_steps: Bits, second: Int64Array, second_steps: Bits) -> tuple[Int64Array, Bits]:
    room = first.size + second.size + 1
    indices, steps = np.empty(room, np.int64), np.empty(room, first_steps.dtype)
    count = _merge(first, first_steps, second, second_steps, indices, steps)
    return indices[:count], steps[:count]


@compiled("int64[::1], W[::1], int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], W[::1], int64[::1]")
def _locate(
    positions: Any, values: Any, spans: Any, boxes: Any, places: Any, linear: Any, kept: Any, found: Any
) -> Any:
    at = 0
    for segment in range(spans.shape[0]):
        first, count = spans[segment]
        shift, extent, stride, columns, live_stride, live, seed = boxes[segment]
        if first < 0 or count < 0 or stride < 1 or first + count > positions.size or at + count > places.size:
            return False
        begin = at
        row = 0  # where the current one begins, as counted from the box
        for k in range(first, first + count):
            within = positions[k] + shift
            if within - row >= stride:
                rows = (within - row) // stride
                row, live = row + rows * stride, live + rows * live_stride
            places[at] = live + within - row
            linear[at] = np.int64(np.uint64(positions[k]) * HASH_INDEX + np.uint64(seed))
            kept[at] = values[k]
            at += 0 <= within < extent and within - row < columns
        found[segment] = at - begin
    return True


def locate(
    positions: Int64Array,
    values: Bits,
    spans: Int64Array,
    boxes: Int64Array,
    places: Int64Array,
    linear: Int64Array,
    kept: Bits,
) -> Int64Array:
    assert positions.size == values.size and places.size == linear.size == kept.size
    assert spans.shape == (len(boxes), 2) and boxes.shape[1] == 7
    found = np.empty(len(boxes), np.int64)
    if not _locate(positions, values, spans, boxes, places, linear, kept, found):
        raise WeightsError("the segments have other positions than are here")
    return found


# -- classes ----------------------------------------------------------------------------------------------------------


@compiled("int64, int64[::1]")
def _class_of(magnitude: Any, bounds: Any) -> Any:
    found = bounds.size - 1
    while found > 0 and magnitude < bounds[found]:
        found -= 1
    return found


@compiled("W[::1], int64[::1], int64[::1], uint8[::1], int64[::1]")
def _ranks(base: Any, bounds: Any, indices: Any, classes: Any, ranks: Any) -> Any:
    low = (1 << (8 * base.itemsize - 1)) - 1
    seen = np.zeros(bounds.size, np.int64)
    above = np.zeros(bounds.size + 1, np.uint64)
    above[0] = ~np.uint64(0)
    previous, k = -1, 0
    whole = base.size // GROUP * GROUP
    for start in range(0, whole, GROUP):
        for c in range(1, bounds.size):
            above[c] = reaching(base, start, bounds[c])
        while k < indices.size and indices[k] < start + GROUP:
            j = indices[k]
            if j <= previous:
                return False
            bit = np.uint64(1) << np.uint64(j - start)
            c = bounds.size - 1
            while not above[c] & bit:
                c -= 1
            classes[k] = c
            ranks[k] = seen[c] + ones(above[c] & ~above[c + 1] & (bit - np.uint64(1)))
            previous = j
            k += 1
        for c in range(bounds.size):
            seen[c] += ones(above[c] & ~above[c + 1])
    for j in range(whole, base.size):
        c = _class_of(np.int64(base[j]) & low, bounds)
        if k < indices.size and indices[k] == j:
            classes[k], ranks[k] = c, seen[c]
            k += 1
        seen[c] += 1
    return k == indices.size


def ranks(base: Bits, bounds: Int64Array, indices: Int64Array) -> tuple[ByteArray, Int64Array]:
    assert 0 < bounds.size <= MAX_CLASSES
    classes, found = np.empty(indices.size, np.uint8), np.empty(indices.size, np.int64)
    ascended(_ranks(base, bounds, indices, classes, found), base.size)
    return classes, found


@compiled("W[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1]")
def _select(base: Any, bounds: Any, following: Any, ends: Any, ranks: Any, indices: Any, order: Any) -> Any:
    """`following`: for each class, which of `ranks` comes next."""
    low = (1 << (8 * base.itemsize - 1)) - 1
    seen = np.zeros(bounds.size, np.int64)
    above = np.zeros(bounds.size + 1, np.uint64)
    above[0] = ~np.uint64(0)
    origin = np.empty(GROUP, np.int64)
    count = 0
    whole = base.size // GROUP * GROUP
    for start in range(0, whole, GROUP):
        for c in range(1, bounds.size):
            above[c] = reaching(base, start, bounds[c])
        chosen = np.uint64(0)
        for c in range(bounds.size):
            members = above[c] & ~above[c + 1]
            rank, end = seen[c], seen[c] + ones(members)
            k = following[c]
            while k < ends[c] and ranks[k] < end:
                if ranks[k] < rank:
                    return False
                while rank < ranks[k]:
                    members &= members - np.uint64(1)
                    rank += 1
                bit = lowest(members)
                members &= members - np.uint64(1)
                rank += 1
                chosen |= np.uint64(1) << np.uint64(bit)
                origin[bit] = k
                k += 1
            following[c], seen[c] = k, end
        while chosen != 0:
            bit = lowest(chosen)
            chosen &= chosen - np.uint64(1)
            indices[count], order[count] = start + bit, origin[bit]
            count += 1
    for j in range(whole, base.size):
        c = _class_of(np.int64(base[j]) & low, bounds)
        k = following[c]
        if k < ends[c] and ranks[k] == seen[c]:
            indices[count], order[count] = j, k
            count += 1
            following[c] += 1
        seen[c] += 1
    return count == ranks.size


def select(base: Bits, bounds: Int64Array, counts: Int64Array, ranks: Int64Array) -> tuple[Int64Array, Int64Array]:
    assert 0 < bounds.size == counts.size <= MAX_CLASSES and int(counts.sum()) == ranks.size
    ends = np.cumsum(counts)
    indices, order = np.empty(ranks.size, np.int64), np.empty(ranks.size, np.int64)
    if not _select(base, bounds, ends - counts, ends, ranks, indices, order):
        raise WeightsError("the changes of a class do not ascend among its elements")
    return indices, order


# -- fingerprints -----------------------------------------------------------------------------------------------------


@compiled("int64, int64[::1], W[::1]")
def _element_sum(seed: int, indices: Any, bits: Any) -> Any:
    total = np.uint64(0)
    for k in range(indices.size):
        x = np.uint64(indices[k]) * HASH_INDEX + np.uint64(np.int64(bits[k])) * HASH_BITS + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * HASH_MIX_1
        x = (x ^ (x >> np.uint64(27))) * HASH_MIX_2
        total += x ^ (x >> np.uint64(31))
    return total


def element_sum(seed: int, indices: Int64Array, bits: Bits) -> int:
    assert indices.size == bits.size
    return int(_element_sum(seed, indices, bits))


@compiled("int64, int64, W[::1]")
def _run_sum(seed: int, start: int, bits: Any) -> Any:
    total = np.uint64(0)
    for k in range(bits.size):
        x = np.uint64(start + k) * HASH_INDEX + np.uint64(np.int64(bits[k])) * HASH_BITS + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * HASH_MIX_1
        x = (x ^ (x >> np.uint64(27))) * HASH_MIX_2
        total += x ^ (x >> np.uint64(31))
    return total


def run_sum(seed: int, start: int, bits: Bits) -> int:
    return int(_run_sum(seed, start, bits))
