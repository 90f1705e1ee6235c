"""How many bits a changed element takes: ours, what others do, and what there is no going below.

The baselines are written after the descriptions in the projects' sources; they are sizes, nothing decodes them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from engines.weights.codes import payload
from engines.weights.codes.changes import Change
from engines.weights.codes.payload import Code

Weights = list[npt.NDArray[np.int16]]


def sizes(changes: Sequence[Change]) -> dict[str, Any]:
    """Bits per changed element of a whole model's update by every code."""
    old, new = ([bits.numpy() for bits in side if bits is not None] for side in _sides(changes))
    num_elements = sum(bits.size for bits in old)
    num_changed = sum(int((before != after).sum()) for before, after in zip(old, new, strict=True))
    code_bytes = {code.name.lower(): payload.encode(changes, code).size for code in Code}
    code_bytes |= {"xor_zstd1": xor_zstd(old, new), "gap_xor_zstd1": gap_xor_zstd(old, new)}
    return {
        "elements": num_elements,
        "changed": num_changed,
        "changed_share": num_changed / num_elements,
        "bits_per_changed": {name: 8 * size / num_changed for name, size in code_bytes.items()}
        | {"index32_and_bf16": 48.0}
        | bounds(np.concatenate(old), np.concatenate(new)),
        "times_smaller_than_weights": {name: 2 * num_elements / size for name, size in code_bytes.items()},
        "small_times_smaller_than": {
            name: code_bytes[name] / code_bytes["small"] for name in ("xor_zstd1", "gap_xor_zstd1")
        },
    }


def xor_zstd(old: Weights, new: Weights) -> int:
    """slime, miles, SkyRL: XOR of the whole tensor, zstd level 1, tensor by tensor."""
    compressor = zstandard.ZstdCompressor(level=1)
    return sum(len(compressor.compress((a ^ b).tobytes())) for a, b in zip(old, new, strict=True))


def gap_xor_zstd(old: Weights, new: Weights) -> int:
    """NeMo-RL: gaps between changed elements in the narrowest type that holds a tensor's, XOR of their bits as int16,
    by type, zstd level 1 over all of it."""
    gaps: dict[int, list[bytes]] = {2: [], 4: [], 8: []}
    values = []
    for before, after in zip(old, new, strict=True):
        where = np.flatnonzero(before != after)
        steps = np.diff(where, prepend=0)
        width = next(width for width in gaps if int(steps.max(initial=0)) < 1 << 8 * width)
        gaps[width].append(steps.astype(f"<u{width}").tobytes())
        values.append((before[where] ^ after[where]).tobytes())
    plain = b"".join([*(part for parts in gaps.values() for part in parts), *values])
    return len(zstandard.ZstdCompressor(level=1).compress(plain))


def bounds(old: npt.NDArray[np.int16], new: npt.NDArray[np.int16]) -> dict[str, float]:
    """Entropies: of which elements changed and by how many steps, if all are alike, and given the old exponent."""
    where = np.flatnonzero(old != new)
    steps = (_ordinals(new[where]) - _ordinals(old[where])) % (1 << 16)
    exponents, of_changed = (old & 0x7FFF) >> 7, (old[where] & 0x7FFF) >> 7
    alike = _coin(np.array([old.size]), np.array([where.size])) + _entropy(steps)
    given = _coin(np.bincount(exponents, minlength=256), np.bincount(of_changed, minlength=256))
    given += sum(_entropy(steps[of_changed == exponent]) for exponent in np.unique(of_changed))
    return {"bound_alike": alike / where.size, "bound_given_exponent": given / where.size}


def _sides(changes: Sequence[Change]) -> tuple[list[Any], list[Any]]:
    return [change.old for change in changes], [change.new for change in changes]


def _ordinals(bits: npt.NDArray[np.int16]) -> npt.NDArray[np.int64]:
    wide = bits.astype(np.int64)
    return np.where(wide < 0, wide ^ 0x7FFF, wide)


def _entropy(values: npt.NDArray[np.int64]) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(values.size, 1))).sum())


def _coin(tosses: npt.NDArray[np.int64], heads: npt.NDArray[np.int64]) -> float:
    return float((_weighed(tosses) - _weighed(heads) - _weighed(tosses - heads)).sum())


def _weighed(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.multiply(counts, np.log2(np.maximum(counts, 1)), dtype=np.float64)
