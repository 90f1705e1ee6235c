"""Staging: all of an update or none of it, and only the one that leads to the stated fingerprint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from staging_builders import (
    SECOND,
    THIRD,
    again,
    anchor,
    assert_still_updates,
    delta,
    line_of,
    recomputed,
    untouched,
)
from update_builders import anchor_parts, change_parts
from weights_builders import (
    FIRST,
    FUSED,
    HIDDEN,
    INNER,
    SHAPES,
    commit,
    hash_of,
    make_live,
    same_bits,
    take,
)

from engines.weights import fingerprint
from engines.weights.codes.payload import Code
from engines.weights.parts import relabelled
from stream_rl.errors import WeightsError
from stream_rl.types import Version

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@LIGHT
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.integers(1, 120),
    st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    st.sampled_from(list(Code)),
)
def test_a_run_of_updates_in_any_order_of_parts_with_repeats_is_live_bit_for_bit(
    seed: int, dtype: torch.dtype, part_bytes: int, share: float, code: Code
) -> None:
    line = line_of(seed, 4, share, dtype)
    live, model = make_live(line[0])
    rng = random.Random(seed)
    assert live.weights_hash == hash_of(line[0]) and live.replicas == {}
    for step, tensors in enumerate(line[1:], 1):
        target = Version(0, step)
        parts = change_parts(line[step - 1], tensors, live.version, target, code, part_bytes)
        if rng.random() < 0.3:
            parts = anchor_parts(tensors, target, part_bytes)
        parts = [relabelled(part, i, len(parts), hash_of(tensors)) for i, part in enumerate(parts)]
        parts = rng.sample(parts, len(parts))
        repeats = [part for part in parts[:-1] for _ in range(rng.choice([1, 1, 2, 3]))]
        assert take(live, repeats) is None
        assert take(live, parts[-1:]) == target and live.staged == (target, 0)
        assert same_bits(model.live(), line[step - 1]) and live.version == Version(0, step - 1)
        commit(live, target)
        assert same_bits(model.live(), tensors) and live.version == target and live.staged is None
        assert live.live == (target, 0)
        assert live.weights_hash == hash_of(tensors)
        assert live.recompute() and live.weights_hash == hash_of(tensors)


def test_a_commit_writes_on_the_forward_stream_and_flips_the_version_after() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    seen: list[str] = []

    @contextmanager
    def stream() -> Iterator[None]:
        seen.append(f"in at {live.version}")
        assert same_bits(model.live(), line[0])
        yield
        assert same_bits(model.live(), line[1])
        seen.append(f"out at {live.version}")

    take(live, delta(line))
    assert live.commit(SECOND, 0, stream) >= 0.0
    assert seen == ["in at 0.0", "out at 0.0"] and live.version == SECOND and live.stage_seconds >= 0.0


def test_live_memory_is_written_in_place() -> None:
    line = line_of(0, 2, share=1.0)
    live, model = make_live(line[0])
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    take(live, anchor(line))
    commit(live, SECOND)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert model.head is model.embed


@pytest.mark.parametrize("target", [FIRST, SECOND, THIRD])
def test_a_commit_of_what_is_not_staged_is_refused(target: Version) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    with untouched(live, model), pytest.raises(WeightsError, match="asked to make"):
        commit(live, target)
    update = delta(line)
    with untouched(live, model):
        assert take(live, update[:-1]) is None
        with pytest.raises(WeightsError, match="asked to make"):
            commit(live, SECOND)
    take(live, update[-1:])
    if target != SECOND:
        with pytest.raises(WeightsError, match="asked to make"):
            commit(live, target)
        assert same_bits(model.live(), line[0])
    commit(live, SECOND)
    with pytest.raises(WeightsError, match="asked to make"):
        commit(live, SECOND)
    assert same_bits(model.live(), line[1])


def test_missing_parts_stage_nothing_however_often_the_others_come() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    parts = delta(line)
    assert len(parts) > 3
    for missing in range(len(parts)):
        rest = [part for part in parts if part.part != missing]
        with untouched(live, model):
            assert take(live, [*rest, *reversed(rest), *rest]) is None
        assert take(live, anchor(line_of(1, 2))[:1]) is None, "something else begins"
    assert_still_updates(live, model, line)


def test_parts_of_two_updates_never_mix() -> None:
    line = line_of(0, 3)
    live, model = make_live(line[0])
    small, newest, older = delta(line), anchor(line), anchor(line[:2])
    for first, second in ((small, newest), (newest, small), (older, newest), (newest, older), (small, older)):
        n = min(len(first), len(second))
        with untouched(live, model):
            assert take(live, [*first[: n // 2], *second[n // 2 : n - 1]]) is None
            zipped = [parts[i] for i in range(n - 1) for parts in (first, second)]
            assert take(live, zipped) is None
    assert take(live, [*small[:2], *newest]) == THIRD
    commit(live, THIRD)
    assert same_bits(model.live(), line[2]) and recomputed(live) == hash_of(line[2])


def test_a_delta_and_an_anchor_to_the_same_version_never_mix() -> None:
    line = line_of(0, 2, share=1.0)
    live, model = make_live(line[0])
    small, whole = delta(line, part_bytes=1), anchor(line, part_bytes=1)
    assert len(small) == len(whole) == len(SHAPES)
    with untouched(live, model):
        assert take(live, small[1:]) is None
        assert take(live, whole[:1]) is None
    assert take(live, whole[1:]) == SECOND


def test_a_staged_update_that_comes_again_changes_nothing_and_a_newer_attempt_replaces_it() -> None:
    line = line_of(0, 3)
    live, model = make_live(line[0])
    take(live, again(delta(line)))
    assert take(live, again(delta(line))) == SECOND, "sent again: it is there already"
    assert live.staged == (SECOND, 1) and live.attempt == 1 and same_bits(model.live(), line[0])
    assert take(live, again(anchor(line), 2)) == THIRD and live.staged == (THIRD, 2)
    for part in again(delta(line)):
        assert not live.receive(part), "of an attempt that was given up: nobody waits for an answer"
    assert live.staged == (THIRD, 2)
    commit(live, THIRD, 2)
    assert same_bits(model.live(), line[2])


def test_a_part_that_comes_again_after_its_commit_is_taken_again_and_does_nothing() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    update = delta(line)
    take(live, update)
    commit(live, SECOND)
    with untouched(live, model):
        assert take(live, update) is None
    with untouched(live, model), pytest.raises(WeightsError, match="needs version"):
        take(live, again(update))


def test_a_replaced_update_can_be_committed_as_long_as_its_base_is_live() -> None:
    """Rank 0 may have ordered it before its publisher was gone and another one sent something else."""
    line = line_of(0, 3)
    live, model = make_live(line[0])
    take(live, again(delta(line), 5))
    live.forget_staged()
    assert live.staged is None and live.attempt is None
    *most, last = again(anchor(line), 1)
    assert take(live, most) is None
    commit(live, SECOND, 5)
    assert same_bits(model.live(), line[1]) and live.weights_hash == hash_of(line[1])
    take(live, [last])
    assert live.staged == (THIRD, 1), "an anchor is right whatever was live"
    commit(live, THIRD, 1)
    assert same_bits(model.live(), line[2]) and recomputed(live) == hash_of(line[2])


def test_a_delta_that_was_begun_before_a_commit_is_not_finished_after_it() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    take(live, again(delta(line), 5))
    live.forget_staged()
    *most, last = again(delta(line), 6)
    take(live, most)
    commit(live, SECOND, 5)
    with untouched(live, model), pytest.raises(WeightsError, match="needs version"):
        take(live, [last])
    live, _ = make_live(line[0])
    take(live, again(delta(line), 5))
    live.forget_staged()
    take(live, again(anchor(line[:1]), 6))
    commit(live, FIRST, 6)
    with pytest.raises(WeightsError, match="asked to make"):
        commit(live, SECOND, 5)


def test_a_commit_that_fails_leaves_the_way_open_for_an_anchor() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    take(live, delta(line))

    @contextmanager
    def broken() -> Iterator[None]:
        raise RuntimeError("the device is gone")
        yield

    with pytest.raises(RuntimeError, match="gone"):
        live.commit(SECOND, 0, broken)
    assert live.version == FIRST and live.live is None
    assert take(live, again(anchor(line))) == SECOND
    commit(live, SECOND, 1)
    assert same_bits(model.live(), line[1]) and recomputed(live) == hash_of(line[1])


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_recomputation_sees_a_flipped_bit_that_no_delta_touched(name: str) -> None:
    line = line_of(0, 1)
    live, model = make_live(line[0])
    line.append(line[0])
    stated = live.weights_hash
    parameter = getattr(model, FUSED.get(name, (name, 0))[0])
    fingerprint.bits_of(parameter.data).view(-1)[-1] ^= 1
    assert take(live, delta(line)) == SECOND, "an empty delta does not look"
    commit(live, SECOND)
    assert live.weights_hash == stated, "the incremental fingerprint does not look either"
    assert recomputed(live) != stated
    assert live.weights_hash == hash_of(model.live())
    take(live, anchor(line))
    commit(live, SECOND)
    assert recomputed(live) == stated and same_bits(model.live(), line[0])


def test_a_delta_over_a_flipped_bit_is_refused() -> None:
    line = line_of(0, 1)
    live, model = make_live(line[0])
    changed = {name: tensor.clone() for name, tensor in line[0].items()}
    fingerprint.bits_of(changed["up"]).view(-1)[2] ^= 4
    line.append(changed)
    fingerprint.bits_of(model.gate_up.data).view(-1)[INNER * HIDDEN + 2] ^= 1
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, delta(line))
