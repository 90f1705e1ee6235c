"""Bytes of a peer that means harm, or of a bug: a named error or a sound update, in time and memory that are bounded by
what the receiver knows of its tensors and by the bytes that came."""

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engines.weights import parts
from engines.weights.codes import payload, ulp
from engines.weights.codes.changes import Change, Known
from engines.weights.codes.payload import Code
from engines.weights.parts import Line, Piece
from stream_rl.errors import WeightsError
from stream_rl.messages import UpdatePart
from stream_rl.types import ByteArray, Version

LINE = Line("run", Version(0, 0), Version(0, 1), False)
TENSORS = (("a", torch.bfloat16, 40_000), ("b", torch.float32, 3000), ("c", torch.float16, 1), ("d", torch.bfloat16, 0))
DENSE = ("e", torch.float8_e4m3fn, 300)
ROUNDS = [1000, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
BYTES_AN_ELEMENT, BYTES_A_BYTE, AT_LEAST = 64, 128, 1 << 20
"""Memory that a decoder may take."""


def update(seed: int, share: float = 0.02) -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """Pieces of small changes, and the bits that they apply to."""
    rng = np.random.default_rng(seed)
    pieces, held = [], {}
    for name, dtype, elements in TENSORS:
        old = torch.from_numpy(rng.normal(0, 0.02, elements)).to(dtype).view(getattr(torch, f"int{8 * dtype.itemsize}"))
        moved = torch.from_numpy(rng.integers(-3, 4, elements) * (rng.random(elements) < share)).to(old.dtype)
        new = ulp.stepped(old, moved)
        pieces.append(Piece(name, 0, Change(dtype, ulp.diff(old, new), old, new)))
        held[name] = old
    bits = torch.from_numpy(rng.integers(0, 256, DENSE[2], np.uint8))
    return [*pieces, Piece(DENSE[0], 0, Change(DENSE[1], None, None, bits))], held | {DENSE[0]: bits}


def holding(held: dict[str, torch.Tensor]) -> Callable[[str, int, int], torch.Tensor]:
    def find(name: str, start: int, count: int) -> torch.Tensor:
        if name not in held or start + count > held[name].numel():
            raise WeightsError(f"{name} has no {count} elements from {start}")
        return held[name][start : start + count]

    return find


def within_bounds(work: Callable[[], Any], elements: int, num_bytes: int) -> Any:
    """The result of `work`, or None if it raised WeightsError."""
    tracemalloc.start()
    try:
        return work()
    except WeightsError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < AT_LEAST + BYTES_AN_ELEMENT * elements + BYTES_A_BYTE * num_bytes


def sound(found: ulp.SparseDelta | torch.Tensor, dtype: torch.dtype, elements: int) -> None:
    if isinstance(found, ulp.SparseDelta):
        live = torch.zeros(elements, dtype=getattr(torch, f"int{8 * dtype.itemsize}"))
        ulp.apply_(live, found)
        assert bool((found.steps != 0).all())
    else:
        assert found.numel() == elements and found.element_size() == dtype.itemsize


def spoiled(rng: np.random.Generator, code: ByteArray) -> ByteArray:
    """A few bytes changed, cut out, put in or moved, most often near the front, where the sizes are."""
    code = code.copy()
    for _ in range(int(rng.integers(1, 4))):
        reach = int(rng.choice([8, 40, 200, code.size]))
        at = int(rng.integers(0, max(min(reach, code.size), 1)))
        number = np.frombuffer(rng.bytes(int(rng.integers(1, 9))), np.uint8)
        match int(rng.integers(0, 6)):
            case 0 if code.size:
                code[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if code.size:
                code[at] = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8))
            case 2:
                code = np.concatenate([code[:at], number, code[at:]])
            case 3:
                code = np.concatenate([code[:at], code[at + number.size :]])
            case 4:
                code = code[: int(rng.integers(0, code.size + 1))]
            case _:
                code = np.concatenate([code[:at], number, code[at + number.size :]])
    return code


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("code", list(Code))
def test_a_payload_that_was_tampered_with_is_refused_or_sound(code: Code, rounds: int) -> None:
    pieces, held = update(0)
    encoded = payload.encode([piece.change for piece in pieces], code)
    known = [Known(piece.change.dtype, piece.change.elements, held[piece.name]) for piece in pieces]
    elements = sum(tensor.elements for tensor in known)
    rng = np.random.default_rng(code)
    refused = 0
    for i in range(rounds):
        bad = spoiled(rng, encoded) if i % 8 else np.frombuffer(rng.bytes(int(rng.integers(0, 400))), np.uint8)
        decoded = within_bounds(lambda bad=bad: payload.decode(bad, known), elements, bad.size)
        refused += decoded is None
        for found, tensor in zip(decoded or [], known, strict=bool(decoded)):
            sound(found, tensor.dtype, tensor.elements)
    assert rounds // 2 < refused < rounds


def lies(rng: np.random.Generator, column: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """A column in which one entry is another, or is there twice, or is not there at all."""
    changed = list(column)
    at = int(rng.integers(0, len(changed)))
    match int(rng.integers(0, 4)):
        case 0:
            del changed[at]
        case 1:
            changed.insert(at, changed[at])
        case _:
            changed[at] = values[int(rng.integers(0, len(values)))]
    return changed


def tampered(rng: np.random.Generator, part: UpdatePart) -> UpdatePart:
    """With a checksum that is right: its sender means it."""
    for _ in range(int(rng.integers(1, 3))):
        match int(rng.integers(0, 7)):
            case 0:
                part = replace(part, names=lies(rng, part.names or ["x"], ["a", "b", "", "\0", "n" * 1000]))
            case 1:
                part = replace(part, starts=lies(rng, part.starts or [0], [-1, 1, parts.SLICE, 1 << 62, -(1 << 63)]))
            case 2:
                part = replace(part, counts=lies(rng, part.counts or [0], [-1, 0, 1, parts.SLICE, 1 << 62]))
            case 3:
                wrong = ["int16", "float64", "complex64", "bool", "quint8", "Tensor", "", "__name__", "float8_e5m2"]
                part = replace(part, dtypes=lies(rng, part.dtypes or ["bfloat16"], wrong))
            case 4:
                part = replace(part, part=int(rng.integers(-2, 4)), parts=int(rng.integers(-2, 4)))
            case _:
                part = replace(part, payload=spoiled(rng, part.payload))
    return replace(part, checksum=parts.checksum(part))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("code", list(Code))
def test_a_part_that_was_tampered_with_is_refused_or_sound(code: Code, rounds: int) -> None:
    pieces, held = update(1)
    [part] = parts.cut(pieces, LINE, code, 1 << 20)
    rng = np.random.default_rng(100 + code)
    refused = 0
    for i in range(rounds):
        bad = tampered(rng, part)
        find = holding(held) if code is Code.SMALL or i % 2 else None
        elements = sum(min(max(count, 0), parts.SLICE) for count in bad.counts) if find is None else 0
        known = sum(tensor.numel() for tensor in held.values()) * len(bad.names)
        read = within_bounds(lambda bad=bad, find=find: parts.read(bad, find), elements // 64 + known, bad.payload.size)
        refused += read is None
        for piece in read or []:
            found = piece.change.new if piece.change.delta is None else piece.change.delta
            assert found is not None
            sound(found, piece.change.dtype, piece.change.elements)
    assert rounds // 2 < refused < rounds


def test_a_part_whose_bytes_changed_on_the_way_is_corrupt() -> None:
    pieces, held = update(2)
    [part] = parts.cut(pieces, LINE, Code.FAST, 1 << 20)
    rng = np.random.default_rng(0)
    for _ in range(100):
        bad = replace(part, payload=spoiled(rng, part.payload))
        if not np.array_equal(bad.payload, part.payload):
            with pytest.raises(parts.CorruptPart):
                parts.read(bad, holding(held))


def test_bits_of_another_width_are_no_base() -> None:
    """A peer may call a tensor that is held in 16 bits float32."""
    pieces, held = update(3)
    [part] = parts.cut(pieces[:1], LINE, Code.SMALL, 1 << 20)
    bad = replace(part, dtypes=["float32"])
    with pytest.raises(WeightsError, match=r"of 40000 x torch.float32 or more, here are 40000 x torch.int16"):
        parts.read(replace(bad, checksum=parts.checksum(bad)), holding(held))


def test_a_few_bytes_of_the_small_code_cannot_ask_for_much_memory() -> None:
    """They name as many changes as there are elements, and hold none."""
    elements = 1 << 22
    base = torch.zeros(elements, dtype=torch.int16)
    change = Change(torch.bfloat16, ulp.diff(base, base), base)
    honest = payload.encode([change], Code.SMALL)
    crc_first = 9
    for at in range(crc_first, honest.size):
        lie = np.concatenate([honest[:at], np.array([0xFF, 0xFF, 0xFF, 1, 0], np.uint8), honest[at:]])
        tracemalloc.start()
        with pytest.raises(WeightsError):
            payload.decode(lie, [Known(torch.bfloat16, elements, base)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000
