"""The chain of versions: from whatever an engine holds to the newest, bit for bit, and never a wrong hash."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_builders import (
    anchor_parts,
    applied,
    change_parts,
    hash_stated,
    make_chain,
    publish,
)
from weights_builders import FIRST, RUN, Tensors, hash_of, make_tensors, perturbed, same_bits

from engines.weights import parts as parts_module
from engines.weights.chain import Chain
from engines.weights.codes.payload import Code
from engines.weights.parts import CorruptPart, Line, Piece, checksum
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[7, 1 << 22], ids=["small slices", "large slices"])
def slice_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "SLICE", request.param)


def history(seed: int, dtype: torch.dtype, count: int) -> list[Tensors]:
    """Versions that change much, little, not at all."""
    rng = np.random.default_rng(seed)
    line = [make_tensors(seed, dtype)]
    for _ in range(count - 1):
        line.append(perturbed(line[-1], rng, float(rng.choice([0.0, 0.02, 0.1, 0.5, 1.0]))))
    return line


@LIGHT
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(2, 7),
    st.sampled_from(list(Code)),
    st.integers(1, 3),
)
def test_one_update_leads_from_every_held_version_to_the_newest_bit_for_bit(
    seed: int, dtype: torch.dtype, part_bytes: int, keep: int, count: int, code: Code, sources: int
) -> None:
    line = history(seed, dtype, count)
    chain = make_chain(line[0], part_bytes, keep)
    for step in range(1, count):
        options = {"code": code, "part_bytes": part_bytes, "sources": sources}
        publish(chain, line[step - 1], line[step], Version(0, step), **options)
        assert chain.version == Version(0, step)
        assert chain.hashes[chain.version] == hash_of(line[step])
    newest = Version(0, count - 1)
    for start, tensors in enumerate(line[:-1]):
        update = chain.prepare(Version(0, start))
        assert update.target == newest and (update.anchor or update.base == Version(0, start))
        assert update.anchor or update.bytes < chain.full_bytes or start == count - 2
        assert chain.prepared(Version(0, start)) is update
        held = applied(update, None if update.anchor else tensors, seed)
        assert same_bits(held, line[-1]) and hash_stated(update) == chain.hashes[newest] == hash_of(held)


def test_a_laggard_gets_less_than_an_anchor_where_little_changed() -> None:
    rng, line = np.random.default_rng(0), [make_tensors(0, torch.float32)]
    for _ in range(5):
        line.append(perturbed(line[-1], rng, 0.02))
    chain = make_chain(line[0], keep=4)
    for step in range(1, 6):
        publish(chain, line[step - 1], line[step], Version(0, step))
    kinds = [chain.prepare(Version(0, step)).anchor for step in range(5)]
    assert kinds == [True, False, False, False, False], "as far back as updates are kept"
    lagging = chain.prepare(Version(0, 1))
    steps = sum(chain.prepare(Version(0, step)).bytes for step in range(4, 5))
    assert steps < lagging.bytes < chain.full_bytes


def test_updates_are_kept_only_while_they_are_smaller_than_an_anchor() -> None:
    rng, line = np.random.default_rng(0), [make_tensors(0)]
    for _ in range(6):
        line.append(perturbed(line[-1], rng, 1.0))
    chain = make_chain(line[0], keep=100)
    for step in range(1, 7):
        publish(chain, line[step - 1], line[step], Version(0, step))
    assert len(chain._updates) <= 2
    assert chain.prepare(FIRST).anchor


@pytest.mark.parametrize("held", [None, Version(0, 7), Version(3, 0), Version(-1, 0)])
def test_an_unknown_version_needs_an_anchor(held: Version | None) -> None:
    tensors = make_tensors(0)
    update = make_chain(tensors).prepare(held)
    assert update.anchor and update.base == update.target == FIRST
    assert same_bits(applied(update, None), tensors)


def test_an_anchor_is_made_once_a_version_and_does_not_change_with_the_next() -> None:
    line = history(1, torch.bfloat16, 3)
    chain = make_chain(line[0])
    assert chain.prepared(None) is None
    anchor = chain.prepare(None)
    assert chain.prepare(None) is anchor is chain.prepared(None)
    publish(chain, line[0], line[1], Version(0, 1))
    publish(chain, line[1], line[2], Version(0, 2))
    assert chain.prepared(None) is None
    assert same_bits(applied(anchor, None), line[0]) and hash_stated(anchor) == hash_of(line[0])
    assert same_bits(applied(chain.prepare(None), None), line[2])


def test_a_version_without_a_change_is_still_a_version() -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors)
    publish(chain, tensors, tensors, Version(0, 1))
    update = chain.prepared(FIRST)
    assert update is not None and not update.anchor and update.changed == 0 and update.bytes == 0
    assert len(update.parts) == 1 and hash_stated(update) == chain.hashes[FIRST] == chain.hashes[Version(0, 1)]
    assert same_bits(applied(update, tensors), tensors)


def test_parts_of_the_local_code_go_on_as_they_came() -> None:
    line = history(2, torch.bfloat16, 2)
    chain = make_chain(line[0])
    parts = change_parts(line[0], line[1], FIRST, Version(0, 1), sources=2, part_bytes=8)
    chain.advance(parts)
    update = chain.prepared(FIRST)
    assert update is not None and [p.payload.tobytes() for p in update.parts] == [p.payload.tobytes() for p in parts]
    assert [(p.part, p.parts, p.source, p.sources) for p in update.parts] == [
        (i, len(parts), 0, 1) for i in range(len(parts))
    ]


@pytest.mark.parametrize("version", [FIRST, Version(0, 4), Version(0, 5), Version(-1, 99)])
def test_a_version_that_is_not_newer_is_refused(version: Version) -> None:
    tensors = make_tensors(0)
    chain = make_chain(tensors, version=Version(0, 5))
    for parts in (
        anchor_parts(make_tensors(1), version),
        change_parts(tensors, make_tensors(1), Version(0, 5), version),
    ):
        with pytest.raises(WeightsError, match="only grow"):
            chain.advance(parts)
    assert chain.version == Version(0, 5) and same_bits(applied(chain.prepare(None), None), tensors)


def test_changes_against_another_version_are_refused() -> None:
    line = history(0, torch.bfloat16, 3)
    chain = make_chain(line[0])
    with pytest.raises(WeightsError, match=r"against 0\.1, the newest here is 0\.0"):
        chain.advance(change_parts(line[1], line[2], Version(0, 1), Version(0, 2)))


def test_changes_cannot_begin_a_chain() -> None:
    line = history(0, torch.bfloat16, 2)
    with pytest.raises(WeightsError, match="newest here is None"):
        Chain(RUN, 10, 1).advance(change_parts(line[0], line[1], FIRST, Version(0, 1)))


def test_another_runs_update_is_refused_by_name() -> None:
    tensors = make_tensors(0)
    with pytest.raises(WeightsError, match=f"serves run 'other', the update is of '{RUN}'"):
        make_chain(tensors, run="other")


def drop_one(tensors: Tensors) -> None:
    del tensors["norm"]


def add_one(tensors: Tensors) -> None:
    tensors["bias"] = tensors["norm"]


def other_dtype(tensors: Tensors) -> None:
    tensors["scale"] = tensors["scale"].view(torch.float16)


def other_size(tensors: Tensors) -> None:
    tensors["down"] = tensors["down"].reshape(-1).repeat(2)


@pytest.mark.parametrize("damage", [drop_one, add_one, other_dtype, other_size])
def test_an_anchor_with_other_tensors_is_refused_and_changes_nothing(damage: Callable[[Tensors], None]) -> None:
    tensors, other = make_tensors(0), make_tensors(1)
    chain = make_chain(tensors)
    damage(other)
    with pytest.raises(WeightsError):
        chain.advance(anchor_parts(other, Version(0, 1)))
    unharmed(chain, tensors)


def piece_beyond_the_end(piece: Piece) -> Piece:
    return replace(piece, start=piece.start + parts_module.SLICE)


def piece_of_another_tensor(piece: Piece) -> Piece:
    return replace(piece, name="bias")


def piece_of_another_dtype(piece: Piece) -> Piece:
    return replace(piece, change=replace(piece.change, dtype=torch.float16))


@pytest.mark.parametrize("damage", [piece_beyond_the_end, piece_of_another_tensor, piece_of_another_dtype])
def test_changes_that_do_not_fit_are_refused_and_change_nothing(damage: Callable[[Piece], Piece]) -> None:
    tensors, new = make_tensors(0), make_tensors(1)
    chain = make_chain(tensors)
    [part] = change_parts(tensors, new, FIRST, Version(0, 1))
    *good, last = parts_module.read(part)
    parts = parts_module.cut([*good, damage(last)], Line(RUN, FIRST, Version(0, 1), False), Code.FAST, 1 << 20)
    with pytest.raises(WeightsError):
        chain.advance(parts)
    unharmed(chain, tensors)


def unharmed(chain: Chain, tensors: Tensors) -> None:
    """It goes on from the first version as if nothing had come."""
    assert chain.version == FIRST and list(chain.hashes) == [FIRST]
    anchor = chain.prepare(None)
    assert same_bits(applied(anchor, None), tensors) and hash_stated(anchor) == hash_of(tensors)
    new = make_tensors(2)
    publish(chain, tensors, new, Version(0, 1))
    update = chain.prepare(FIRST)
    held = applied(update, None if update.anchor else tensors)
    assert same_bits(held, new) and hash_stated(update) == hash_of(new)


def test_an_anchor_that_lacks_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "SLICE", 4)
    tensors = make_tensors(0)
    parts = anchor_parts(tensors, part_bytes=1)
    for missing in (0, 3):
        with pytest.raises(WeightsError, match="has not all of"):
            Chain(RUN, 10, 1).advance(
                [part for i, part in enumerate(parts) if i != missing and part.names != ["scale"]]
            )


def test_a_learner_that_restarted_leads_on_by_what_differs() -> None:
    rng, line = np.random.default_rng(3), [make_tensors(3)]
    for _ in range(2):
        line.append(perturbed(line[-1], rng, 0.05))
    chain = make_chain(line[0], version=Version(0, 4))
    publish(chain, line[0], line[1], Version(0, 5))
    chain.advance(anchor_parts(line[2], Version(1, 3)))
    for held, tensors in ((Version(0, 4), line[0]), (Version(0, 5), line[1])):
        update = chain.prepare(held)
        assert not update.anchor and update.target == Version(1, 3)
        assert same_bits(applied(update, tensors), line[2])
    assert chain.prepare(Version(0, 6)).anchor, "a version that the dead learner may have published, unknown here"


@pytest.mark.parametrize("dtype", DTYPES)
def test_watchers_see_the_old_bits_before_they_go(dtype: torch.dtype) -> None:
    line = history(5, dtype, 2)
    line[1] = perturbed(line[0], np.random.default_rng(1), 0.3)
    chain = make_chain(line[0])
    seen: list[tuple[Line, list[UpdatePart]]] = []

    def watch(line: Line, pieces: list[Piece]) -> None:
        seen.append((line, parts_module.cut(pieces, line, Code.SMALL, 64)))

    follower = make_chain(line[0])
    chain.advance(change_parts(line[0], line[1], FIRST, Version(0, 1), sources=3), watch)
    [(said, parts)] = seen
    assert (said.base, said.target, said.target_hash) == (FIRST, Version(0, 1), hash_of(line[1]))
    follower.advance(parts)
    assert follower.hashes[Version(0, 1)] == hash_of(line[1])
    assert same_bits(applied(follower.prepare(None), None), line[1])


@pytest.mark.parametrize("part_bytes", [1, 16, 64, 1 << 20])
def test_parts_hold_about_as_much_as_they_should(part_bytes: int) -> None:
    tensors = make_tensors(0)
    anchor = make_chain(tensors, part_bytes).prepare(None)
    largest = max(tensor.nbytes for tensor in tensors.values())
    sizes = [part.payload.size for part in anchor.parts]
    overhead = 5 + 4 * len(tensors) * 6
    assert all(size < part_bytes + largest + overhead for size in sizes)
    assert all(size >= part_bytes for size in sizes[:-1]), "a part is not sent half empty"
    assert sum(sizes) == anchor.bytes


def test_figures_of_a_chain_are_those_of_its_tensors() -> None:
    tensors = make_tensors(0, torch.float32)
    chain = make_chain(tensors)
    assert chain.elements == sum(t.numel() for t in tensors.values())
    assert chain.full_bytes == 4 * chain.elements
    assert chain.prepare(None).changed == chain.elements


def test_a_tensor_without_elements_travels_like_any_other() -> None:
    tensors = {"w": torch.ones(2), "empty": torch.zeros(0, 3), "x": torch.ones(3)}
    chain = make_chain(tensors, part_bytes=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert same_bits(applied(chain.prepare(None), None, shapes=shapes), tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["down", "other"]},
        {"names": []},
        {"starts": [8]},
        {"starts": [-1]},
        {"counts": [1 << 40]},
        {"counts": [-1]},
        {"counts": []},
        {"dtypes": ["float33"]},
        {"dtypes": ["Tensor"]},
        {"dtypes": ["complex128"]},
        {"dtypes": ["float16"]},
        {"part": 1},
        {"part": -1},
        {"source": 1},
        {"payload": np.zeros(23, np.uint8)},
        {"payload": np.zeros(0, np.uint8)},
    ],
    ids=str,
)
def test_a_part_that_cannot_be_is_refused_even_with_a_good_checksum(change: dict[str, object]) -> None:
    [part] = anchor_parts({"down": torch.ones(5)})
    changed = replace(part, **change)  # type: ignore[arg-type]
    with pytest.raises(CorruptPart):
        Chain(RUN, 10, 1).advance([changed])
    with pytest.raises(WeightsError):
        Chain(RUN, 10, 1).advance([replace(changed, checksum=checksum(changed))])
