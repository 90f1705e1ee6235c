"""The chain of versions: from whatever an engine holds to the newest, bit for bit, and never a wrong hash."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import (
    FIRST,
    RUN,
    SHAPES,
    Tensors,
    bits_of,
    hash_of,
    make_chain,
    make_tensors,
    perturbed,
    same_bits,
)

from engines.weights import codec, fingerprint
from engines.weights.chain import Chain, Update, snapshot_parts, snapshot_tensors
from stream_rl import wire
from stream_rl.errors import WeightsError
from stream_rl.messages import Snapshot, UpdatePart
from stream_rl.types import Version

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def travelled(part: UpdatePart) -> UpdatePart:
    decoded: UpdatePart = wire.decode([bytes(frame) for frame in wire.encode(part)])
    return decoded


def applied(update: Update, held: Tensors | None, order: int = 0) -> Tensors:
    """What an engine that holds `held` has after an update whose parts came in some order."""
    parts = [travelled(part) for part in update.parts]
    random.Random(order).shuffle(parts)
    assert sorted(part.part for part in parts) == list(range(parts[0].parts))
    assert {(p.run, p.base, p.target, p.anchor, p.parts, p.target_hash) for p in parts} == {
        (RUN, update.base, update.target, update.anchor, len(parts), parts[0].target_hash)
    }
    new = {} if held is None else {name: tensor.clone() for name, tensor in held.items()}
    for part in parts:
        offset = 0
        for name, code, sizes, dtype in zip(part.names, part.codes, part.sizes, part.dtypes, strict=True):
            ends = list(itertools.accumulate(sizes, initial=offset))
            buffers = [part.payload[start:end] for start, end in itertools.pairwise(ends)]
            offset += sum(sizes)
            shape = SHAPES[name]
            elements = int(np.prod(shape, dtype=np.int64))
            decoded = codec.decode(name, getattr(torch, dtype), elements, code, buffers)
            if decoded.indices is None:
                new[name] = decoded.bits.clone().view(decoded.dtype).reshape(shape)
            else:
                fingerprint.bits_of(new[name]).view(-1)[decoded.indices] = decoded.bits
        assert offset == part.payload.size
    return new


def hash_stated(update: Update) -> str:
    [text] = {part.target_hash for part in update.parts}
    return text


def history(seed: int, dtype: torch.dtype, count: int) -> list[Tensors]:
    """Versions that change much, little, not at all."""
    rng = np.random.default_rng(seed)
    line = [make_tensors(seed, dtype)]
    for _ in range(count - 1):
        line.append(perturbed(line[-1], rng, float(rng.choice([0.0, 0.02, 0.1, 0.5, 1.0]))))
    return line


@LIGHT
@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.integers(1, 200), st.integers(0, 6), st.integers(2, 7))
def test_updates_lead_from_every_held_version_to_the_newest_bit_for_bit(
    seed: int, dtype: torch.dtype, part_bytes: int, keep: int, count: int
) -> None:
    line = history(seed, dtype, count)
    chain = Chain(RUN, part_bytes, keep)
    for step, tensors in enumerate(line):
        chain.advance(Version(0, step), bits_of(tensors))
        assert chain.version == Version(0, step)
        assert chain.hashes[Version(0, step)] == hash_of(tensors)
    newest = Version(0, count - 1)
    for start, tensors in enumerate(line):
        held, version, hops = tensors, Version(0, start), 0
        while (update := chain.update_from(version)) is not None:
            assert update.anchor or update.base == version
            held, version = applied(update, None if update.anchor else held, seed + hops), update.target
            assert hash_stated(update) == chain.hashes[version] == hash_of(held)
            assert same_bits(held, line[version.step])
            hops += 1
            assert hops < count + 1
        assert version == newest and same_bits(held, line[-1])
        lag = count - 1 - start
        assert hops == (lag if lag <= keep else 1), "deltas as far as they are kept, one anchor beyond"


def test_the_newest_version_needs_nothing_and_an_unknown_one_an_anchor() -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors)
    assert chain.update_from(FIRST) is None
    for held in (Version(0, 7), Version(3, 0), Version(-1, 0)):
        update = chain.update_from(held)
        assert update is not None and update.anchor and update.base == update.target == FIRST
        assert same_bits(applied(update, None), tensors)


def test_an_anchor_is_made_once_a_version_and_does_not_change_with_the_next() -> None:
    line = history(1, torch.bfloat16, 3)
    chain = make_chain(line[0])
    anchor = chain.anchor()
    assert chain.anchor() is anchor
    chain.advance(Version(0, 1), bits_of(line[1]))
    chain.advance(Version(0, 2), bits_of(line[2]))
    assert same_bits(applied(anchor, None), line[0]) and hash_stated(anchor) == hash_of(line[0])
    assert same_bits(applied(chain.anchor(), None), line[2])


def test_a_version_without_a_change_is_still_a_version() -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors)
    chain.advance(Version(0, 1), bits_of(tensors))
    update = chain.update_from(FIRST)
    assert update is not None and not update.anchor and update.changed == 0 and update.bytes == 0
    assert len(update.parts) == 1 and hash_stated(update) == chain.hashes[FIRST] == chain.hashes[Version(0, 1)]
    assert same_bits(applied(update, tensors), tensors)


@pytest.mark.parametrize("version", [FIRST, Version(0, 4), Version(0, 5), Version(-1, 99)])
def test_a_version_that_is_not_newer_is_refused(version: Version) -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors, version=Version(0, 5))
    with pytest.raises(WeightsError, match="only grow"):
        chain.advance(version, bits_of(make_tensors(1)))
    assert chain.version == Version(0, 5) and same_bits(applied(chain.anchor(), None), tensors)


def drop_one(bits: dict[str, Any]) -> None:
    del bits["norm"]


def add_one(bits: dict[str, Any]) -> None:
    bits["bias"] = bits["norm"]


def other_dtype(bits: dict[str, Any]) -> None:
    bits["scale"] = (torch.float16, bits["scale"][1])


def other_size(bits: dict[str, Any]) -> None:
    bits["scale"] = (torch.bfloat16, torch.zeros(2, dtype=torch.int16))


@pytest.mark.parametrize("damage", [drop_one, add_one, other_dtype, other_size])
def test_a_version_with_other_tensors_is_refused_and_changes_nothing(damage: Callable[[dict[str, Any]], None]) -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors)
    bits = bits_of(make_tensors(1))
    damage(bits)
    with pytest.raises(WeightsError):
        chain.advance(Version(0, 1), bits)
    assert chain.version == FIRST and list(chain.hashes) == [FIRST]
    assert chain.update_from(FIRST) is None
    anchor = chain.anchor()
    assert same_bits(applied(anchor, None), tensors)
    assert hash_stated(anchor) == hash_of(tensors)
    new = make_tensors(2)
    chain.advance(Version(0, 1), bits_of(new))
    update = chain.update_from(FIRST)
    assert update is not None and same_bits(applied(update, tensors), new) and hash_stated(update) == hash_of(new)


def test_a_version_of_a_new_history_follows_and_engines_of_the_old_one_get_an_anchor() -> None:
    line = history(3, torch.bfloat16, 3)
    chain = make_chain(line[0], version=Version(0, 4))
    chain.advance(Version(0, 5), bits_of(line[1]))
    chain.advance(Version(1, 3), bits_of(line[2]))
    for held in (Version(0, 4), Version(0, 5), Version(0, 6)):
        update = chain.update_from(held)
        assert update is not None and update.anchor, f"{held} is of another history than {chain.version}"
        assert same_bits(applied(update, None), line[2])


def test_what_is_kept_is_bounded() -> None:
    line = history(4, torch.bfloat16, 12)
    chain = make_chain(line[0], keep=3)
    for step in range(1, 12):
        chain.advance(Version(0, step), bits_of(line[step]))
    deltas = [step for step in range(11) if not (update := chain.update_from(Version(0, step))) or not update.anchor]
    assert deltas == [8, 9, 10]


@pytest.mark.parametrize("part_bytes", [1, 16, 64, 1 << 20])
def test_parts_hold_about_as_much_as_they_should(part_bytes: int) -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors, part_bytes)
    chain.advance(Version(0, 1), bits_of(make_tensors(1)))
    largest = max(tensor.nbytes for tensor in tensors.values())
    for update in (chain.anchor(), chain.update_from(FIRST)):
        assert update is not None
        sizes = [part.payload.size for part in update.parts]
        assert all(size < part_bytes + largest for size in sizes)
        assert all(size >= part_bytes for size in sizes[:-1]), "a part is not sent half empty"
        assert sum(sizes) == update.bytes


def test_figures_of_a_chain_are_those_of_its_tensors() -> None:
    tensors = make_tensors(0, torch.float32)
    chain = make_chain(tensors)
    assert chain.elements == sum(t.numel() for t in tensors.values())
    assert chain.full_bytes == 4 * chain.elements == chain.anchor().bytes
    assert chain.anchor().changed == chain.elements


# -- snapshots ---------------------------------------------------------------------------------------------------------


@LIGHT
@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.integers(1, 300))
def test_snapshots_come_back_bit_for_bit_in_any_order(seed: int, dtype: torch.dtype, part_bytes: int) -> None:
    tensors = make_tensors(seed, dtype)
    parts = snapshot_parts(RUN, Version(0, 1), tensors.items(), part_bytes)
    assert [(part.part, part.parts) for part in parts] == [(i, len(parts)) for i in range(len(parts))]
    random.Random(seed).shuffle(parts)
    found = {}
    for part in parts:
        arrived = wire.decode([bytes(frame) for frame in wire.encode(part)])
        for name, (back, bits) in snapshot_tensors(arrived).items():
            found[name] = bits.view(back).reshape(SHAPES[name])
        arrived.payload[:] = 0
    assert same_bits({name: found[name] for name in tensors}, tensors)


def test_a_snapshot_is_a_copy_and_reads_views_in_order() -> None:
    tensor = make_tensors(0, torch.float32, {"w": (4, 6)})["w"]
    whole = {"w": tensor.clone()}
    [part] = snapshot_parts(RUN, FIRST, [("w", tensor.t().contiguous().t())], 1 << 20)
    [aliasing] = snapshot_parts(RUN, FIRST, [("w", tensor)], 1 << 20)
    tensor.zero_()
    for each in (part, aliasing):
        dtype, bits = snapshot_tensors(each)["w"]
        assert same_bits({"w": bits.view(dtype).reshape(4, 6)}, whole)


def test_a_tensor_without_elements_travels_like_any_other() -> None:
    tensors = {"w": torch.ones(2), "empty": torch.zeros(0, 3), "x": torch.ones(3)}
    found = {}
    for part in snapshot_parts(RUN, FIRST, tensors.items(), 4):
        found |= snapshot_tensors(part)
    assert {name: bits.numel() for name, (_, bits) in found.items()} == {"w": 2, "empty": 0, "x": 3}


def test_a_model_without_tensors_is_one_empty_snapshot() -> None:
    [part] = snapshot_parts(RUN, FIRST, [], 10)
    assert snapshot_tensors(part) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"dtypes": ["float33"]},
        {"dtypes": ["Tensor"]},
        {"dtypes": [""]},
        {"dtypes": ["complex128"]},
        {"dtypes": ["float64"]},
        {"dtypes": ["float16"]},
        {"shapes": [[2, 3, 2]]},
        {"shapes": [[5]]},
        {"shapes": [[-6]]},
        {"shapes": [[2**40, 2**40]]},
        {"shapes": [[0]]},
        {"shapes": []},
        {"names": []},
        {"names": ["w", "w"]},
        {"payload": np.zeros(23, np.uint8)},
        {"payload": np.zeros(25, np.uint8)},
        {"payload": np.zeros(0, np.uint8)},
    ],
    ids=lambda change: "-".join(
        f"{key}={value if isinstance(value, list) else value.size}" for key, value in change.items()
    ),
)
def test_a_snapshot_whose_payload_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"run": RUN, "version": FIRST, "part": 0, "parts": 1}
    fields |= {"names": ["w"], "dtypes": ["float32"], "shapes": [[2, 3]], "payload": np.zeros(24, np.uint8)}
    assert snapshot_tensors(Snapshot(**fields))["w"][1].numel() == 6
    with pytest.raises(WeightsError):
        snapshot_tensors(Snapshot(**(fields | change)))
