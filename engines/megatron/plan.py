"""Who computes what of a batch: its sequences over data-parallel ranks and micro-batches.

Made by every rank for itself from the same lengths, so it needs no message, and is the same everywhere.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engines.megatron.flops import model_flops
from engines.megatron.model_shape import ModelShape
from engines.megatron.packing import cut
from stream_rl.types import Int32Array, Int64Array

Costs = npt.NDArray[np.float64]
MicroBatches = list[Int64Array]
"""The indices of the sequences of each, longest first; an empty one is a filler, which has no weight."""


def costs_of(shape: ModelShape, lengths: Int32Array) -> Costs:
    """[S] floating-point operations of each sequence's training, by the formula of `flops.model_flops`: linear in its
    length for what is multiplied with weights, and quadratic for its attention."""
    different, of = np.unique(lengths, return_inverse=True)
    costs: Costs = np.array([model_flops(shape, different[i : i + 1]) for i in range(len(different))])[of]
    return costs


def plan(lengths: Int32Array, costs: Costs, budget: int, ranks: int, *, pipelined: bool = False) -> list[MicroBatches]:
    """The micro-batches of each data-parallel rank: as many for each.  Deterministic.

    lengths, costs: [S].  budget: most tokens of a micro-batch; a longer sequence goes alone.  pipelined: micro-batches
    of one rank wait for one another, so they too are made equally long.
    Each sequence, the costliest first, goes to the rank with the least to do (longest processing time first: at most
    4/3 of the best possible makespan, Graham 1969), and then into as few micro-batches as first-fit decreasing finds.
    Raises ValueError for a budget below one token or an empty sequence.
    """
    # of equal costs the first of the batch comes first
    order = np.argsort(-costs, kind="stable").tolist()
    shares = _shared(order, costs, ranks)
    batches = [[share[own] for own in cut(lengths[share], budget)] for share in shares]
    if pipelined:
        batches = [_levelled(own, lengths, costs, budget) if own else [] for own in batches]
    most = max(len(own) for own in batches)
    return [own + [np.empty(0, np.int64)] * (most - len(own)) for own in batches]


def _shared(order: Sequence[int], costs: Costs, ranks: int) -> list[Int64Array]:
    """The sequences of each rank, in the batch's order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for sequence in order:
        load, rank = heapq.heappop(loads)
        shares[rank].append(sequence)
        heapq.heappush(loads, (load + float(costs[sequence]), rank))
    return [np.array(sorted(share), dtype=np.int64) for share in shares]


def _levelled(batches: MicroBatches, lengths: Int32Array, costs: Costs, budget: int) -> MicroBatches:
    """The same sequences in as many micro-batches, each to the one with the least to do of those that have room; or
    `batches`, if there is one that finds none, or nothing is gained."""
    members = sorted((int(s) for own in batches for s in own), key=lambda s: (-costs[s], s))
    levelled: list[list[int]] = [[] for _ in batches]
    loads, room = [0.0] * len(batches), [budget] * len(batches)
    for sequence in members:
        length = int(lengths[sequence])
        fitting = [i for i in range(len(batches)) if length <= room[i] or not levelled[i]]
        if not fitting:
            return batches
        index = min(fitting, key=lambda i: (loads[i], i))
        levelled[index].append(sequence)
        loads[index] += float(costs[sequence])
        room[index] -= length
    if max(loads) >= max(float(costs[own].sum()) for own in batches):
        return batches
    longest_first = (sorted(own, key=lambda s: (-int(lengths[s]), s)) for own in levelled)
    return [np.array(own, dtype=np.int64) for own in longest_first]
