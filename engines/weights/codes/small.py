"""The code for links between sites: small, because whoever decodes it holds the weights that it applies to.

An optimizer moves all weights by about the same distance, and a weight changes when that carries it over a rounding
boundary, so the chance halves with each exponent.  Elements are therefore divided into classes of neighbouring
exponents of the old weights, which cost nothing to send.  Within a class changes are as good as independent, and each
of the questions below has one chance for the whole class, which is what a Rice parameter states:

    which elements of the class changed         gaps between them
    which way                                   a bit each
    which changes are larger than one step      gaps between them
    by how much                                 the excess; its tail in full

All values of one question are coded together, class by class.  The header is 60 to 120 bytes, so short tensors are
better coded together.
"""

import zlib

import numpy as np
import numpy.typing as npt

from engines.weights.codes.bitstreams import MAX_PARAMETER, Reader, Writer, best_parameter
from engines.weights.codes.kernels import kernels
from engines.weights.codes.layout import MAX_CLASSES, Bits
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray, Int64Array

LONGEST = 15
"""Ones of an excess; a larger one is in the tail."""
HEADER_BITS = 48.0
"""What a class costs, about."""
EXPONENTS_SEEN = 1 << 16
"""Old exponents looked at to choose the classes, about."""


def encode(base: Bits, indices: Int64Array, steps: Bits, mantissa: int) -> list[ByteArray]:
    """Buffers whose bytes are the code: `steps` at `indices` of `base`, floats of so many bits of mantissa."""
    exponents = _class_starts(base, indices, steps, mantissa)
    bounds = np.array(exponents, np.int64) << mantissa
    classes, ranks = kernels().ranks(base, bounds, indices)
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=bounds.size)
    steps, of_class = steps[order], classes[order]
    magnitudes = np.abs(steps.astype(np.int64))
    larger = np.flatnonzero(magnitudes > 1)
    larger_counts = np.bincount(of_class[larger], minlength=bounds.size)
    excess = magnitudes[larger] - 2
    parameters = [_excess_parameter(part) for part in _divided(excess, larger_counts)]
    places = np.repeat(np.array(parameters), larger_counts)
    in_tail = excess >> places >= LONGEST

    writer = Writer()
    writer.array(np.array([zlib.crc32(base.data)], "<u4"))
    writer.numbers(len(exponents), *exponents, *parameters)
    _write_subset(writer, counts, ranks[order])
    writer.bits(steps < 0)
    _write_subset(writer, larger_counts, larger - np.repeat(np.cumsum(counts) - counts, larger_counts))
    writer.rice(np.where(in_tail, LONGEST << places, excess), places)
    writer.array(excess[in_tail].astype(f"<u{base.itemsize}"))
    return writer.pieces


def decode(code: ByteArray, base: Bits, mantissa: int) -> tuple[Int64Array, Bits]:
    """Positions and steps.  Raises WeightsError if `base` is not what was encoded against, or `code` not what `encode`
    makes."""
    reader = Reader(code)
    if int(reader.array(1, "<u4")[0]) != zlib.crc32(base.data):
        raise WeightsError("the update was made for other weights than these: it needs the base that it names")
    num_classes = reader.number()
    if not 0 < num_classes <= MAX_CLASSES:
        raise WeightsError(f"there are 1 to {MAX_CLASSES} classes, got {num_classes}")
    exponents = [reader.number() for _ in range(num_classes)]
    parameters = [reader.number() for _ in range(num_classes)]
    if exponents[0] or sorted(set(exponents)) != exponents or exponents[-1] >> 8 * base.itemsize - 1 - mantissa:
        raise WeightsError(f"classes ascend from exponent 0, got {exponents}")
    if max(parameters) > MAX_PARAMETER:
        raise WeightsError(f"a parameter is at most {MAX_PARAMETER}, got {max(parameters)}")
    counts, ranks = _read_subset(reader, np.full(num_classes, base.size), base.size)
    down = reader.bits(ranks.size)
    larger_counts, larger = _read_subset(reader, counts, ranks.size)
    larger += np.repeat(np.cumsum(counts) - counts, larger_counts)
    places = np.repeat(np.array(parameters), larger_counts)
    excess = reader.rice(places, (LONGEST << places) + 1)
    in_tail = excess >> places == LONGEST
    excess[in_tail] = reader.array(int(in_tail.sum()), f"<u{base.itemsize}")
    reader.end()
    if excess.max(initial=0) + 2 > 1 << 8 * base.itemsize - 1:
        raise WeightsError(f"a step has more than {8 * base.itemsize} bits")
    magnitudes = np.ones(ranks.size, np.int64)
    magnitudes[larger] = excess + 2
    bounds = np.array(exponents, np.int64) << mantissa
    indices, order = kernels().select(base, bounds, counts, ranks)
    return indices, np.where(down, -magnitudes, magnitudes).astype(base.dtype)[order]


def _write_subset(writer: Writer, counts: Int64Array, members: Int64Array) -> None:
    """Which members of each class: `counts` of them, numbered within their class, ascending."""
    starts = np.cumsum(counts) - counts
    gaps = np.diff(members, prepend=-1) - 1
    first = starts[counts > 0]
    gaps[first] = members[first]
    parameters = [best_parameter(part) for part in _divided(gaps, counts)]
    for count, parameter in zip(counts.tolist(), parameters, strict=True):
        writer.numbers(*([count, parameter] if count else [0]))
    writer.rice(gaps, np.repeat(np.array(parameters), counts))


def _read_subset(reader: Reader, sizes: Int64Array, most: int) -> tuple[Int64Array, Int64Array]:
    """Counts and members: each below the size of its class, and at most so many in all."""
    counts, parameters = np.zeros(sizes.size, np.int64), np.zeros(sizes.size, np.int64)
    for c in range(sizes.size):
        counts[c] = min(reader.number(), most + 1)
        parameters[c] = min(reader.number(), MAX_PARAMETER + 1) if counts[c] else 0
    if counts.sum() > most or parameters.max() > MAX_PARAMETER:
        raise WeightsError(f"{counts.tolist()} of {sizes.tolist()}, with parameters {parameters.tolist()}")
    if counts.sum() > 8 * reader.left:  # before anything of that size is made
        raise WeightsError(f"{counts.sum()} values were promised, and {reader.left} bytes are there")
    limits = np.repeat(sizes, counts)
    members = np.cumsum(reader.rice(np.repeat(parameters, counts), limits) + 1) - 1
    before = np.concatenate([[-1], members])[np.cumsum(counts) - counts] + 1
    members -= np.repeat(before, counts)
    if (members >= limits).any():
        raise WeightsError("a change lies beyond the last element of its class")
    return counts, members


def _divided(values: Int64Array, counts: Int64Array) -> list[Int64Array]:
    return np.split(values, np.cumsum(counts)[:-1])


def _excess_parameter(excess: Int64Array) -> int:
    """The Rice parameter with which these take the fewest bits."""
    return min(range(16), key=lambda k: _excess_bits(excess, k))


def _excess_bits(excess: Int64Array, parameter: int) -> int:
    """With what is in the tail counted at 32 bits."""
    high = excess >> parameter
    return int(np.where(high < LONGEST, high, LONGEST + 32).sum()) + (parameter + 1) * excess.size


def _class_starts(base: Bits, indices: Int64Array, steps: Bits, mantissa: int) -> list[int]:
    """First exponent of each class: neighbours are joined as long as that costs fewer bits than a class."""
    patterns = 1 << (8 * base.itemsize - 1 - mantissa)
    stride = max(base.size // EXPONENTS_SEEN, 1)
    of_changed = _exponents(base[indices], mantissa)
    changed = np.bincount(of_changed, minlength=patterns).astype(np.float64)
    elements = np.bincount(_exponents(base[::stride], mantissa), minlength=patterns) * float(stride)
    distance = np.bincount(of_changed, weights=np.minimum(np.abs(steps.astype(np.int64)), 256), minlength=patterns)
    elements = np.maximum(elements, changed)
    present = np.flatnonzero(elements)
    starts = [0, *present[1:].tolist()]
    rows = np.stack([elements, changed, distance], axis=1)[present]
    while len(starts) > 1:
        joined = rows[:-1] + rows[1:]
        own = _bits(rows)
        loss = _bits(joined) - own[:-1] - own[1:]
        best = int(loss.argmin())
        if len(starts) <= MAX_CLASSES and loss[best] > HEADER_BITS:
            break
        rows = np.concatenate([rows[:best], joined[best : best + 1], rows[best + 2 :]])
        del starts[best + 1]
    return starts


def _exponents(bits: Bits, mantissa: int) -> Bits:
    return (bits & np.iinfo(bits.dtype).max) >> mantissa


def _bits(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bits that classes of (elements, changed, distance) take: entropies of a coin and of a geometric law."""
    elements, changed, distance = rows.T
    return _entropy(elements, changed) + _entropy(distance, changed)


def _entropy(tosses: npt.NDArray[np.float64], heads: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bits that so many tosses hold with so many heads."""
    return _weighed(tosses) - _weighed(heads) - _weighed(tosses - heads)


def _weighed(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return counts * np.log2(np.maximum(counts, 1.0))


def expected_bits(elements: int, steps: Bits) -> float:
    """About what a tensor of so many elements takes, of which `steps` changed, if its exponents were of no help."""
    magnitudes = np.abs(steps.astype(np.int64))
    excess = magnitudes[magnitudes > 1] - 2
    how_far = _excess_bits(excess, _excess_parameter(excess))
    return _subset_bits(elements, steps.size) + steps.size + _subset_bits(steps.size, excess.size) + how_far


def _subset_bits(members: int, chosen: int) -> float:
    parameter = max(int(np.log2(0.69 * members / chosen)), 0) if chosen else 0
    return chosen * (parameter + 1) + (members - chosen if chosen else 0) / (1 << parameter)
