"""What a step changed on all of the learner's processes, put together on the first, beside the next step.

Every process has one thread for it and a group of its own, so that the ranks' training does not wait for it.
"""

import collections
import datetime
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from engines.megatron.found import Changes
from engines.megatron.gathering import receive, send
from engines.weights.codes.changes import Change
from engines.weights.codes.ulp import SparseDelta
from engines.weights.parts import Piece, compose

AHEAD = 2
"""Steps whose changes may be on their way: bounds what they hold in memory."""


class CollectedChanges(Changes):
    """Of all processes; shares and seconds are this one's."""

    def __init__(self, own: Changes, collected: "Future[list[Piece]]", timeout_s: float) -> None:
        super().__init__(own.comparisons)
        self._collected, self._timeout_s = collected, timeout_s

    def pieces(self) -> list[Piece]:
        """One for each slice of which anything changed; none but on the first process.

        Raises EngineError if a process is lost, TimeoutError if one is too slow.
        """
        return self._collected.result(self._timeout_s)


class ChangeCollector:
    """Made by all processes at the same point; each then puts the changes of each step, in order."""

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._thread = ThreadPoolExecutor(1, "changes")
        self._under_way: collections.deque[Future[list[Piece]]] = collections.deque()

    def put(self, own: Changes) -> CollectedChanges:
        """Sets them on their way; waits if too many are.  Raises what became of earlier ones, if they were lost."""
        while len(self._under_way) >= AHEAD:
            self._under_way.popleft().result(self._timeout_s)
        collected = self._thread.submit(self._collect, own)
        self._under_way.append(collected)
        return CollectedChanges(own, collected, self._timeout_s)

    def close(self) -> None:
        """Let go of what is under way, without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _collect(self, own: Changes) -> list[Piece]:
        pieces = own.pieces()
        if self._rank:
            header, values = _packed(pieces)
            send(torch.tensor([len(header), len(values)]), 0, self._group)
            send(header, 0, self._group)
            send(values, 0, self._group)
            return []
        for rank in range(1, self._size):
            sizes = torch.zeros(2, dtype=torch.int64)
            receive(sizes, rank, self._group)
            header, values = (torch.empty(size, dtype=torch.uint8) for size in sizes.tolist())
            receive(header, rank, self._group)
            receive(values, rank, self._group)
            pieces += _unpacked(header, values)
        return compose(pieces, ())


class _Header(msgspec.Struct, array_like=True):
    """Of one piece: what its arrays, one after the other among the values, are."""

    name: str
    start: int
    dtype: str
    elements: int
    changed: int
    step_bits: int
    dense: bool


def _packed(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Bytes: what the pieces are, and their arrays."""
    headers, arrays = [], []
    for piece in pieces:
        delta, new = piece.change.sparse, piece.change.new
        dtype = str(piece.change.dtype).removeprefix("torch.")
        step_bits = 8 * delta.steps.element_size()
        headers.append(
            _Header(piece.name, piece.start, dtype, delta.elements, delta.changed, step_bits, new is not None)
        )
        # positions within a slice fit 32 bits
        arrays += [delta.indices.to(torch.int32), delta.steps] + ([] if new is None else [new])
    raw = [array.contiguous().view(torch.uint8) for array in arrays]
    header = torch.frombuffer(bytearray(msgspec.msgpack.encode(headers)), dtype=torch.uint8)
    return header, torch.cat(raw) if raw else torch.empty(0, dtype=torch.uint8)


def _unpacked(header: Tensor, values: Tensor) -> Iterator[Piece]:
    at = 0

    def take(elements: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        array = torch.empty(elements, dtype=dtype)
        size = array.nbytes
        # copied out: a view of another width must begin at a multiple of it
        array.view(torch.uint8).copy_(values[at : at + size])
        at += size
        return array

    for each in msgspec.msgpack.decode(header.numpy().tobytes(), type=list[_Header]):
        dtype = getattr(torch, each.dtype)
        bits = torch.int16 if each.step_bits == 16 else torch.int32
        delta = SparseDelta(each.elements, take(each.changed, torch.int32).to(torch.int64), take(each.changed, bits))
        yield Piece(
            each.name, each.start, Change(dtype, delta, None, take(each.elements, bits) if each.dense else None)
        )
