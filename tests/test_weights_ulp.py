"""Steps of the last place: a bijection on all bit patterns that follows the values, composes, and touches nothing else;
and the compiled loops do what the readable ones do."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import random_bits, special_bits

from engines.weights.codes import arrays, ulp
from engines.weights.codes.kernels import kernels
from engines.weights.codes.ulp import SparseDelta
from stream_rl.errors import WeightsError

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 63, 64, 65, 257, 4095, 4096, 4097, 9000])
SHARES = st.sampled_from([0.0, 0.01, 0.3, 1.0])
NUMBA = importlib.util.find_spec("numba") is not None


def all_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every pattern of a 16-bit dtype, as integers."""
    assert dtype.itemsize == 2
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16)


def changed(rng: np.random.Generator, old: torch.Tensor, dtype: torch.dtype, share: float) -> torch.Tensor:
    chosen = torch.from_numpy(rng.random(old.numel()) < share)
    return torch.where(chosen, random_bits(rng, dtype, old.numel()), old)


def same(a: SparseDelta, b: SparseDelta) -> bool:
    return a.elements == b.elements and torch.equal(a.indices, b.indices) and torch.equal(a.steps, b.steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ordinals_follow_the_values_and_no_two_patterns_share_one(dtype: torch.dtype) -> None:
    bits = all_bits(dtype)
    ordinals = ulp.ordinal(bits)
    assert torch.equal(ulp.ordinal(ordinals), bits)
    assert ordinals.unique().numel() == 1 << 16
    values = bits.view(dtype).float()
    number = ~values.isnan()
    by_ordinal = values[number][ordinals[number].argsort()]
    assert (by_ordinal[1:] >= by_ordinal[:-1]).all()
    zeros = ulp.ordinal(torch.tensor([0.0, -0.0], dtype=dtype).view(torch.int16))
    assert zeros.tolist() == [0, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_step_is_the_next_float(dtype: torch.dtype) -> None:
    values = all_bits(dtype).view(dtype)
    values = values[values.isfinite() & (values != 0)]
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            up = torch.from_numpy(np.nextafter(values.numpy(), np.float16("inf")))
    else:
        up = torch.nextafter(values, torch.tensor(torch.inf, dtype=dtype))
    delta = ulp.diff(values.view(torch.int16), up.view(torch.int16))
    crossing = up == 0  # from the smallest negative number to zero: -0 lies between
    assert delta.changed == values.numel()
    assert (delta.steps[~crossing] == 1).all()


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), SIZES, SHARES)
def test_a_difference_leads_from_old_to_new_bit_for_bit(
    seed: int, dtype: torch.dtype, elements: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    old = random_bits(rng, dtype, elements)
    new = changed(rng, old, dtype, share)
    kept = old.clone(), new.clone()
    delta = ulp.diff(old, new)
    assert delta.indices.tolist() == torch.nonzero(old != new).reshape(-1).tolist()
    assert (delta.steps != 0).all() and delta.steps.dtype == old.dtype
    assert torch.equal(old, kept[0]) and torch.equal(new, kept[1])
    live = old.clone()
    assert ulp.apply_(live, delta) is live
    assert torch.equal(live, new)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_special_value_becomes_every_other(dtype: torch.dtype) -> None:
    unsigned = np.array(special_bits(dtype), np.dtype(f"u{dtype.itemsize}"))
    patterns = torch.from_numpy(unsigned.view(np.dtype(f"i{dtype.itemsize}")))
    old, new = patterns.repeat_interleave(patterns.numel()), patterns.repeat(patterns.numel())
    assert torch.equal(ulp.apply_(old.clone(), ulp.diff(old, new)), new)


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), SIZES)
def test_applying_touches_nothing_but_what_changed(seed: int, dtype: torch.dtype, elements: int) -> None:
    rng = np.random.default_rng(seed)
    old = random_bits(rng, dtype, elements)
    delta = ulp.diff(old, changed(rng, old, dtype, 0.1))
    other = random_bits(rng, dtype, elements)
    live = ulp.apply_(other.clone(), delta)
    untouched = torch.ones(elements, dtype=torch.bool)
    untouched[delta.indices] = False
    assert torch.equal(live[untouched], other[untouched])
    assert torch.equal(live[~untouched], ulp.stepped(other[~untouched], delta.steps))
    assert (live[~untouched] != other[~untouched]).all()


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), SIZES, SHARES, SHARES)
def test_differences_compose_without_the_weights(
    seed: int, dtype: torch.dtype, elements: int, share: float, again: float
) -> None:
    rng = np.random.default_rng(seed)
    a = random_bits(rng, dtype, elements)
    b = changed(rng, a, dtype, share)
    c = torch.where(torch.from_numpy(rng.random(elements) < 0.3), a, changed(rng, b, dtype, again))
    composed = ulp.compose(ulp.diff(a, b), ulp.diff(b, c))
    assert same(composed, ulp.diff(a, c))
    assert ulp.compose(ulp.diff(a, b), ulp.diff(b, a)).changed == 0
    d = changed(rng, c, dtype, share)
    left = ulp.compose(composed, ulp.diff(c, d))
    assert same(left, ulp.compose(ulp.diff(a, b), ulp.compose(ulp.diff(b, c), ulp.diff(c, d))))
    assert same(left, ulp.diff(a, d))


def test_steps_wrap_around() -> None:
    lowest, highest = ulp.ordinal(torch.tensor([-(1 << 15), (1 << 15) - 1], dtype=torch.int16)).split(1)
    assert ulp.diff(highest, lowest).steps.tolist() == [1]
    assert torch.equal(ulp.apply_(highest.clone(), ulp.diff(highest, lowest)), lowest)
    half = SparseDelta(1, torch.tensor([0]), torch.tensor([-(1 << 15)], dtype=torch.int16))
    assert ulp.compose(half, half).changed == 0


@pytest.mark.parametrize("elements", [1 << 16, (1 << 16) + 63])
def test_changes_that_crowd_at_one_end_are_all_found(elements: int) -> None:
    """The room for what is found is estimated from what was found so far."""
    old = torch.zeros(elements, dtype=torch.int16)
    for where in (slice(0, 5000), slice(elements - 5000, elements), slice(elements // 2, None)):
        new = old.clone()
        new[where] = 1
        delta = ulp.diff(old, new)
        assert torch.equal(ulp.apply_(old.clone(), delta), new) and delta.changed == int(new.sum())


@pytest.mark.parametrize("indices", [[5, 3], [3, 3], [10], [-1], [0, 10], [1 << 62], [-1, 0]])
def test_positions_that_do_not_ascend_within_the_tensor_write_nothing_outside(indices: list[int]) -> None:
    around = torch.zeros(30, dtype=torch.int16)
    steps = torch.ones(len(indices), dtype=torch.int16)
    with pytest.raises(WeightsError, match="ascend below 10"):
        ulp.apply_(around[10:20], SparseDelta(10, torch.tensor(indices), steps))
    assert not around[:10].any() and not around[20:].any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (torch.zeros(3, dtype=torch.int16), torch.zeros(4, dtype=torch.int16)),
        (torch.zeros(3, dtype=torch.int16), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 3, dtype=torch.int16), torch.zeros(3, 3, dtype=torch.int16)),
        (torch.zeros(6, dtype=torch.int16)[::2], torch.zeros(3, dtype=torch.int16)),
        (torch.zeros(3, dtype=torch.int16), torch.zeros(6, dtype=torch.int16)[::2]),
    ],
)
def test_what_has_no_difference_is_refused(old: torch.Tensor, new: torch.Tensor) -> None:
    with pytest.raises(WeightsError):
        ulp.diff(old, new)


def test_a_difference_of_another_tensor_is_refused() -> None:
    delta = ulp.diff(torch.zeros(3, dtype=torch.int16), torch.ones(3, dtype=torch.int16))
    for bits in (torch.zeros(4, dtype=torch.int16), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(WeightsError, match="difference is of 3"):
            ulp.apply_(bits, delta)
        with pytest.raises(WeightsError, match="do not belong to one tensor"):
            ulp.compose(delta, ulp.diff(bits, bits))


# -- compiled loops --------------------------------------------------------------------------------------------------


def test_the_compiled_loops_are_taken_where_they_are() -> None:
    assert kernels().__name__ == f"engines.weights.codes.{'loops' if NUMBA else 'arrays'}"


@pytest.mark.skipif(not NUMBA, reason="numba is not installed: the readable loops are what runs")
@LIGHT
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), SIZES | st.just(70_000), SHARES)
def test_the_compiled_loops_do_what_the_readable_ones_do(
    seed: int, dtype: torch.dtype, elements: int, share: float
) -> None:
    from engines.weights.codes import loops

    rng = np.random.default_rng(seed)
    old = random_bits(rng, dtype, elements)
    new = changed(rng, old, dtype, share)
    near = rng.random(elements) < 0.7
    new[near] = ulp.stepped(old[near], torch.from_numpy(rng.integers(-9, 9, int(near.sum()))).to(old.dtype))
    base, indices, steps = old.numpy(), *arrays.diff(old.numpy(), new.numpy())
    bounds = np.array([0, 1 << 7, 100 << 7, 0x7F80]) << (8 * dtype.itemsize - 16)
    classes, ranks = arrays.ranks(base, bounds, indices)
    counts = np.bincount(classes, minlength=bounds.size)
    streams = arrays.fast_encode(indices, steps, elements)
    frame = np.concatenate([stream.reshape(-1).view(np.uint8) for stream in streams])
    ends = np.arange(4) * frame.size
    frames = (np.tile(frame, 3), ends[:3], ends[1:], np.full(3, elements), steps.dtype)
    calls = {
        "diff": (base, new.numpy()),
        "merge": (indices, steps, *arrays.diff(new.numpy(), changed(rng, new, dtype, share).numpy())),
        "fast_encode": (indices, steps, elements),
        "fast_decode": (*streams, 0, elements),
        "fast_decode_frames": frames,
        "ranks": (base, bounds, indices),
        "select": (base, bounds, counts, ranks[np.argsort(classes, kind="stable")]),
    }
    for name, arguments in calls.items():
        expected, got = (getattr(module, name)(*arguments) for module in (arrays, loops))
        for a, b in zip(expected, got, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b), name
    for name, summed in {
        "element_sum": (seed - (1 << 31), indices, new.numpy()[indices]),
        "run_sum": (-(1 << 63), seed, base),
    }.items():
        assert getattr(loops, name)(*summed) == getattr(arrays, name)(*summed), name
    lives = base.copy(), base.copy()
    arrays.apply(lives[0], indices, steps)
    loops.apply(lives[1], indices, steps)
    assert np.array_equal(lives[0], new.numpy()) and np.array_equal(lives[1], new.numpy())


@LIGHT
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from([np.int16, np.int32]))
def test_changes_are_located_in_boxes_alike_by_both_forms(seed: int, elements: int, dtype: type) -> None:
    from engines.weights.codes import loops

    rng = np.random.default_rng(seed)
    slices = [np.flatnonzero(rng.random(elements) < 0.5) for _ in range(3)]
    positions = np.concatenate(slices)
    values = rng.integers(-9, 9, positions.size).astype(dtype)
    firsts = np.cumsum([0, *(each.size for each in slices[:-1])])
    spans, boxes = [], []
    for _ in range(rng.integers(0, 6)):
        of, columns, rows = rng.integers(3), rng.integers(1, 20), rng.integers(1, 5)
        stride = columns + rng.integers(0, 9)
        spans.append((firsts[of], slices[of].size))
        boxes.append((rng.integers(-30, 30), (rows - 1) * stride + columns, stride, columns, *rng.integers(-99, 99, 3)))
    segments = np.array(spans, np.int64).reshape(-1, 2), np.array(boxes, np.int64).reshape(-1, 7)
    found = []
    for module in (arrays, loops):
        room = sum(count for _, count in spans)
        out = np.zeros(room, np.int64), np.zeros(room, np.int64), np.zeros(room, dtype)
        counts = module.locate(positions, values, *segments, *out)
        found.append([counts.tolist(), *(each[: counts.sum()].tolist() for each in out)])
    assert found[0] == found[1]
    expected = []
    for (first, count), (shift, extent, stride, columns, live_stride, live, _) in zip(*segments, strict=True):
        for position, value in zip(positions[first : first + count], values[first : first + count], strict=True):
            row, column = divmod(position + shift, stride)
            if 0 <= position + shift < extent and column < columns:
                expected.append((live + row * live_stride + column, value))
    assert list(zip(found[0][1], found[0][3], strict=True)) == expected


@pytest.mark.parametrize("spans", [[[0, 4]], [[2, 2]], [[-1, 2]], [[0, -1]], [[0, 3], [0, 3]]])
def test_segments_of_positions_that_are_not_there_are_refused(spans: list[list[int]]) -> None:
    from engines.weights.codes import loops

    out = np.zeros(5, np.int64), np.zeros(5, np.int64), np.zeros(5, np.int16)
    boxes = np.array([[0, 9, 9, 9, 0, 0, 0]] * len(spans))
    with pytest.raises(WeightsError, match="other positions than are here"):
        loops.locate(np.arange(3), np.zeros(3, np.int16), np.array(spans), boxes, *out)


@pytest.mark.parametrize("ranks", [[3, 2], [3, 3], [-1, 2], [0, 100], [100, 101], [-1], [1 << 62]])
def test_members_that_a_class_does_not_have_are_refused(ranks: list[int]) -> None:
    base, bounds = np.zeros(100, np.int16), np.array([0, 1 << 7])
    with pytest.raises(WeightsError, match="do not ascend among its elements"):
        kernels().select(base, bounds, np.array([len(ranks), 0]), np.array(ranks))
    with pytest.raises(WeightsError, match="do not ascend among its elements"):
        kernels().select(base, bounds, np.array([0, len(ranks)]), np.array(ranks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_finds_and_does_the_same(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    a = random_bits(rng, dtype, 100_000)
    b = changed(rng, a, dtype, 0.2)
    c = changed(rng, b, dtype, 0.2)
    first, second = ulp.diff(a.cuda(), b.cuda()), ulp.diff(b.cuda(), c.cuda())
    both = ulp.compose(first, second)
    on_host = SparseDelta(both.elements, both.indices.cpu(), both.steps.cpu())
    assert same(on_host, ulp.diff(a, c))
    assert torch.equal(ulp.apply_(a.cuda(), both).cpu(), c)
    assert torch.equal(ulp.apply_(a.cuda(), on_host).cpu(), c)
