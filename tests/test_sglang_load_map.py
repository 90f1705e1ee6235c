"""The load map: found by watching a model load, bit-exact where it can be, refused by name where it cannot."""

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_builders import dtypes_of, flat, runs_of
from weights_builders import (
    FUSED,
    SHAPES,
    Model,
    Shard,
    Tensors,
    make_tensors,
    map_of,
    perturbed,
    same_bits,
    tensor_shapes,
)

from engines.sglang.load_map import LoadMap, TensorShape, trace
from engines.sglang.writes import Writes, joined, placed
from engines.weights import fingerprint
from engines.weights import parts as parts_module
from engines.weights.chain import differences
from engines.weights.parts import dense_pieces
from stream_rl.errors import WeightsError

LIGHT = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def traced(model: Model, shapes: Mapping[str, TensorShape] | None = None) -> LoadMap:
    return LoadMap(trace(model.named_parameters(), model.load_weights, shapes or tensor_shapes()))


def write(load_map: LoadMap, old: Tensors, new: Tensors) -> Writes:
    """Carry out what turns one into the other."""
    writes = joined([placed(runs_of(differences(flat(old), flat(new), dtypes_of(new))), load_map, False)], load_map)
    writes.write()
    return writes


def total(load_map: LoadMap) -> int:
    return sum(load_map.live_sums().values()) % (1 << 64)


def refusal(model: Model, shapes: Mapping[str, TensorShape] | None = None) -> str:
    """Why this model cannot be updated; its live parameters stay as they were."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(WeightsError) as caught:
        traced(model, shapes)
    assert same_bits({name: parameter.detach() for name, parameter in model.named_parameters()}, before)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tracing_finds_fused_and_tied_parameters_and_changes_no_bit(dtype: torch.dtype) -> None:
    tensors = make_tensors(0, dtype)
    model = Model(dtype)
    model.load_weights(tensors.items())
    load_map = map_of(model, dtype)
    assert same_bits(model.live(), tensors)
    assert set(load_map.held) == set(SHAPES)
    for name, held in load_map.held.items():
        [(box, holders)] = held
        assert (box.offset, box.rows, box.columns, holders) == (0, 1, tensors[name].numel(), (0,))
        target, start = FUSED.get(name, (name, 0))
        parameter = getattr(model, target)
        row = parameter[0].nbytes if name in FUSED else 0
        assert box.view(load_map.arena(dtype)).data_ptr() == parameter.data_ptr() + start * row


@LIGHT
@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.floats(0, 1), st.sampled_from([3, 7, 1 << 22]))
def test_writes_make_exactly_the_update_live(seed: int, dtype: torch.dtype, share: float, slice_: int) -> None:
    old = make_tensors(seed, dtype)
    new = perturbed(old, np.random.default_rng(seed), share)
    model = Model(dtype)
    model.load_weights(old.items())
    load_map = map_of(model, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "SLICE", slice_)
        pieces = differences(flat(old), flat(new), dtypes_of(new))
    before = total(load_map)
    writes = joined([placed(runs_of([piece]), load_map, False) for piece in pieces], load_map)
    assert same_bits(model.live(), old), "nothing is written before it is told to"
    assert len(writes.scatters) <= 1, "one launch for all tensors"
    writes.write()
    assert same_bits(model.live(), new)
    assert total(load_map) == (before + sum(writes.gained.values())) % (1 << 64) == fingerprint.model_sum(new.items())
    for name, tensor in new.items():
        assert torch.equal(load_map.read(name, 0, tensor.numel()), fingerprint.bits_of(tensor).reshape(-1))


@pytest.mark.parametrize("scattered", [0, 1 << 16])
def test_dense_pieces_are_written_by_copies_or_scattered_and_count_the_same(
    scattered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.sglang.writes.SCATTERED", scattered)
    monkeypatch.setattr(parts_module, "SLICE", 7)
    old, new = make_tensors(0), make_tensors(1)
    for models in ([Model()], [Shard(rank, 4) for rank in range(4)]):
        traces = [trace(model.named_parameters(), model.load_weights, tensor_shapes()) for model in models]
        counted = 0
        for rank, (model, traced) in enumerate(zip(models, traces, strict=True)):
            fresh = type(model)(*((rank, 4) if isinstance(model, Shard) else ()))
            fresh.load_weights(new.items())
            model.load_weights(old.items())
            load_map = LoadMap(traced, rank, [each.rows() for each in traces])
            before = load_map.live_sums()
            pieces = [p for name, bits in flat(new).items() for p in dense_pieces(name, torch.bfloat16, bits)]
            change, anchor = (joined([placed(runs_of(pieces), load_map, flag)], load_map) for flag in (False, True))
            assert anchor.covered == load_map.elements
            change.write()
            assert same_bits(dict(model.named_parameters()), dict(fresh.named_parameters()))
            assert load_map.live_sums() == anchor.gained
            assert anchor.gained == {k: (before[k] + gain) % (1 << 64) for k, gain in change.gained.items()}
            counted += sum(n for holders, n in anchor.gained.items() if holders[0] == rank)
        assert counted % (1 << 64) == fingerprint.model_sum(new.items())


def test_tensors_without_a_sparse_form_are_placed_too() -> None:
    """Those of other widths than floats have."""
    old = {"wide": torch.arange(12).reshape(3, 4), "narrow": torch.arange(7, dtype=torch.uint8)}
    new = {name: tensor + 3 for name, tensor in old.items()}
    live = {name: tensor.clone() for name, tensor in old.items()}

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            live[name].copy_(tensor)

    load_map = LoadMap(trace(live.items(), load, {name: TensorShape(t.shape, t.dtype) for name, t in old.items()}))
    pieces = [p for name, bits in flat(new).items() for p in dense_pieces(name, new[name].dtype, bits)]
    writes = joined([placed(runs_of(pieces), load_map, False)], load_map)
    before = total(load_map)
    writes.write()
    assert same_bits(live, new)
    assert total(load_map) == (before + sum(writes.gained.values())) % (1 << 64) == fingerprint.model_sum(new.items())


@pytest.mark.parametrize("scattered", [0, 1 << 16])
def test_a_head_that_is_loaded_twice_into_its_own_memory_is_held_twice(
    scattered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.sglang.writes.SCATTERED", scattered)

    class Untied(Model):
        """Its checkpoint has one embedding, which it copies to two parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Parameter(torch.zeros_like(self.embed), requires_grad=False)

        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            super().load_one(name, tensor)
            if name == "embed":
                self.head.data.copy_(tensor)

    model, tensors = Untied(), make_tensors(0)
    model.load_weights(tensors.items())
    load_map = traced(model)
    assert [holders for _, holders in load_map.held["embed"]] == [(0,), ()]
    new = tensors | {"embed": make_tensors(1)["embed"]}
    writes = write(load_map, tensors, new)
    assert same_bits({"a": model.embed.data, "b": model.head.data}, {"a": new["embed"], "b": new["embed"]})
    assert total(load_map) == fingerprint.model_sum(new.items()), "it counts once"
    assert writes.covered <= new["embed"].numel()
    pieces = [p for name, bits in flat(tensors).items() for p in dense_pieces(name, torch.bfloat16, bits)]
    joined([placed(runs_of(pieces), load_map, False)], load_map).write()
    assert same_bits({"a": model.embed.data, "b": model.head.data}, {"a": tensors["embed"], "b": tensors["embed"]})
    assert total(load_map) == fingerprint.model_sum(tensors.items())
    fingerprint.bits_of(model.head.data).view(-1)[3] ^= 1
    with pytest.raises(WeightsError, match="embed"):
        load_map.live_sums()


def test_a_fused_piece_does_not_reach_into_its_neighbours() -> None:
    model, tensors = Model(), make_tensors(0)
    model.load_weights(tensors.items())
    new = tensors | {"k": make_tensors(1)["k"]}
    write(traced(model), tensors, new)
    assert same_bits(model.live(), new)


class Doubling(Model):
    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor * 2 if name == "norm" else tensor)


class Casting(Model):
    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor.float() if name == "norm" else tensor)


class Transposing(Model):
    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.zeros(SHAPES["down"][::-1], dtype=torch.bfloat16), requires_grad=False)

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor.t() if name == "down" else tensor)


class Broadcasting(Model):
    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor)
        if name == "scale":
            self.norm.data.copy_(tensor)


class Halving(Model):
    """Takes only the first rows of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16), requires_grad=False)
        self.head = self.embed

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor[:3] if name == "embed" else tensor)


class Reversing(Model):
    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor.flip(0) if name == "norm" else tensor)


class Afterwards(Model):
    """Changes in place what it has just copied."""

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        super().load_one(name, tensor)
        if name == "norm":
            self.norm.data.add_(1)


class Interleaving(Model):
    """Keeps q, k, v side by side instead of one below the other, as a transposed fused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        if name in ("q", "k", "v"):
            self.qkv.data.narrow(1, FUSED[name][1], tensor.shape[0]).copy_(tensor.t())
        else:
            super().load_one(name, tensor)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Doubling, "norm"),
        (Casting, "norm"),
        (Reversing, "norm"),
        (Broadcasting, "norm"),
        (Transposing, "down"),
        (Interleaving, "q"),
        (Halving, "embed"),
        (Afterwards, "norm"),
    ],
)
def test_a_model_that_does_not_keep_a_tensor_as_it_is_is_refused_by_name(model: type[Model], name: str) -> None:
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.5)
    assert name in refusal(made)


@pytest.mark.parametrize("dropped", sorted(SHAPES))
def test_a_tensor_that_the_model_drops_is_refused_by_name(dropped: str) -> None:
    class Dropping(Model):
        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            if name != dropped:
                super().load_one(name, tensor)

    assert f"no {dropped} " in refusal(Dropping())


def test_a_tensor_that_the_model_never_heard_of_is_refused_by_name() -> None:
    class Tolerant(Model):
        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            if name in SHAPES:
                super().load_one(name, tensor)

    text = refusal(Tolerant(), tensor_shapes() | {"rotary.inv_freq": TensorShape((4,), torch.bfloat16)})
    assert "rotary.inv_freq" in text


def test_a_parameter_that_is_in_no_checkpoint_tensor_is_refused_by_name() -> None:
    model = Model()
    model.register_parameter("bias", torch.nn.Parameter(torch.ones(3), requires_grad=False))
    assert "bias" in refusal(model)


@pytest.mark.parametrize("checkpoint", DTYPES, ids=str)
@pytest.mark.parametrize("engine", DTYPES, ids=str)
def test_a_model_of_another_dtype_than_its_checkpoint_is_refused(checkpoint: torch.dtype, engine: torch.dtype) -> None:
    model = Model(engine)
    if checkpoint == engine:
        traced(model, tensor_shapes(checkpoint))
    else:
        assert "dtype" in refusal(model, tensor_shapes(checkpoint))


def test_one_parameter_of_another_dtype_among_many_copies_is_refused() -> None:
    class WideHead(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Parameter(torch.zeros(SHAPES["embed"]), requires_grad=False)

        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            super().load_one(name, tensor)
            if name == "embed":
                self.head.data.copy_(tensor)

    assert "embed" in refusal(WideHead())


def test_a_model_that_pads_its_vocabulary_is_updated_and_its_padding_left_alone() -> None:
    class Padded(Model):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Parameter(torch.full((8, 4), 7.0, dtype=torch.bfloat16), requires_grad=False)
            self.head = self.embed

        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            if name == "embed":
                self.embed.data[: tensor.shape[0]].copy_(tensor)
            else:
                super().load_one(name, tensor)

    model, tensors = Padded(), make_tensors(0)
    model.load_weights(tensors.items())
    new = tensors | {"embed": make_tensors(1)["embed"]}
    write(traced(model), tensors, new)
    assert same_bits({"": model.embed.data[:6]}, {"": new["embed"]})
    assert bool((model.embed.data[6:] == 7.0).all())


def test_a_model_may_take_its_tensors_in_any_order_and_as_a_generator() -> None:
    class Backwards(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            super().load_weights((name, tensor) for name, tensor in reversed(list(weights)))

    tensors: Tensors = make_tensors(0)
    model = Backwards()
    model.load_weights(tensors.items())
    assert total(traced(model)) == fingerprint.model_sum(tensors.items())
