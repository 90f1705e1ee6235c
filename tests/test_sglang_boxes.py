"""Boxes against the plainest way to say what they say: sets of (position, place)."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.sglang.boxes import Arena, Box, between, overlapping
from engines.weights import fingerprint
from stream_rl.errors import WeightsError

LIGHT = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    stride, live_stride = (columns + draw(st.integers(0, 4)) if rows > 1 else 0 for _ in range(2))
    return Box(draw(st.integers(0, 20)), rows, stride, columns, draw(st.integers(0, 20)), live_stride)


def elements(box: Box) -> dict[int, int]:
    """Position in the tensor to place in the arena."""
    return {
        box.offset + i * box.stride + j: box.live + i * box.live_stride + j
        for i in range(box.rows)
        for j in range(box.columns)
    }


@LIGHT
@given(boxes(), st.integers(0, 60), st.integers(0, 60))
def test_what_is_clipped_is_what_lies_between(box: Box, start: int, stop: int) -> None:
    parts = list(box.clipped(start, stop))
    found = [item for part in parts for item in elements(part).items()]
    assert sorted(found) == sorted((k, v) for k, v in elements(box).items() if start <= k < stop)
    assert len(parts) <= 3
    assert box.stop == max(elements(box)) + 1 and box.elements == len(elements(box))


@LIGHT
@given(boxes())
def test_views_and_sums_are_of_those_elements(box: Box) -> None:
    arena = torch.from_numpy(np.random.default_rng(0).integers(-(1 << 15), 1 << 15, 100, dtype=np.int16))
    flat = torch.arange(100)
    assert box.pick(flat[3:], 3).reshape(-1).tolist() == list(elements(box)) if box.offset >= 3 else True
    assert box.view(flat).reshape(-1).tolist() == list(elements(box).values())
    places = torch.tensor(list(elements(box).values()))
    positions = torch.tensor(list(elements(box)))
    expected = fingerprint.element_sum(7, positions, arena[places])
    assert box.sum(7, box.view(arena)) == expected


@LIGHT
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_a_copy_between_views_is_found_or_refused_but_never_mistaken(shape: list[int], data: st.DataObject) -> None:
    """Views of both sides: narrowed, transposed, or not."""
    source = torch.arange(int(np.prod(shape))).reshape(shape)
    view = source
    for dim in range(len(shape)):
        first = data.draw(st.integers(0, shape[dim] - 1))
        view = view.narrow(dim, first, data.draw(st.integers(1, shape[dim] - first)))
    room = [size + data.draw(st.integers(0, 2)) for size in view.shape]
    parameter = torch.arange(int(np.prod(room))).reshape(room)
    target = parameter
    for dim, size in enumerate(view.shape):
        target = target.narrow(dim, data.draw(st.integers(0, room[dim] - size)), size)
    order = data.draw(st.permutations(range(len(shape))))
    if data.draw(st.booleans()):
        view = view.permute(order)
        if data.draw(st.booleans()):
            target = target.permute(order)
        elif target.shape != view.shape:
            return
    box = between(view, target, int(target.storage_offset()))
    if box is not None:
        assert elements(box) == dict(zip(view.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True))
    elif len(shape) < 3:
        assert not torch.equal(view.argsort(-1), target.argsort(-1)) or view.stride() != source.stride()


def test_what_is_no_box_is_none() -> None:
    square = torch.zeros(4, 4)
    assert between(square.t(), square, 0) is None
    assert between(square[:, ::2], square[:, :2], 0) is None
    assert between(square[0].expand(4, 4), square, 0) is None
    cube = torch.zeros(4, 4, 4)
    assert between(cube[:2, :2, :2], torch.zeros(2, 2, 2), 0) is None
    assert between(square, square, 5) == Box(0, 1, 0, 16, 5, 0)
    assert between(square[:, 1:3], torch.zeros(4, 2), 0) == Box(1, 4, 4, 2, 0, 2)
    assert between(square[2:], torch.zeros(2, 4), 0) == Box(8, 1, 0, 8, 0, 0)
    assert between(torch.zeros(()), torch.zeros(()), 3) == Box(0, 1, 0, 1, 3, 0)


@LIGHT
@given(st.lists(boxes(), min_size=2, max_size=4))
def test_what_is_called_disjoint_is(some: list[Box]) -> None:
    spans = [(box.source, number) for number, box in enumerate(some)]
    places = [set(elements(box)) for box in some]
    clash = any(places[i] & places[j] for i in range(len(some)) for j in range(i))
    if clash:
        assert overlapping(spans) is not None
    if overlapping(spans) is None:
        assert not clash


def test_shards_of_one_tensor_are_disjoint_by_rows_and_by_columns() -> None:
    for shards in ([(4 * r, 1, 0, 4) for r in range(8)], [(4 * r, 9, 32, 4) for r in range(8)]):
        assert overlapping([(shard, "") for shard in shards]) is None
        assert overlapping([(shard, "") for shard in [*shards, (3, 1, 0, 2)]]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_an_arena_reaches_every_parameter_in_place(dtype: torch.dtype) -> None:
    tensors = [torch.zeros(n, dtype=dtype) for n in (3, 1, 70_000)] + [torch.zeros(5, 7, dtype=dtype)[1:4, 2:3]]
    arena = Arena(tensors)
    for number, tensor in enumerate(tensors, 1):
        place = arena.position(tensor)
        arena.bits[place] = number
        arena.bits.as_strided(tensor.shape, tensor.stride(), place).fill_(number)
    for number, tensor in enumerate(tensors, 1):
        assert bool((fingerprint.bits_of(tensor.contiguous()) == number).all())


def test_parameters_that_are_not_aligned_to_each_other_are_refused() -> None:
    raw = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(WeightsError, match="aligned"):
        Arena([raw[0:8].view(torch.float32), raw[16:24].view(torch.float32), _shifted(raw)])


def _shifted(raw: torch.Tensor) -> torch.Tensor:
    array = np.frombuffer(raw.numpy(), np.uint8)[33:41].view(np.float32)
    return torch.from_numpy(array)
