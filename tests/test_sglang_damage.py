"""Staging: what is corrupt is wanted again, what cannot be is refused, and neither changes anything that is live."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from staging_builders import (
    SECOND,
    anchor,
    assert_still_updates,
    delta,
    line_of,
    recomputed,
    resealed,
    untouched,
)
from update_builders import anchor_parts, change_parts
from weights_builders import (
    FIRST,
    HIDDEN,
    RUN,
    SHAPES,
    VOCABULARY,
    commit,
    hash_of,
    make_live,
    perturbed,
    same_bits,
    take,
)

from engines.weights.codes.changes import Change
from engines.weights.codes.payload import Code
from engines.weights.codes.ulp import SparseDelta
from engines.weights.fingerprint import integers as bits_dtype
from engines.weights.parts import CorruptPart, Line, Piece, cut
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def flipped(payload: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    other = payload.copy()
    other[-1] ^= 1
    return other


def last_with_payload(parts: list[UpdatePart]) -> int:
    return max(i for i, part in enumerate(parts) if part.payload.size)


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "anchor"])
@pytest.mark.parametrize(
    "change",
    [
        lambda part: dataclasses.replace(part, checksum=part.checksum ^ 1),
        lambda part: dataclasses.replace(part, checksum=-1),
        lambda part: dataclasses.replace(part, payload=flipped(part.payload)),
        lambda part: dataclasses.replace(part, base=Version(7, 7), target=Version(0, 0), parts=900),
        lambda part: dataclasses.replace(part, names=["nobody", *part.names[1:]]),
        lambda part: dataclasses.replace(part, target_hash="0"),
        lambda part: dataclasses.replace(part, run="another"),
    ],
    ids=["checksum", "negative checksum", "flipped bit", "header", "names", "hash", "run"],
)
def test_a_corrupt_part_is_wanted_again_and_nothing_is_forgotten(change: Any, whole: bool) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    parts = list(anchor(line) if whole else delta(line))
    i = last_with_payload(parts)
    others = [part for part in parts if part.part != i]
    with untouched(live, model):
        assert take(live, others) is None
        for _ in range(3):
            with pytest.raises(CorruptPart):
                live.receive(change(parts[i]))
    assert take(live, [parts[i]]) == SECOND
    commit(live, SECOND)
    assert same_bits(model.live(), line[1])


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "anchor"])
@pytest.mark.parametrize(
    "change",
    [
        lambda part: resealed(part, run="another"),
        lambda part: resealed(part, payload=flipped(part.payload)),
        lambda part: resealed(part, payload=part.payload[:-1].copy()),
        lambda part: resealed(part, names=["nobody", *part.names[1:]]),
        lambda part: resealed(part, dtypes=["float32", *part.dtypes[1:]]),
        lambda part: resealed(part, dtypes=["Tensor", *part.dtypes[1:]]),
        lambda part: resealed(part, starts=[1 << 22, *part.starts[1:]]),
        lambda part: resealed(part, starts=[-(1 << 22), *part.starts[1:]]),
        lambda part: resealed(part, starts=[1 << 62, *part.starts[1:]]),
        lambda part: resealed(part, counts=[1 << 22, *part.counts[1:]]),
        lambda part: resealed(part, counts=[1 << 40, *part.counts[1:]]),
        lambda part: resealed(part, counts=[-1, *part.counts[1:]]),
        lambda part: resealed(part, names=part.names[:-1]),
        lambda part: resealed(part, starts=[*part.starts, 0]),
        lambda part: resealed(part, counts=part.counts[:-1]),
        lambda part: resealed(part, dtypes=[]),
        lambda part: resealed(part, names=[], starts=[], counts=[], dtypes=[]),
    ],
    ids=[
        "other run", "flipped bit", "short payload", "unknown tensor", "other dtype", "no dtype", "start beyond",
        "negative start", "far start", "many elements", "huge count", "negative count", "names too few",
        "starts too many", "counts too few", "no dtypes", "nothing",
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_is_refused_and_nothing_live_changes(change: Any, whole: bool) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    parts = list(anchor(line) if whole else delta(line))
    i = last_with_payload(parts)
    parts[i] = change(parts[i])
    with untouched(live, model), pytest.raises(WeightsError):
        take(live, parts)
    assert_still_updates(live, model, line)


@pytest.mark.parametrize(
    ("name", "dtype", "elements"),
    [("embed", torch.float32, 70_000), ("nobody", torch.float32, 70_000), ("embed", torch.float32, 3),
     ("embed", torch.bfloat16, 70_000), ("embed", torch.bfloat16, VOCABULARY * HIDDEN + 1)],
)  # fmt: skip
@pytest.mark.parametrize("dense", [False, True])
def test_a_slice_that_is_not_of_the_checkpoint_is_refused_whatever_its_size(
    name: str, dtype: torch.dtype, elements: int, dense: bool
) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    new = torch.ones(elements, dtype=bits_dtype(dtype))
    changed = SparseDelta(elements, torch.tensor([elements - 1]), new[:1])
    piece = Piece(name, 0, Change(dtype, None if dense else changed, None, new if dense else None))
    [part] = cut([piece], Line(RUN, FIRST, SECOND, anchor=dense), Code.FAST, 1 << 20)
    with untouched(live, model), pytest.raises(WeightsError, match="this engine's checkpoint has"):
        live.receive(part)
    assert_still_updates(live, model, line)


@pytest.mark.parametrize("base", [SECOND, Version(0, -1), Version(1, 0), Version(-1, 0)])
def test_a_delta_on_another_version_than_the_live_one_is_refused(base: Version) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    for part in delta(line):
        with (
            untouched(live, model),
            pytest.raises(WeightsError, match=f"needs version {base} as it was, this engine holds {FIRST}"),
        ):
            live.receive(resealed(part, base=base))
    assert_still_updates(live, model, line)


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "anchor"])
def test_an_update_that_states_another_fingerprint_is_refused(whole: bool) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    parts = anchor(line) if whole else delta(line)
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, [resealed(part, target_hash=hash_of(line[0])) for part in parts])
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, [resealed(part, target_hash="") for part in parts])
    assert_still_updates(live, model, line)


def test_a_delta_on_weights_that_are_not_bit_for_bit_its_base_is_refused_and_an_anchor_helps() -> None:
    line = line_of(0, 2)
    live, model = make_live(perturbed(line[0], np.random.default_rng(9), 0.05))
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, delta(line))
    assert take(live, anchor(line)) == SECOND
    commit(live, SECOND)
    assert same_bits(model.live(), line[1]) and recomputed(live) == hash_of(line[1])


@pytest.mark.parametrize(("part", "parts"), [(0, 0), (-1, 1), (1, 1), (7, 1), (0, -3), (3, 2), (-2, 2)])
def test_a_part_whose_number_makes_no_sense_is_refused(part: int, parts: int) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    [whole] = delta(line, part_bytes=1 << 20)
    odd = resealed(whole, number=(part, parts))
    with untouched(live, model), pytest.raises(WeightsError):
        take(live, [odd, resealed(odd, number=(0, parts))])
    assert_still_updates(live, model, line)


def test_an_anchor_that_lacks_a_slice_is_refused() -> None:
    line = line_of(0, 1)
    live, model = make_live(line[0])
    for missing in SHAPES:
        parts = anchor_parts({name: tensor for name, tensor in line[0].items() if name != missing}, SECOND)
        with untouched(live, model), pytest.raises(WeightsError, match="the anchor of version"):
            take(live, parts)
    changes = change_parts(line[0], perturbed(line[0], np.random.default_rng(0), 0.2), SECOND, SECOND)
    with untouched(live, model), pytest.raises(WeightsError, match="an anchor has all elements of"):
        take(live, [resealed(part, anchor=True) for part in changes])


@LIGHT
@given(st.data())
def test_random_damage_to_a_part_is_refused_or_harmless(data: st.DataObject) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    [part] = delta(line, part_bytes=1 << 20)
    field = data.draw(st.sampled_from(["starts", "counts", "payload", "names", "base", "target_hash", "dtypes"]))
    tensor = data.draw(st.integers(0, len(part.names) - 1))
    if field == "payload":
        payload = part.payload.copy()
        payload[data.draw(st.integers(0, payload.size - 1))] ^= data.draw(st.integers(1, 255))
        part = resealed(part, payload=payload)
    elif field in ("starts", "counts"):
        numbers = list(getattr(part, field))
        numbers[tensor] = data.draw(st.integers(-(2**63), 2**64 - 1) | st.integers(-8, 60) | st.just(1 << 22))
        part = resealed(part, **{field: numbers})
    elif field == "base":
        part = resealed(part, base=Version(data.draw(st.integers(-1, 2)), data.draw(st.integers(-1, 2))))
    elif field == "target_hash":
        part = resealed(part, target_hash=data.draw(st.text("0123456789abcdef", max_size=17)))
    else:
        texts = list(getattr(part, field))
        texts[tensor] = data.draw(st.sampled_from([*SHAPES, "float16", "bfloat16", "int64", ""]))
        part = resealed(part, **{field: texts})
    try:
        assert live.receive(part)
    except WeightsError:
        assert same_bits(model.live(), line[0]) and live.version == FIRST and live.staged is None
        assert_still_updates(live, model, line)
    else:
        assert live.staged == (SECOND, 0)
        commit(live, SECOND)
        assert same_bits(model.live(), line[1]) and recomputed(live) == hash_of(line[1])


def test_the_run_of_an_engine_is_in_every_refusal_of_another() -> None:
    line = line_of(0, 2)
    live, _ = make_live(line[0])
    with pytest.raises(WeightsError, match=f"run '{RUN}'.*run 'x'"):
        live.receive(resealed(delta(line)[0], run="x"))
