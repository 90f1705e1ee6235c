"""Tensor-parallel ranks: each holds its share, together they hold everything once, and what they share is equal."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from staging_builders import SECOND, again, anchor, delta, line_of, resealed
from update_builders import anchor_parts, change_parts
from weights_builders import (
    SHAPES,
    Model,
    Shard,
    commit,
    hash_of,
    make_shards,
    make_tensors,
    same_bits,
    take,
    tensor_shapes,
)

from engines.sglang.load_map import LoadMap, refuse_derived, trace
from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from engines.weights import parts as parts_module
from engines.weights.codes.payload import Code
from engines.weights.parts import relabelled
from engines.weights.recipient import combined
from stream_rl.errors import WeightsError
from stream_rl.messages import HashReport
from stream_rl.types import Version

LIGHT = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def said(shards: list[tuple[LiveWeights, Model]]) -> tuple[str, str]:
    """What the publisher makes of what all ranks say: the model's fingerprint, and what contradicts it."""
    return combined({
        rank: HashReport(
            engine="e", incarnation=1, rank=rank, version=live.version, weights_hash=live.weights_hash,
            replicas=live.replicas,
        )
        for rank, (live, _) in enumerate(shards)
    })  # fmt: skip


def assert_holds(shards: list[tuple[LiveWeights, Model]], tensors: dict[str, torch.Tensor]) -> None:
    """The same bits as ranks that loaded `tensors` from the start, and the same fingerprint as one that holds all."""
    for rank, (_, model) in enumerate(shards):
        fresh = Shard(rank, len(shards), tensors["embed"].dtype)
        fresh.load_weights(tensors.items())
        assert same_bits(dict(model.named_parameters()), dict(fresh.named_parameters()))
    assert said(shards) == (hash_of(tensors), "")
    for live, _ in shards:
        assert live.recompute()
    assert said(shards) == (hash_of(tensors), "")


@LIGHT
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([3, 7, 1 << 22]),
    st.sampled_from([0, 1 << 16]),
)
def test_updates_reach_every_shard_bit_for_bit(
    seed: int, ranks: int, dtype: torch.dtype, share: float, slice_: int, scattered: int
) -> None:
    line, rng = line_of(seed, 4, share, dtype), random.Random(seed)
    shards = make_shards(line[0], ranks)
    assert_holds(shards, line[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "SLICE", slice_)
        patch.setattr("engines.sglang.writes.SCATTERED", scattered)
        for step, (old, new) in enumerate(itertools.pairwise(line), 1):
            target = Version(0, step)
            parts = change_parts(old, new, Version(0, step - 1), target, part_bytes=30, sources=rng.choice([1, 2]))
            if rng.random() < 0.3:
                parts = anchor_parts(new, target, 30)
            parts = [relabelled(part, i, len(parts), hash_of(new)) for i, part in enumerate(parts)]
            for live, _ in shards:
                assert take(live, rng.sample(parts, len(parts))) == target
            for live, _ in shards:
                commit(live, target)
            assert_holds(shards, new)


def test_what_ranks_hold_alike_is_stated_by_each_and_counted_once() -> None:
    tensors = make_tensors(0)
    two, four = make_shards(tensors, 2), make_shards(tensors, 4)
    assert [set(live.replicas) for live, _ in two] == [{"0,1"}, {"0,1"}]
    kv = [{"0,1,2,3", "0,1"}, {"0,1,2,3", "0,1"}, {"0,1,2,3", "2,3"}, {"0,1,2,3", "2,3"}]
    assert [set(live.replicas) for live, _ in four] == kv, "two heads of k and v on four ranks"
    whole = {name: tensors[name] for name in ("norm", "scale")}
    assert {live.replicas["0,1"] for live, _ in two} == {hash_of(whole)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_replica_that_differs_is_seen(ranks: int) -> None:
    shards = make_shards(make_tensors(0), ranks)
    live, model = shards[-1]
    fingerprint.bits_of(model.norm.data)[1] ^= 1
    assert live.recompute()
    assert said(shards)[1] == f"ranks {','.join(map(str, range(ranks)))} hold different copies of the same weights"
    assert said(shards)[0] == hash_of(make_tensors(0)), "the first rank's counts"


def test_a_flipped_bit_of_any_shard_changes_the_sum() -> None:
    for rank, name in itertools.product(range(2), ("embed", "qkv", "gate_up", "down")):
        shards = make_shards(make_tensors(0), 2)
        fingerprint.bits_of(getattr(shards[rank][1], name).data).view(-1)[0] ^= 1
        for live, _ in shards:
            assert live.recompute()
        assert said(shards)[0] != hash_of(make_tensors(0))


def test_only_the_publisher_can_tell_a_wrong_fingerprint_of_several_ranks() -> None:
    line = line_of(0, 2)
    shards = make_shards(line[0], 2)
    wrong = [resealed(part, target_hash=hash_of(line[0])) for part in delta(line)]
    for live, _ in shards:
        assert take(live, wrong) == SECOND
        commit(live, SECOND)
    assert said(shards) == (hash_of(line[1]), "")


def test_the_small_code_is_refused_by_name_where_a_tensor_is_divided() -> None:
    line = line_of(0, 2)
    [(live, _), _] = make_shards(line[0], 2)
    with pytest.raises(WeightsError, match="is divided over the ranks of this engine"):
        take(live, change_parts(line[0], line[1], Version(0, 0), SECOND, Code.SMALL))


def test_a_rank_carries_out_what_another_ordered_before_its_publisher_was_gone() -> None:
    line = line_of(0, 3)
    shards = make_shards(line[0], 2)
    for live, _ in shards:
        take(live, again(delta(line), 5))
    shards[1][0].forget_staged()
    take(shards[1][0], again(anchor(line), 1 << 32)[:2])
    for live, _ in shards:
        commit(live, SECOND, 5)
    assert_holds(shards, line[1])
    assert shards[1][0].attempt == 1 << 32


# -- what does not fit -------------------------------------------------------------------------------------------------


def traced(model: Model) -> torch.Tensor:
    return trace(model.named_parameters(), model.load_weights, tensor_shapes()).rows()


def test_ranks_that_hold_overlapping_parts_are_refused_by_name() -> None:
    class Overlapping(Shard):
        def load_one(self, name: str, tensor: torch.Tensor) -> None:
            if name == "q" and self.rank == 1:
                self.qkv.data.narrow(0, 0, 2).copy_(tensor.narrow(0, 1, 2))
            else:
                super().load_one(name, tensor)

    models = [Overlapping(rank, 2) for rank in range(2)]
    own = trace(models[0].named_parameters(), models[0].load_weights, tensor_shapes())
    with pytest.raises(WeightsError, match=r"ranks \(0,\) and \(1,\) hold parts of q that overlap"):
        LoadMap(own, 0, [traced(model) for model in models])


@pytest.mark.parametrize("name", ["embed", "q", "gate", "down"])
def test_a_part_that_no_rank_holds_is_refused_by_name(name: str) -> None:
    model = Shard(0, 2)
    own = trace(model.named_parameters(), model.load_weights, tensor_shapes())
    other = [row for row in traced(Shard(1, 2)).tolist() if sorted(SHAPES)[row[0]] != name]
    size = int(np.prod(SHAPES[name]))
    with pytest.raises(WeightsError, match=f"hold {size // 2} of {size} elements of {name}; all must be live"):
        LoadMap(own, 0, [own.rows(), torch.tensor(other)])


class Absorbing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.Linear(2, 2)
        self.attention.w_kc = torch.zeros(2)  # type: ignore[assignment]


class Quantised(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(2, 2)
        self.mlp.quant_method = type("Fp8LinearMethod", (), {})()


class Configured(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant_config = type("Fp8Config", (), {})()


class Deriving(torch.nn.Module):
    def post_load_weights(self) -> None: ...


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(2, 2)
        self.mlp.use_intel_amx_backend = True


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Absorbing, "attention keeps w_kc"),
        (Quantised, r"mlp is quantised \(Fp8LinearMethod\)"),
        (Configured, r"quantised \(Fp8Config\)"),
        (Deriving, "Deriving derives weights"),
        (Packed, "mlp keeps use_intel_amx_backend"),
    ],
)
def test_a_model_with_derived_weights_is_refused_by_name(model: type[torch.nn.Module], says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        refuse_derived(model())


def test_a_plain_model_is_not_refused() -> None:
    plain = Model()
    plain.quant_config = None
    plain.method = type("UnquantizedLinearMethod", (), {})()
    refuse_derived(plain)
