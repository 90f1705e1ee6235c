"""Cutting a batch into micro-batches of whole sequences under a token budget.

Every sequence is in exactly one micro-batch and none is cut, so the step's gradient does not depend on the cut.
"""

import numpy as np

from stream_rl.types import Int32Array, Int64Array


def cut(lengths: Int32Array, budget: int) -> list[Int64Array]:
    """Micro-batches, each the indices of its sequences, longest sequence first.  Deterministic.

    lengths: [S] tokens of each sequence.  budget: most tokens of a micro-batch; a longer sequence goes alone.
    First-fit decreasing, which needs at most 11/9 of the fewest possible bins plus one (Johnson 1973).
    Raises ValueError for a budget below one token or an empty sequence.
    """
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {budget}")
    if len(lengths) and int(lengths.min()) < 1:
        raise ValueError(f"every sequence needs a token, but sequence {int(lengths.argmin())} has {int(lengths.min())}")
    bins: list[list[int]] = []
    room: list[int] = []
    # A stable sort keeps equal lengths in the batch's order.
    for sequence in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[sequence])
        for index, left in enumerate(room):
            if length <= left:
                bins[index].append(sequence)
                room[index] -= length
                break
        else:
            bins.append([sequence])
            room.append(budget - length)
    return [np.array(sequences, dtype=np.int64) for sequences in bins]


def token_indices(lengths: Int32Array, sequences: Int64Array) -> Int64Array:
    """[t] where the tokens of `sequences` are in the batch, sequence after sequence.  lengths: [S] of the batch."""
    ends = np.cumsum(lengths, dtype=np.int64)
    chosen = lengths[sequences].astype(np.int64)
    skipped = np.cumsum(chosen) - chosen  # tokens of this micro-batch before each of its sequences
    indices: Int64Array = np.arange(chosen.sum(), dtype=np.int64) + np.repeat(
        ends[sequences] - chosen - skipped, chosen
    )
    return indices
