"""Training states on disk: what ranks of one placement wrote, loaded by ranks of another, and refused when it does not
fit."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_megatron_checkpoint_shards import HOLE, PLACEMENTS, parameter_elements, places, ranges
from test_megatron_huggingface import SHAPE, random_weights

from engines.megatron.holdings import Boxes, holdings
from engines.megatron.layout import Place
from engines.megatron.model_shape import ModelShape
from engines.megatron.shards import Runs, shards, take
from engines.megatron.state_files import StateFiles, write_state
from engines.megatron.training_state import MAIN, Loading, Stepped
from stream_rl.errors import WeightsError

KINDS = (MAIN, "exp_avg", "exp_avg_sq")
STEPS = 7.0
Truth = dict[str, dict[str, torch.Tensor]]
"""KIND -> NAME -> the whole tensor."""


def truth_of(shape: ModelShape) -> Truth:
    names = random_weights(shape)
    return {kind: {name: torch.randn(tensor.shape) for name, tensor in names.items()} for kind in KINDS}


def part_of(truth: dict[str, torch.Tensor], boxes: Boxes, name: str, elements: int, padding: float) -> torch.Tensor:
    """A process's parameter, flat."""
    parameter = torch.full((elements,), padding)
    for box in boxes[name]:
        there = (box.count, box.width), (box.to_stride, 1), box.to_offset
        box.of(parameter).copy_(truth[box.name].reshape(-1).as_strided(*there))
    return parameter


def write(directory: pathlib.Path, shape: ModelShape, truth: Truth, placement: tuple[int, ...], chance: Any) -> int:
    """What all ranks of a placement write; how many there are."""
    tp, stages, dp, padding = placement
    rank = 0
    for place in places(shape, tp, stages, padding):
        boxes, elements = holdings(shape, place).exported, parameter_elements(shape, place)
        cuts = {name: ranges(elements[name], dp, chance) for name in boxes}
        for replica in range(dp):
            held: dict[str, tuple[int, Runs]] = {}
            states: dict[str, torch.Tensor] = {}
            for name in boxes:
                start, stop = cuts[name][replica]
                for shard in shards(boxes[name], start, stop):
                    held[shard.name] = shard.elements, shard.there
                    states[f"step/{shard.name}"] = torch.tensor(STEPS)
                    for kind in KINDS:
                        whole = part_of(truth[kind], boxes, name, elements[name], HOLE)
                        states[f"{kind}/{shard.name}"] = take(shard.here, whole[start:stop])
            write_state(directory, rank, held, iter(states.items()), {"cpu": torch.tensor([rank])}, shard_bytes=4000)
            rank += 1
    return rank


def rank_parts(shape: ModelShape, place: Place, replica: int, dp: int, chance: Any) -> list[Stepped]:
    """What a rank steps, with states that are not those on disk."""
    elements = parameter_elements(shape, place)
    found = []
    for name in holdings(shape, place).held:
        start, stop = ranges(elements[name], dp, chance)[replica]
        if start < stop:
            live = torch.zeros(stop - start, dtype=torch.bfloat16)
            found.append((name, start, live, torch.nn.Parameter(torch.zeros(stop - start))))
    optimizer = torch.optim.AdamW([part[3] for part in found] or [torch.zeros(1)])
    for *_, tensor in found:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return [Stepped(*part, optimizer) for part in found]


@settings(max_examples=12, deadline=None)
@given(st.booleans(), PLACEMENTS, PLACEMENTS, st.randoms(use_true_random=False))
def test_any_placement_loads_what_any_other_wrote(
    tied: bool, old: tuple[int, ...], new: tuple[int, ...], chance: Any
) -> None:
    shape = dataclasses.replace(SHAPE, heads=6, kv_heads=6, ffn_size=6, layers=2, tied=tied)
    truth = truth_of(shape)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        ranks = write(directory, shape, truth, old, chance)
        with StateFiles(directory) as files:
            assert files.kinds == set(KINDS)
            assert [files.random(rank)["cpu"].tolist() for rank in range(ranks)] == [[rank] for rank in range(ranks)]
            assert files.random(ranks) == {}
            tp, stages, dp, padding = new
            for place in places(shape, tp, stages, padding):
                held, elements = holdings(shape, place).held, parameter_elements(shape, place)
                parts = rank_parts(shape, place, chance.randrange(dp), dp, chance)
                mains = [part.tensor.detach().clone() for part in parts]
                Loading(parts, held, files, holdings(shape).sizes).apply()
                for part, before in zip(parts, mains, strict=True):
                    got = part.states()
                    assert got.keys() == {*KINDS, "step"}
                    assert got["step"] == STEPS
                    stretch = slice(part.start, part.start + part.elements)
                    padded = part_of(truth[MAIN], held, part.name, elements[part.name], HOLE)[stretch] == HOLE
                    for kind in KINDS:
                        wanted = part_of(truth[kind], held, part.name, elements[part.name], 0.0)[stretch]
                        if kind == MAIN:
                            wanted[padded] = before[padded]
                        assert torch.equal(got[kind], wanted), (kind, part.name)


# -- what does not fit ---------------------------------------------------------------------------------------


def rewrite(path: pathlib.Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


KEY = "exp_avg/model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop(KEY), r"exp_avg of model\.norm\.weight is not whole, or not once: 1 gaps"),
        (lambda tensors, _: tensors.update({KEY: tensors[KEY][:-1]}), r"expected \d+ elements of exp_avg/model\.norm"),
        (lambda tensors, _: tensors.update({KEY: tensors[KEY].bfloat16()}), r"of torch\.float32, got 8 of torch\.bfl"),
        (lambda tensors, _: tensors.update({KEY: tensors[KEY].to(torch.int64)}), r"rank-00000\.safetensors: KeyError"),
        (lambda tensors, _: tensors.pop("step/model.norm.weight"), r"expected one step for \['model\.norm\.weight'\]"),
        (
            lambda tensors, _: tensors.update({"step/model.layers.0.self_attn.k_proj.weight": torch.tensor(6.0)}),
            r"expected one step for \[.*\], got \[7\.0, 6\.0, 7\.0\]",
        ),
        (lambda _, metadata: metadata.pop("runs"), r"cannot read the training state .*KeyError\('runs'\)"),
        (lambda _, metadata: metadata.update(runs="[]"), r"cannot read .*Expected `object`, got `array`"),
        (lambda _, metadata: metadata.update(runs="{}"), r"cannot read the training state .*rank-00000\.saf"),
        (
            lambda _, metadata: metadata.update(runs=metadata["runs"].replace("model.norm", "other")),
            r"cannot read the training state .*KeyError\('model\.norm\.weight'\)",
        ),
    ],
)
def test_files_that_say_something_else_are_refused_before_anything_changes(
    tmp_path: pathlib.Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object], message: str
) -> None:
    class Chance:
        def choices(self, values: range, k: int) -> list[int]:
            return []

    truth = truth_of(SHAPE)
    write(tmp_path, SHAPE, truth, (1, 1, 1, 0), Chance())
    for path in tmp_path.glob("*.json"):
        path.unlink()
    whole: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for path in tmp_path.glob("*.safetensors"):
        rewrite(path, lambda tensors, said: (whole.update(tensors), metadata.update(said)))
        path.unlink()
    path = tmp_path / "rank-00000.safetensors"
    safetensors.torch.save_file(whole, path, metadata=metadata)
    parts = rank_parts(SHAPE, Place(), 0, 1, Chance())
    before = [{kind: state.clone() for kind, state in part.states().items()} for part in parts]
    sizes, held = holdings(SHAPE).sizes, holdings(SHAPE).held

    with StateFiles(tmp_path) as files:
        Loading(parts, held, files, sizes)
        with pytest.raises(WeightsError, match=r"another model: it has no tensor called \['model\.norm\.weight'\]"):
            Loading(parts, held, files, set(sizes) - {"model.norm.weight"})
    rewrite(path, change)
    with pytest.raises(WeightsError, match=message), StateFiles(tmp_path) as files:
        Loading(parts, held, files, sizes)
    path.rename(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"expected rank-N\.safetensors, got .*other"):
        StateFiles(tmp_path)
    after = [part.states() for part in parts]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[kind], new[kind]) for kind in old)


def test_each_kind_is_looked_for_where_any_rank_has_it(tmp_path: pathlib.Path) -> None:
    """An optimizer that has taken no step has no states but its copies, and gets none."""

    class Chance:
        def choices(self, values: range, k: int) -> list[int]:
            return []

    shape, chance = SHAPE, Chance()
    truth = truth_of(shape)
    held = {
        name: (tensor.numel(), Runs(0, tensor.numel(), tensor.numel(), 0, tensor.numel()))
        for name, tensor in truth[MAIN].items()
    }

    def mains() -> Iterator[tuple[str, torch.Tensor]]:
        return ((f"{MAIN}/{name}", tensor.reshape(-1)) for name, tensor in truth[MAIN].items())

    write_state(tmp_path, 0, held, mains(), {})
    parts = rank_parts(shape, Place(), 0, 1, chance)
    with StateFiles(tmp_path) as files:
        Loading(parts, holdings(shape).held, files, holdings(shape).sizes).apply()
    assert all(set(part.states()) == {MAIN} for part in parts)
