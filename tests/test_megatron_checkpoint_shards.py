"""Any placement's parts of a checkpoint's tensors, put together from any other's."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_megatron_changes import numbered
from test_megatron_huggingface import SHAPE

from engines.megatron.layout import Place, layout
from engines.megatron.model_shape import ModelShape
from engines.megatron.shards import Assembly, Runs, put, shards, take, whole
from stream_rl.errors import WeightsError

Stored = dict[str, list[tuple[Runs, torch.Tensor]]]
HOLE = -1.0


def places(shape: ModelShape, tp: int, stages: int, padding: int) -> list[Place]:
    """Of all ranks but for data parallelism."""
    rows = -(-(shape.vocab_size + padding) // tp) * tp
    layers = shape.layers // stages
    return [
        Place(
            tp_rank=rank, tp_size=tp, first_layer=layers * stage, num_layers=layers, first_stage=stage == 0,
            last_stage=stage == stages - 1, padded_vocab=rows,
        )
        for stage, rank in itertools.product(range(stages), range(tp))
    ]  # fmt: skip


def parameter_elements(shape: ModelShape, place: Place) -> dict[str, int]:
    """Of a process's parameters: those that no box names are padding, at the end."""
    rows = (place.padded_vocab or shape.vocab_size) // place.tp_size
    return {
        name: rows * shape.hidden_size
        if name.startswith(("embedding.", "output_layer."))
        else sum(box.count * box.width for box in boxes)
        for name, boxes in layout(shape, place).items()
    }


def ranges(elements: int, dp: int, chance: Any) -> list[tuple[int, int]]:
    """What the data-parallel ranks hold of a parameter: anything, as the distributed optimizer's buckets fall."""
    edges = [0, *sorted(chance.choices(range(elements + 1), k=dp - 1)), elements]
    return list(itertools.pairwise(edges))


def cut_up(shape: ModelShape, checkpoint: dict[str, torch.Tensor], place: Place, dp: int, chance: Any) -> Stored:
    """What the ranks of a place store of the checkpoint's tensors."""
    stored: Stored = {name: [] for name in checkpoint}
    elements = parameter_elements(shape, place)
    for name, boxes in layout(shape, place).items():
        parameter = torch.full((elements[name],), HOLE)
        for box in boxes:
            there = (box.count, box.width), (box.to_stride, 1), box.to_offset
            box.of(parameter).copy_(checkpoint[box.name].reshape(-1).as_strided(*there))
        for start, stop in ranges(elements[name], dp, chance):
            for shard in shards(boxes, start, stop):
                values = take(shard.here, parameter[start:stop])
                assert len(values) == shard.here.elements == shard.there.elements > 0
                stored[shard.name].append((shard.there, values))
    return stored


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(1, 5))
PLACEMENTS = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(1, 4), st.integers(0, 7))


@settings(max_examples=40, deadline=None)
@given(SHAPES, PLACEMENTS, PLACEMENTS, st.randoms(use_true_random=False))
def test_what_one_placement_cuts_another_puts_together(
    sizes: tuple[int, int, bool, int], old: tuple[int, ...], new: tuple[int, ...], chance: Any
) -> None:
    groups, share, tied, hidden = sizes
    shape = dataclasses.replace(
        SHAPE, heads=groups * share * 6, kv_heads=groups * 6, ffn_size=6, layers=2, tied=tied, hidden_size=2 * hidden
    )
    checkpoint = numbered(shape)
    stored: Stored = {name: [] for name in checkpoint}
    for place in places(shape, old[0], old[1], old[3]):
        for name, parts in cut_up(shape, checkpoint, place, old[2], chance).items():
            stored[name] += parts
    for name, tensor in checkpoint.items():
        again = torch.full((tensor.numel(),), HOLE)
        Assembly(name, whole(tensor.numel()), stored[name]).into(again)
        assert torch.equal(again, tensor.reshape(-1)), name
        chance.shuffle(stored[name])
    for place in places(shape, new[0], new[1], new[3]):
        elements = parameter_elements(shape, place)
        for name, boxes in layout(shape, place).items():
            for start, stop in ranges(elements[name], new[2], chance):
                parameter = torch.full((stop - start,), HOLE)
                for shard in shards(boxes, start, stop):
                    values = torch.empty(shard.here.elements)
                    Assembly(shard.name, shard.there, stored[shard.name]).into(values)
                    put(shard.here, values, parameter)
                wanted = torch.full((elements[name],), HOLE)
                for box in boxes:
                    there = (box.count, box.width), (box.to_stride, 1), box.to_offset
                    box.of(wanted).copy_(checkpoint[box.name].reshape(-1).as_strided(*there))
                assert torch.equal(parameter, wanted[start:stop]), name


@settings(deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 5), st.integers(0, 4), st.integers(1, 7), st.data(),
)  # fmt: skip
def test_runs_take_and_put_what_they_say(offset: int, width: int, gap: int, count: int, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, count * width)] * 2)))
    runs = Runs(offset, width, width + gap, low, high)
    places_ = [offset + index // width * (width + gap) + index % width for index in range(low, high)]
    source = torch.arange(offset + count * (width + gap))
    taken = take(runs, source)
    assert taken.tolist() == places_
    target = torch.full_like(source, -1)
    put(runs, taken, target)
    assert target.tolist() == [index if index in places_ else -1 for index in range(len(source))]


def test_a_gap_or_an_element_twice_is_refused() -> None:
    first, second = torch.arange(0.0, 6.0), torch.arange(6.0, 10.0)
    good = [(Runs(0, 10, 10, 0, 6), first), (Runs(0, 10, 10, 6, 10), second)]
    Assembly("w", whole(10), good)
    for spoiled in (
        [good[0]], [good[1]], [], [*good, good[1]], [(Runs(0, 10, 10, 0, 5), first[:5]), good[1]],
        [(Runs(0, 10, 10, 0, 7), torch.arange(7.0)), good[1]],
        [(Runs(0, 2, 4, 0, 6), first), (Runs(2, 2, 4, 0, 3), second)],
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=r"w is not whole, or not once: [12] gaps or overlaps"):
            Assembly("w", whole(10), spoiled)
    Assembly("w", Runs(0, 6, 6, 1, 5), [good[0]])
    nothing = Runs(0, 6, 6, 3, 3)
    Assembly("w", nothing, []).onto(nothing, first)
    assert take(nothing, first).tolist() == []
