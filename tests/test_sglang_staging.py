"""Staging: all of an update or none of it, and only the one that leads to the stated fingerprint."""

import dataclasses
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    Model,
    Tensors,
    bits_of,
    commit,
    hash_of,
    make_chain,
    make_live,
    make_tensors,
    perturbed,
    same_bits,
    take,
)

from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from engines.weights.chain import Chain, Update
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SECOND, THIRD = Version(0, 1), Version(0, 2)


def line_of(seed: int, count: int, share: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    rng = np.random.default_rng(seed)
    line = [make_tensors(seed, dtype)]
    while len(line) < count:
        line.append(perturbed(line[-1], rng, share))
    return line


def chain_of(line: list[Tensors], part_bytes: int = 40) -> Chain:
    chain = make_chain(line[0], part_bytes)
    for step, tensors in enumerate(line[1:], 1):
        chain.advance(Version(0, step), bits_of(tensors))
    return chain


def delta(chain: Chain, held: Version = FIRST) -> Update:
    update = chain.update_from(held)
    assert update is not None and not update.anchor
    return update


def resealed(part: UpdatePart, **changes: Any) -> UpdatePart:
    """A part that says something else and whose checksum is right nevertheless."""
    part = dataclasses.replace(part, **changes)
    return dataclasses.replace(part, checksum=zlib.crc32(part.payload.data)) if "checksum" not in changes else part


@contextmanager
def untouched(live: LiveWeights, model: Model) -> Iterator[None]:
    """Nothing live changes in here: no bit, no version, no fingerprint."""
    before, version, total = model.live(), live.version, live.fingerprint
    yield
    assert same_bits(model.live(), before)
    assert (live.version, live.fingerprint) == (version, total)
    assert live.staged is None


def assert_still_updates(live: LiveWeights, model: Model, chain: Chain, newest: Tensors) -> None:
    """What was refused before must not be in the way."""
    assert chain.version is not None
    assert take(live, delta(chain, live.version).parts) == chain.version
    commit(live, chain.version)
    assert same_bits(model.live(), newest)


@LIGHT
@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.integers(1, 120), st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_a_run_of_updates_in_any_order_of_parts_with_repeats_is_live_bit_for_bit(
    seed: int, dtype: torch.dtype, part_bytes: int, share: float
) -> None:
    line = line_of(seed, 4, share, dtype)
    live, model = make_live(line[0])
    chain, rng = make_chain(line[0], part_bytes), random.Random(seed)
    assert live.fingerprint == fingerprint.model_sum(line[0].items())
    for step, tensors in enumerate(line[1:], 1):
        target = Version(0, step)
        chain.advance(target, bits_of(tensors))
        update = chain.anchor() if rng.random() < 0.3 else delta(chain, live.version)
        parts = rng.sample(update.parts, len(update.parts))
        repeats = [part for part in parts[:-1] for _ in range(rng.choice([1, 1, 2, 3]))]
        for part in repeats:
            assert live.receive(part) is None
        assert live.receive(parts[-1]) == target == live.staged
        assert same_bits(model.live(), line[step - 1]) and live.version == Version(0, step - 1)
        commit(live, target)
        assert same_bits(model.live(), tensors) and live.version == target and live.staged is None
        assert live.fingerprint == fingerprint.model_sum(tensors.items()) == live.recompute()
        assert fingerprint.text(live.fingerprint) == chain.hashes[target]


def test_a_commit_writes_on_the_forward_stream_and_flips_the_version_after() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    seen: list[str] = []

    @contextmanager
    def stream() -> Iterator[None]:
        seen.append(f"in at {live.version}")
        assert same_bits(model.live(), line[0])
        yield
        assert same_bits(model.live(), line[1])
        seen.append(f"out at {live.version}")

    take(live, delta(chain).parts)
    assert live.commit(SECOND, stream) >= 0.0
    assert seen == ["in at 0.0", "out at 0.0"] and live.version == SECOND and live.stage_seconds >= 0.0


def test_live_memory_is_written_in_place() -> None:
    line = line_of(0, 2, share=1.0)
    live, model = make_live(line[0])
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    take(live, chain_of(line).anchor().parts)
    commit(live, SECOND)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert model.head is model.embed


@pytest.mark.parametrize("target", [FIRST, SECOND, THIRD])
def test_a_commit_of_what_is_not_staged_is_refused(target: Version) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    with untouched(live, model), pytest.raises(WeightsError, match="asked to make"):
        commit(live, target)
    update = delta(chain_of(line))
    with untouched(live, model):
        assert take(live, update.parts[:-1]) is None
        with pytest.raises(WeightsError, match="asked to make"):
            commit(live, SECOND)
    take(live, update.parts[-1:])
    if target != SECOND:
        with pytest.raises(WeightsError, match="asked to make"):
            commit(live, target)
        assert same_bits(model.live(), line[0])
    commit(live, SECOND)
    with pytest.raises(WeightsError, match="asked to make"):
        commit(live, SECOND)
    assert same_bits(model.live(), line[1])


def flipped(payload: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    other = payload.copy()
    other[-1] ^= 1
    return other


def last_with_payload(parts: list[UpdatePart]) -> int:
    return max(i for i, part in enumerate(parts) if part.payload.size)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: dataclasses.replace(part, run="another"),
        lambda part: dataclasses.replace(part, checksum=part.checksum ^ 1),
        lambda part: dataclasses.replace(part, checksum=-1),
        lambda part: dataclasses.replace(part, payload=flipped(part.payload)),
        lambda part: resealed(part, payload=flipped(part.payload)),
        lambda part: resealed(part, payload=part.payload[:-1].copy()),
        lambda part: resealed(part, names=["nobody", *part.names[1:]]),
        lambda part: resealed(part, dtypes=["float32", *part.dtypes[1:]]),
        lambda part: resealed(part, dtypes=["Tensor", *part.dtypes[1:]]),
        lambda part: resealed(part, codes=["pickle", *part.codes[1:]]),
        lambda part: resealed(part, sizes=[[], *part.sizes[1:]]),
        lambda part: resealed(part, sizes=[[1 << 40], *part.sizes[1:]]),
        lambda part: resealed(part, sizes=[[-1 for _ in sizes] for sizes in part.sizes]),
        lambda part: resealed(part, names=part.names[:-1]),
        lambda part: resealed(part, codes=[*part.codes, "dense"]),
        lambda part: resealed(part, sizes=part.sizes[:-1]),
        lambda part: resealed(part, dtypes=[]),
    ],
    ids=[
        "other run", "checksum", "negative checksum", "flipped bit",
        "flipped bit resealed", "short payload", "unknown tensor", "other dtype", "no dtype", "unknown code",
        "no buffers", "huge buffer", "negative buffer", "names too few", "codes too many", "sizes too few", "no dtypes",
    ],
)  # fmt: skip
@pytest.mark.parametrize("anchor", [False, True], ids=["delta", "anchor"])
def test_a_damaged_part_is_refused_and_nothing_live_changes(change: Any, anchor: bool) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    parts = list(chain.anchor().parts if anchor else delta(chain).parts)
    i = last_with_payload(parts)
    parts[i] = change(parts[i])
    with untouched(live, model), pytest.raises(WeightsError):
        take(live, parts)
    assert_still_updates(live, model, chain, line[1])


@pytest.mark.parametrize("base", [SECOND, Version(0, -1), Version(1, 0), Version(-1, 0)])
def test_a_delta_on_another_version_than_the_live_one_is_refused(base: Version) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    for part in delta(chain).parts:
        with (
            untouched(live, model),
            pytest.raises(WeightsError, match=f"needs version {base}, this engine holds {FIRST}"),
        ):
            live.receive(dataclasses.replace(part, base=base))
    assert_still_updates(live, model, chain, line[1])


@pytest.mark.parametrize("anchor", [False, True], ids=["delta", "anchor"])
def test_an_update_that_states_another_fingerprint_is_refused(anchor: bool) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    parts = chain.anchor().parts if anchor else delta(chain).parts
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, [dataclasses.replace(part, target_hash=hash_of(line[0])) for part in parts])
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, [dataclasses.replace(part, target_hash="") for part in parts])
    assert_still_updates(live, model, chain, line[1])


def test_a_delta_on_weights_that_are_not_bit_for_bit_its_base_is_refused_and_an_anchor_helps() -> None:
    line = line_of(0, 2)
    live, model = make_live(perturbed(line[0], np.random.default_rng(9), 0.05))
    chain = chain_of(line)
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, delta(chain).parts)
    assert take(live, chain.anchor().parts) == SECOND
    commit(live, SECOND)
    assert same_bits(model.live(), line[1]) and live.fingerprint == live.recompute()


@pytest.mark.parametrize(("part", "parts"), [(0, 0), (-1, 1), (1, 1), (7, 1), (0, -3), (3, 2), (-2, 2)])
def test_a_part_whose_number_makes_no_sense_is_refused(part: int, parts: int) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line, part_bytes=1 << 20)
    [whole] = delta(chain).parts
    odd = dataclasses.replace(whole, part=part, parts=parts)
    with untouched(live, model), pytest.raises(WeightsError):
        take(live, [odd, dataclasses.replace(odd, part=0)])
    assert_still_updates(live, model, chain, line[1])


def test_missing_parts_stage_nothing_however_often_the_others_come() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    parts = delta(chain).parts
    assert len(parts) > 3
    for missing in range(len(parts)):
        rest = [part for part in parts if part.part != missing]
        with untouched(live, model):
            assert take(live, [*rest, *reversed(rest), *rest]) is None
        assert take(live, chain_of(line_of(1, 2)).anchor().parts[:1]) is None, "something else begins"
    assert_still_updates(live, model, chain, line[1])


def test_parts_of_two_updates_never_mix() -> None:
    line = line_of(0, 3)
    live, model = make_live(line[0])
    chain = chain_of(line)
    small, newest = delta(chain), chain.anchor()
    older = chain_of(line[:2]).anchor()
    for first, second in ((small, newest), (newest, small), (older, newest), (newest, older), (small, older)):
        n = min(len(first.parts), len(second.parts))
        with untouched(live, model):
            assert take(live, [*first.parts[: n // 2], *second.parts[n // 2 : n]]) is None
            zipped = [update.parts[i] for i in range(n - 1) for update in (first, second)]
            assert take(live, zipped) is None
    assert take(live, [*small.parts[:2], *newest.parts]) == THIRD
    commit(live, THIRD)
    assert same_bits(model.live(), line[2]) and live.fingerprint == live.recompute()


def test_a_delta_and_an_anchor_to_the_same_version_never_mix() -> None:
    line = line_of(0, 2, share=1.0)
    live, model = make_live(line[0])
    chain = chain_of(line)
    small, anchor = delta(chain), chain.anchor()
    assert len(small.parts) == len(anchor.parts)
    with untouched(live, model):
        assert take(live, small.parts[1:]) is None
        assert take(live, anchor.parts[:1]) is None
    assert take(live, anchor.parts[1:]) == SECOND


def test_a_staged_update_that_comes_again_changes_nothing_and_a_newer_attempt_replaces_it() -> None:
    line = line_of(0, 3)
    live, model = make_live(line[0])
    chain = chain_of(line)
    take(live, delta(chain).parts)
    assert take(live, delta(chain).parts) is None, "sent again: it is there already"
    assert live.staged == SECOND and same_bits(model.live(), line[0])
    newer = [dataclasses.replace(part, attempt=1) for part in chain.anchor().parts]
    assert take(live, newer) == newer[0].target
    with pytest.raises(WeightsError, match="asked to make"):
        commit(live, SECOND)
    assert same_bits(model.live(), line[0])


def test_a_part_that_comes_again_after_its_commit_is_refused() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    update = delta(chain_of(line))
    take(live, update.parts)
    commit(live, SECOND)
    with untouched(live, model), pytest.raises(WeightsError, match="needs version"):
        take(live, update.parts)


def test_a_commit_that_fails_leaves_the_way_open_for_an_anchor() -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line)
    take(live, delta(chain).parts)

    @contextmanager
    def broken() -> Iterator[None]:
        raise RuntimeError("the device is gone")
        yield

    with pytest.raises(RuntimeError, match="gone"):
        live.commit(SECOND, broken)
    assert live.version == FIRST
    assert take(live, chain.anchor().parts) == SECOND
    commit(live, SECOND)
    assert same_bits(model.live(), line[1]) and live.fingerprint == live.recompute()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_recomputation_sees_a_flipped_bit_that_no_delta_touched(name: str) -> None:
    line = line_of(0, 1)
    live, model = make_live(line[0])
    chain = make_chain(line[0])
    chain.advance(SECOND, bits_of(line[0]))
    stated = live.fingerprint
    piece = {"q": model.qkv, "k": model.qkv, "v": model.qkv, "gate": model.gate_up, "up": model.gate_up}.get(
        name, getattr(model, name, None)
    )
    assert piece is not None
    fingerprint.bits_of(piece.data).view(-1)[-1] ^= 1
    assert take(live, delta(chain).parts) == SECOND, "an empty delta does not look"
    commit(live, SECOND)
    assert live.fingerprint == stated, "the incremental fingerprint does not look either"
    assert live.recompute() != stated
    assert live.recompute() == fingerprint.model_sum(model.live().items())
    take(live, chain.anchor().parts)
    commit(live, SECOND)
    assert live.recompute() == stated and same_bits(model.live(), line[0])


def test_a_delta_over_a_flipped_bit_is_refused() -> None:
    line = line_of(0, 2, share=1.0)
    live, model = make_live(line[0])
    chain = make_chain(line[0])
    old = bits_of(line[0])
    changed = {name: (dtype, bits.clone()) for name, (dtype, bits) in old.items()}
    changed["up"][1][2] ^= 4
    chain.advance(SECOND, changed)
    fingerprint.bits_of(model.gate_up.data).view(-1)[5 * 4 + 2] ^= 1
    with untouched(live, model), pytest.raises(WeightsError, match="fingerprint"):
        take(live, delta(chain).parts)


@LIGHT
@given(st.data())
def test_random_damage_to_a_part_is_refused_or_harmless(data: st.DataObject) -> None:
    line = line_of(0, 2)
    live, model = make_live(line[0])
    chain = chain_of(line, part_bytes=1 << 20)
    [part] = delta(chain).parts
    field = data.draw(st.sampled_from(["sizes", "payload", "names", "codes", "base", "target_hash", "dtypes"]))
    tensor = data.draw(st.integers(0, len(part.names) - 1))
    if field == "payload":
        payload = part.payload.copy()
        payload[data.draw(st.integers(0, payload.size - 1))] ^= data.draw(st.integers(1, 255))
        part = resealed(part, payload=payload)
    elif field == "sizes":
        sizes = [list(each) for each in part.sizes]
        sizes[tensor] = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-8, 60), max_size=3))
        part = resealed(part, sizes=sizes)
    elif field == "base":
        part = resealed(part, base=Version(data.draw(st.integers(-1, 2)), data.draw(st.integers(-1, 2))))
    elif field == "target_hash":
        part = resealed(part, target_hash=data.draw(st.text("0123456789abcdef", max_size=17)))
    else:
        texts = list(getattr(part, field))
        texts[tensor] = data.draw(st.sampled_from([*SHAPES, "dense", "sparse", "float16", "bfloat16", ""]))
        part = resealed(part, **{field: texts})
    try:
        staged = live.receive(part)
    except WeightsError:
        assert same_bits(model.live(), line[0]) and live.version == FIRST and live.staged is None
        assert_still_updates(live, model, chain, line[1])
    else:
        assert staged == SECOND
        commit(live, SECOND)
        assert same_bits(model.live(), line[1]) and live.fingerprint == live.recompute()


def test_the_run_of_an_engine_is_in_every_refusal_of_another() -> None:
    line = line_of(0, 2)
    live, _ = make_live(line[0])
    with pytest.raises(WeightsError, match=f"run '{RUN}'.*run 'x'"):
        live.receive(dataclasses.replace(delta(chain_of(line)).parts[0], run="x"))
