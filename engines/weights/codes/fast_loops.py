"""The loops of `fast`, compiled by numba; `arrays` says what each of them does.

Every position is checked before it is read or written, whoever it came from.
"""

from typing import Any

import numpy as np

from engines.weights.codes.compiling import ascended, compiled
from engines.weights.codes.layout import BLOCK, ESCAPE, LARGEST, MOST_SKIPS, SKIP, Bits, Table
from engines.weights.codes.words import GROUP, lowest, pack_nibbles
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

NO_NIBBLE = LARGEST + 1
"""A step that is packed as 0, as the half of a byte is that belongs to no change."""


@compiled("uint64[::1], W[::1], uint64, uint16[:, ::1], uint8[::1], uint8[::1], W[::1]")
def _fast_encode(
    indices: Any, steps: Any, elements: Any, table: Any, gaps: Any, nibbles: Any, escapes: Any
) -> tuple[Any, Any, Any]:
    """Lengths of gaps, nibbles and escapes; the first is -1 if the positions do not ascend.

    Unsigned, as in `_diff`.  `nibbles` has room for GROUP more than there are: so many are written at once.
    """
    none, one, group, skip = np.uint64(0), np.uint64(1), np.uint64(GROUP), np.uint64(SKIP)
    k, num_gaps, num_nibbles, num_escapes = none, none, none, none
    size, padded = np.uint64(indices.size), np.empty(GROUP, steps.dtype)
    for block in range(np.uint64(table.shape[0])):
        following = block * np.uint64(BLOCK)
        end = min(following + np.uint64(BLOCK), elements)
        first, gaps_before, escapes_before = k, num_gaps, num_escapes
        while k < size:
            position = indices[k]
            if position >= end:
                break
            if position < following:
                return -1, 0, 0
            # one skip or none, whichever: at 1 % changed one gap of 13 has one, and would be mispredicted
            gap = position - following
            skipped = gap >= skip
            gaps[num_gaps] = skip
            num_gaps += np.uint64(skipped)
            gap -= skip if skipped else none
            while gap >= skip:
                gaps[num_gaps] = skip
                num_gaps += one
                gap -= skip
            gaps[num_gaps] = gap
            num_gaps += one
            following = position + one
            k += one
        for i in range(first, k, group):
            here = min(k - i, group)
            if here == group:
                large = pack_nibbles(steps, i, nibbles, num_nibbles)
            else:
                padded[:] = NO_NIBBLE
                for j in range(here):
                    padded[j] = steps[i + j]
                large = pack_nibbles(padded, none, nibbles, num_nibbles) & ((one << here) - one)
            num_nibbles += (here + one) >> one
            while large != 0:
                escapes[num_escapes] = steps[i + lowest(large)]
                num_escapes += one
                large &= large - one
        table[block, 0] = k - first
        table[block, 1] = num_gaps - gaps_before - (k - first)
        table[block, 2] = num_escapes - escapes_before
    return (np.int64(num_gaps) if k == size else -1), np.int64(num_nibbles), np.int64(num_escapes)


def fast_encode(indices: Int64Array, steps: Bits, elements: int) -> tuple[Table, ByteArray, ByteArray, Bits]:
    assert indices.size == steps.size
    blocks = -(-elements // BLOCK)
    table = np.empty((blocks, 3), np.uint16)
    gaps = np.empty(indices.size + blocks * MOST_SKIPS, np.uint8)
    nibbles = np.empty((indices.size + blocks + GROUP) // 2 + 1, np.uint8)
    escapes = np.empty(indices.size, steps.dtype)
    sizes = _fast_encode(indices.view(np.uint64), steps, elements, table, gaps, nibbles, escapes)
    ascended(sizes[0] >= 0, elements)
    return table, gaps[: sizes[0]], nibbles[: sizes[1]], escapes[: sizes[2]]


@compiled("uint16[:, ::1], uint8[::1], uint8[::1], W[::1], int64, int64, int64[::1], W[::1]")
def _fast_decode(
    table: Any, gaps: Any, nibbles: Any, escapes: Any, start: int, elements: int, indices: Any, steps: Any
) -> int:
    """0, or the number of what is wrong.  `indices` has room for one more than there are changes."""
    first = gap = nibble = escape = 0
    for block in range(table.shape[0]):
        begin = start + block * BLOCK
        position, end = begin, min(begin + BLOCK, elements)
        changed: Any = np.int64(table[block, 0])
        k, last, last_gap = first, first + changed, gap + changed + np.int64(table[block, 1])
        if last_gap > gap and gaps[last_gap - 1] == SKIP:
            return 1
        for i in range(gap, last_gap):
            distance = np.int64(gaps[i])
            indices[min(k, last)] = position + distance
            position += distance + (distance != SKIP)
            k += distance != SKIP
        if k != last:
            return 1
        if position > end:
            return 2
        gap = last_gap
        last_escape = escape + np.int64(table[block, 2])
        for i in range(changed):
            code = np.int64(nibbles[nibble + (i >> 1)] >> np.uint8(4 * (i & 1))) & 15
            step = code - (LARGEST + 1)
            if code == ESCAPE:
                if escape == last_escape:
                    return 3
                step = np.int64(escapes[escape])
                escape += 1
                if -LARGEST <= step <= LARGEST:
                    return 4
            elif step == 0:
                return 4
            steps[first + i] = step
        if escape != last_escape:
            return 3
        nibble += (changed + 1) >> 1
        if changed & 1 and nibbles[nibble - 1] > 15:
            return 4
        first = last
    return 0


PROBLEMS = (
    "",
    "a block has other changes than its table says",
    "a change lies beyond the end of its block",
    "a block has other escapes than its table says",
    "a step is not in the code that is meant for it",
    "the frame has more or fewer bytes than its table says",
    "the table has a block with more changes than elements",
)


def fast_decode(
    table: Table, gaps: ByteArray, nibbles: ByteArray, escapes: Bits, start: int, elements: int
) -> tuple[Int64Array, Bits]:
    changed = int(table[:, 0].sum(dtype=np.int64))
    indices, steps = np.empty(changed + 1, np.int64), np.empty(changed, escapes.dtype)
    problem = _fast_decode(table, gaps, nibbles, escapes, start, elements, indices, steps)
    if problem:
        raise WeightsError(PROBLEMS[problem])
    return indices[:changed], steps


@compiled("uint8[::1], int64[::1], int64[::1], int64[::1], int64, int64[::1]")
def _fast_counts(data: Any, starts: Any, ends: Any, elements: Any, width: int, counts: Any) -> int:
    """Changes of each frame; 0, or the number of what is wrong.  Nothing but the tables is looked at."""
    for frame in range(starts.size):
        at, blocks = starts[frame], (elements[frame] + BLOCK - 1) // BLOCK
        if 6 * blocks > ends[frame] - at:
            return 5
        count, size = 0, 6 * blocks
        for _ in range(blocks):
            changed: Any = np.int64(data[at]) | np.int64(data[at + 1]) << 8
            skips: Any = np.int64(data[at + 2]) | np.int64(data[at + 3]) << 8
            escaped: Any = np.int64(data[at + 4]) | np.int64(data[at + 5]) << 8
            if changed > BLOCK or skips > MOST_SKIPS or escaped > changed:
                return 6
            count += changed
            size += changed + skips + ((changed + 1) >> 1) + escaped * width
            at += 6
        if size != ends[frame] - starts[frame]:
            return 5
        counts[frame] = count
    return 0


@compiled("uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], W[::1]")
def _fast_decode_frames(data: Any, starts: Any, elements: Any, counts: Any, indices: Any, steps: Any) -> int:
    """As `_fast_decode`, of frames whose sizes fit their tables."""
    first, width = 0, steps.itemsize
    for frame in range(starts.size):
        at, blocks = starts[frame], (elements[frame] + BLOCK - 1) // BLOCK
        table = np.empty((blocks, 3), np.uint16)
        num_gaps: Any = 0
        num_nibbles: Any = 0
        num_escapes: Any = 0
        for block in range(blocks):
            for column in range(3):
                table[block, column] = np.uint16(data[at]) | np.uint16(data[at + 1]) << np.uint16(8)
                at += 2
            num_gaps += np.int64(table[block, 0]) + np.int64(table[block, 1])
            num_nibbles += (np.int64(table[block, 0]) + 1) >> 1
            num_escapes += np.int64(table[block, 2])
        gaps, at = data[at : at + num_gaps], at + num_gaps
        nibbles, at = data[at : at + num_nibbles], at + num_nibbles
        escapes = np.empty(num_escapes, steps.dtype)
        for i in range(num_escapes):
            value: Any = np.int64(0)
            for byte in range(width):
                value |= np.int64(data[at + byte]) << (8 * byte)
            escapes[i] = value  # what is too large for the width wraps around to its sign
            at += width
        last = first + counts[frame]
        problem = _fast_decode(
            table, gaps, nibbles, escapes, 0, elements[frame], indices[first : last + 1], steps[first:last]
        )
        if problem:
            return problem
        first = last
    return 0


def fast_decode_frames(
    data: ByteArray, starts: Int64Array, ends: Int64Array, elements: Int64Array, dtype: np.dtype[Any]
) -> tuple[Int64Array, Int64Array, Bits]:
    data = np.require(data, requirements=["C", "W"])
    counts = np.zeros(starts.size, np.int64)
    problem = _fast_counts(data, starts, ends, elements, dtype.itemsize, counts)
    if not problem:
        changed = int(counts.sum())
        indices, steps = np.empty(changed + 1, np.int64), np.empty(changed, dtype)
        problem = _fast_decode_frames(data, starts, elements, counts, indices, steps)
    if problem:
        raise WeightsError(PROBLEMS[problem])
    return counts, indices[:changed], steps
