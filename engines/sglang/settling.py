"""What changes make of live elements, and of the fingerprint: on a GPU in one pass over memory.

Memory is what a decoding GPU has least of: a chain of torch's operations would read and write each element
dozens of times.
"""

from collections.abc import Iterable, Sequence

import torch

from engines.weights import fingerprint
from engines.weights.codes import ulp

BLOCK = 1024


def settled(
    arena: torch.Tensor,
    places: torch.Tensor,
    linear: torch.Tensor,
    values: torch.Tensor,
    counts: Sequence[int],
    *,
    dense: bool,
    anchor: bool,
) -> tuple[torch.Tensor, list[int]]:
    """New bits of the elements at `places`, and by how much those of each of the consecutive `counts` change the
    fingerprint; in an `anchor` what was there before does not count.

    arena [elements] live bits; places [n] int64; linear [n] int64, see `fingerprint.linear`; values [n]: steps, or
    new bits if they are `dense`.
    """
    if _fuses(arena):
        return _fused(arena, places, linear, values, counts, dense, anchor)
    old = arena[places]
    new = values if dense else ulp.stepped(old, values)
    gain = fingerprint.hashes(linear, new)
    if not anchor:
        gain -= fingerprint.hashes(linear, old)
    return new, _sums(torch.split(gain, list(counts)))


def prepare(arenas: Iterable[torch.Tensor]) -> None:
    """Compile what `settled` needs for them, which takes seconds; nothing is written."""
    for arena in arenas:
        if not _fuses(arena):
            continue
        none = torch.empty(0, dtype=torch.int64, device=arena.device)
        for dense, anchor in ((False, False), (True, False), (True, True)):
            settled(arena, none, none, none.to(arena.dtype), [0], dense=dense, anchor=anchor)


def _fuses(arena: torch.Tensor) -> bool:
    return arena.device.type == "cuda" and arena.dtype in ulp.INTEGERS


def _sums(gains: Iterable[torch.Tensor]) -> list[int]:
    sums: list[int] = torch.stack([gain.sum() for gain in gains]).tolist()
    return sums


def _fused(
    arena: torch.Tensor,
    places: torch.Tensor,
    linear: torch.Tensor,
    values: torch.Tensor,
    counts: Sequence[int],
    dense: bool,
    anchor: bool,
) -> tuple[torch.Tensor, list[int]]:
    from engines.sglang.settling_kernel import settle  # triton is where there is a GPU

    new, gains, begin = torch.empty_like(values), [], 0
    low, free = torch.iinfo(arena.dtype).max, 64 - 8 * arena.element_size()
    for count in counts:
        blocks = max(1, -(-count // BLOCK))
        gains.append(torch.empty(blocks, dtype=torch.int64, device=arena.device))
        settle[(blocks,)](
            arena, places, linear, values, new, gains[-1], begin, begin + count,
            DENSE=dense, ANCHOR=anchor, LOW=low, FREE=free,
            BITS=fingerprint.BITS, MIX_1=fingerprint.MIX_1, MIX_2=fingerprint.MIX_2, BLOCK=BLOCK,
        )  # fmt: skip
        begin += count
    return new, _sums(gains)
