"""Versions as the parts that an engine receives, damaged or not, and what must hold while they are refused."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from update_builders import anchor_parts, change_parts
from weights_builders import (
    FIRST,
    Model,
    Tensors,
    commit,
    hash_of,
    make_tensors,
    perturbed,
    same_bits,
    take,
)

from engines.sglang.staging import LiveWeights
from engines.weights.parts import checksum, numbered, relabelled
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

SECOND, THIRD = Version(0, 1), Version(0, 2)


def line_of(seed: int, count: int, share: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    rng = np.random.default_rng(seed)
    line = [make_tensors(seed, dtype)]
    while len(line) < count:
        line.append(perturbed(line[-1], rng, share))
    return line


def delta(line: list[Tensors], part_bytes: int = 8) -> list[UpdatePart]:
    """From the first version to the second."""
    parts = change_parts(line[0], line[1], FIRST, SECOND, part_bytes=part_bytes)
    return [relabelled(part, i, len(parts), hash_of(line[1])) for i, part in enumerate(parts)]


def anchor(line: list[Tensors], part_bytes: int = 40) -> list[UpdatePart]:
    """All of the last version."""
    parts = anchor_parts(line[-1], Version(0, len(line) - 1), part_bytes)
    return [relabelled(part, i, len(parts), hash_of(line[-1])) for i, part in enumerate(parts)]


def again(parts: list[UpdatePart], attempt: int = 1) -> list[UpdatePart]:
    """As a later attempt."""
    return [numbered(part, attempt) for part in parts]


def resealed(part: UpdatePart, number: tuple[int, int] | None = None, **changes: Any) -> UpdatePart:
    """A part that says something else and whose checksum is right nevertheless."""
    if number is not None:
        changes |= {"part": number[0], "parts": number[1]}
    part = dataclasses.replace(part, **changes)
    return dataclasses.replace(part, checksum=checksum(part))


@contextmanager
def untouched(live: LiveWeights, model: Model) -> Iterator[None]:
    """Nothing live changes in here: no bit, no version, no fingerprint."""
    before, version, total = model.live(), live.version, live.weights_hash
    yield
    assert same_bits(model.live(), before)
    assert (live.version, live.weights_hash) == (version, total)
    assert live.staged is None


def assert_still_updates(live: LiveWeights, model: Model, line: list[Tensors]) -> None:
    """What was refused before must not be in the way."""
    assert take(live, again(delta(line), 9)) == SECOND
    commit(live, SECOND, 9)
    assert same_bits(model.live(), line[1])


def recomputed(live: LiveWeights) -> str:
    assert live.recompute()
    return live.weights_hash
