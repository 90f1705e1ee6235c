"""The fast code: the bytes that its description says, any block beside the others, and nothing but WeightsError for
bytes that it cannot have made."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import random_bits

from engines.weights.codes import fast, ulp
from engines.weights.codes.changes import Run
from engines.weights.codes.layout import BLOCK
from engines.weights.codes.ulp import SparseDelta
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SEEDS = st.integers(0, 2**32 - 1)
INTEGERS = [torch.int16, torch.int32]
SIZES = st.sampled_from([0, 1, 300, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
SHARES = st.sampled_from([0.0, 0.0005, 0.01, 0.3, 1.0])


def decode(code: ByteArray, dtype: torch.dtype, elements: int) -> SparseDelta:
    """By itself, and between two others: the same difference, or an error from both."""
    other = fast.encode(SparseDelta(9, torch.tensor([3]), torch.ones(1, dtype=dtype)))
    before = np.concatenate(other)
    frames = np.concatenate([before, code, before])
    ends = np.cumsum([before.size, code.size, before.size])
    sizes = np.array([9, elements, 9])
    try:
        delta = fast.decode(code, dtype, elements)
    except WeightsError:
        with pytest.raises(WeightsError):
            fast.decode_frames(frames, ends, sizes, dtype.itemsize)
        raise
    found = Run([0, 1, 2], *fast.decode_frames(frames, ends, sizes, dtype.itemsize)).deltas(sizes.tolist())
    assert same(found[1], delta) and all(each.indices.tolist() == [3] for each in (found[0], found[2]))
    return delta


def code_of(delta: SparseDelta) -> ByteArray:
    return np.concatenate([np.empty(0, np.uint8), *fast.encode(delta)])


def delta_of(positions: list[int], elements: int, steps: list[int] | None = None) -> SparseDelta:
    values = [1] * len(positions) if steps is None else steps
    return SparseDelta(elements, torch.tensor(positions, dtype=torch.int64), torch.tensor(values, dtype=torch.int16))


def random_delta(seed: int, dtype: torch.dtype, elements: int, share: float) -> SparseDelta:
    """Steps of every size, the small ones often."""
    rng = np.random.default_rng(seed)
    where = torch.from_numpy(np.flatnonzero(rng.random(elements) < share))
    bits = random_bits(rng, torch.bfloat16 if dtype is torch.int16 else torch.float32, where.numel())
    near = torch.from_numpy(rng.integers(-9, 9, where.numel()))
    steps = torch.where(torch.from_numpy(rng.random(where.numel()) < 0.8), near, bits)
    steps = torch.where(steps == 0, -1, steps).to(dtype)
    return SparseDelta(elements, where, steps)


def same(a: SparseDelta, b: SparseDelta) -> bool:
    return a.elements == b.elements and torch.equal(a.indices, b.indices) and torch.equal(a.steps, b.steps)


def described(delta: SparseDelta) -> bytes:
    """The code as its module describes it."""
    table, gaps, nibbles, escapes = b"", b"", b"", b""
    for start in range(0, delta.elements, BLOCK):
        inside = (delta.indices >= start) & (delta.indices < start + BLOCK)
        before, of_block, large, skips = start - 1, [], 0, 0
        for index, step in zip(delta.indices[inside].tolist(), delta.steps[inside].tolist(), strict=True):
            gap = index - before - 1
            gaps += b"\xff" * (gap // 255) + bytes([gap % 255])
            skips += gap // 255
            of_block.append(step + 8 if -7 <= step <= 7 else 0)
            if not -7 <= step <= 7:
                escapes += step.to_bytes(delta.steps.element_size(), "little", signed=True)
                large += 1
            before = index
        padded = [*of_block, 0]
        nibbles += bytes(padded[i] | padded[i + 1] << 4 for i in range(0, len(of_block), 2))
        table += b"".join(count.to_bytes(2, "little") for count in (len(of_block), skips, large))
    return table + gaps + nibbles + escapes


@LIGHT
@given(SEEDS, st.sampled_from(INTEGERS), SIZES, st.sampled_from([0.0, 0.0005, 0.01]))
def test_the_bytes_are_those_that_the_description_gives(
    seed: int, dtype: torch.dtype, elements: int, share: float
) -> None:
    delta = random_delta(seed, dtype, elements, share)
    assert code_of(delta).tobytes() == described(delta)


@LIGHT
@given(SEEDS, st.sampled_from(INTEGERS), SIZES, SHARES)
def test_a_difference_comes_back(seed: int, dtype: torch.dtype, elements: int, share: float) -> None:
    delta = random_delta(seed, dtype, elements, share)
    code = code_of(delta)
    code.flags.writeable = False
    assert same(decode(code, dtype, elements), delta)
    moved = np.concatenate([np.zeros(1, np.uint8), code])[1:]
    assert same(decode(moved, dtype, elements), delta), "whatever address it begins at"


@LIGHT
@given(SEEDS, st.sampled_from(INTEGERS), st.lists(st.integers(0, 4), max_size=4))
def test_blocks_decode_apart_as_they_do_together(seed: int, dtype: torch.dtype, cuts: list[int]) -> None:
    elements = 3 * BLOCK + 5
    delta = random_delta(seed, dtype, elements, 0.01)
    code = code_of(delta)
    edges = [0, *sorted(cuts), fast.num_blocks(elements)]
    parts = [fast.decode(code, dtype, elements, range(a, b)) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat([part.indices for part in parts]), delta.indices)
    assert torch.equal(torch.cat([part.steps for part in parts]), delta.steps)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 32_000])
@pytest.mark.parametrize("first", [0, BLOCK - 1])
def test_gaps_of_every_length_are_kept(gap: int, first: int) -> None:
    delta = delta_of([first, first + 1 + gap], 3 * BLOCK)
    assert same(decode(code_of(delta), torch.int16, delta.elements), delta)


def test_the_edges_of_blocks_are_kept() -> None:
    elements = 3 * BLOCK
    for positions in ([0], [BLOCK - 1], [BLOCK], [elements - 1], [BLOCK - 1, BLOCK], list(range(elements))):
        delta = delta_of(positions, elements)
        assert same(decode(code_of(delta), torch.int16, elements), delta)


def test_every_step_is_kept() -> None:
    for dtype, steps in (
        (torch.int16, torch.arange(-(1 << 15), 1 << 15)),
        (torch.int32, torch.tensor([-(1 << 31), (1 << 31) - 1, -8, -7, 7, 8, 1 << 16])),
    ):
        steps = steps[steps != 0].to(dtype)
        delta = SparseDelta(steps.numel(), torch.arange(steps.numel()), steps)
        assert same(decode(code_of(delta), dtype, delta.elements), delta)


def test_a_change_takes_less_than_thirteen_bits_at_the_usual_share() -> None:
    rng = np.random.default_rng(0)
    elements = 1 << 20
    where = torch.from_numpy(np.flatnonzero(rng.random(elements) < 0.014))
    steps = torch.from_numpy(rng.choice([-2, -1, 1, 2], where.numel(), p=[0.05, 0.45, 0.45, 0.05])).to(torch.int16)
    delta = SparseDelta(elements, where, steps)
    bits = 8 * code_of(delta).size / delta.changed
    assert 12 < bits < 13


def test_positions_that_do_not_ascend_are_not_encoded() -> None:
    for positions in ([5, 3], [3, 3], [BLOCK + 1, 1], [100], [-1], [0, 100]):
        with pytest.raises(WeightsError, match="ascend below 100"):
            fast.encode(delta_of(positions, 100))


# -- hostile bytes ---------------------------------------------------------------------------------------------------


def refused_or_sound(code: ByteArray, dtype: torch.dtype, elements: int) -> bool:
    """True if the bytes are refused; what is not refused must be a difference that can be applied."""
    try:
        delta = decode(code, dtype, elements)
    except WeightsError:
        return True
    assert (delta.indices[1:] > delta.indices[:-1]).all() and (delta.steps != 0).all()
    ulp.apply_(torch.zeros(elements, dtype=dtype), delta)
    assert code_of(delta).tobytes() == code.tobytes(), "only one code stands for a difference"
    return False


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_what_is_cut_short_or_goes_on_is_refused(dtype: torch.dtype) -> None:
    delta = random_delta(3, dtype, 2 * BLOCK + 9, 0.001)
    code = code_of(delta)
    assert not refused_or_sound(code, dtype, delta.elements)
    for size in range(code.size):
        assert refused_or_sound(code[:size], dtype, delta.elements), size
    assert refused_or_sound(np.concatenate([code, np.zeros(1, np.uint8)]), dtype, delta.elements)
    for elements in (0, delta.elements + BLOCK, BLOCK, int(delta.indices[-1])):
        assert refused_or_sound(code, dtype, elements)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_flipped_bit_is_refused_or_gives_another_difference(dtype: torch.dtype) -> None:
    delta = random_delta(4, dtype, 3000, 0.01)
    code = code_of(delta)
    refused = 0
    for bit in range(8 * code.size):
        flipped = code.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        refused += refused_or_sound(flipped, dtype, delta.elements)
    assert 0 < refused < 8 * code.size


@LIGHT
@given(SEEDS, st.sampled_from(INTEGERS), st.sampled_from([1, 100, BLOCK, 2 * BLOCK]), st.integers(1, 40))
def test_bytes_of_chance_are_refused_or_sound(seed: int, dtype: torch.dtype, elements: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    code = code_of(random_delta(seed, dtype, elements, 0.01))
    at = rng.integers(0, code.size, flips)
    code[at] = rng.choice(np.array([0, 1, 8, 127, 128, 254, 255], np.uint8), flips)
    refused_or_sound(code, dtype, elements)
    refused_or_sound(rng.integers(0, 256, int(rng.integers(0, 200)), dtype=np.uint8), dtype, elements)


def table(*rows: tuple[int, int, int]) -> ByteArray:
    return np.array(rows, "<u2").view(np.uint8).reshape(-1)


@pytest.mark.parametrize(
    ("rows", "rest", "says"),
    [
        ([(BLOCK + 1, 0, 0)], [], "more changes than elements"),
        ([(0, 200, 0)], [], "more changes than elements"),
        ([(1, 0, 2)], [], "more changes than elements"),
        ([(1, 0, 0)], [], "more bytes were promised"),
        ([(1, 0, 0)], [0, 9, 0], "left over"),
        ([(1, 0, 0)], [255, 9], "other changes than its table"),
        ([(1, 1, 0)], [3, 3, 9], "other changes than its table"),
        ([(1, 1, 0)], [3, 255, 9], "other changes than its table"),
        ([(0, 1, 0)], [255], "other changes than its table"),
        ([(1, 0, 0)], [10, 9], "beyond the end"),
        ([(2, 0, 0)], [4, 5, 0x99], "beyond the end"),
        ([(1, 1, 0)], [255, 0, 9], "beyond the end"),
        ([(1, 0, 0)], [0, 8], "not in the code"),
        ([(1, 0, 0)], [0, 0], "other escapes"),
        ([(1, 0, 1)], [0, 9, 9, 9], "other escapes"),
        ([(1, 0, 1)], [0, 0, 7, 0], "not in the code"),
        ([(1, 0, 1)], [0, 0, 0, 0], "not in the code"),
        ([(1, 0, 0)], [0, 0x19], "not in the code"),
    ],
)
def test_what_is_wrong_is_named(rows: list[tuple[int, int, int]], rest: list[int], says: str) -> None:
    code = np.concatenate([table(*rows), np.array(rest, np.uint8)])
    with pytest.raises(WeightsError, match=says):
        decode(code, torch.int16, 10)


def test_a_few_bytes_cannot_ask_for_much_memory() -> None:
    liars = [
        (np.zeros(100, np.uint8), 1 << 40),
        (table((BLOCK, 0, 0)), BLOCK),
        (table(*[(BLOCK, 128, BLOCK)] * 16), 16 * BLOCK),
    ]
    for code, elements in liars:
        tracemalloc.start()
        with pytest.raises(WeightsError):
            decode(code, torch.int16, elements)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000
