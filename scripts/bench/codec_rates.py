"""How fast the codes are, against memcpy of the same weights on the same core.

Every measurement is a pair: the operation, and a copy of the weights right before or after it, in turns.  CPU time of
one thread, so that other processes on the machine cost neither side its turn; they still share the memory with both.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engines.weights.codes import payload, specimens, ulp
from engines.weights.codes.payload import Code
from stream_rl.errors import WeightsError

PIECE = 1 << 24
"""Elements of a tensor: 32 MiB."""
_T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1."""
MOST_PAIRS = len(_T_975) + 1


def rates(num_bytes: int, share: float, code: Code, pairs: int) -> dict[str, Any]:
    """Encoding (finding the changes included) and applying (decoding included) of bf16 weights of about `num_bytes`,
    tensor by tensor, as parts of an update are made and read."""
    old, new = _weights(num_bytes, share)
    live, copy = ([bits.clone() for bits in old] for _ in range(2))

    def memcpy() -> None:
        for source, target in zip(new, copy, strict=True):
            np.copyto(target.numpy(), source.numpy())

    def encode() -> int:
        return sum(payload.encode([specimens.change(a, b)], code).size for a, b in zip(old, new, strict=True))

    payloads = [payload.encode([specimens.change(a, b)], code) for a, b in zip(old, new, strict=True)]

    def apply() -> None:
        for bits, base, encoded in zip(live, live if code is Code.FAST else old, payloads, strict=True):
            [delta] = payload.decode(encoded, [specimens.known(base)])
            if not isinstance(delta, ulp.SparseDelta):
                raise WeightsError("made-up weights with few changes came back dense")
            ulp.apply_(bits, delta)

    apply()
    for bits, expected in zip(live, new, strict=True):
        if not np.array_equal(bits.numpy(), expected.numpy()):
            raise WeightsError(f"{code.name.lower()} did not give the new weights back")
    changed = sum(int((a.numpy() != b.numpy()).sum()) for a, b in zip(old, new, strict=True))
    elements = sum(bits.numel() for bits in old)
    memcpy()
    copies: list[float] = []
    return {
        "code": code.name.lower(),
        "bytes": 2 * elements,
        "changed_share": changed / elements,
        "bits_per_changed": 8 * sum(encoded.size for encoded in payloads) / changed,
        "encode_over_memcpy": _against(encode, memcpy, pairs, copies),
        "apply_over_memcpy": _against(apply, memcpy, pairs, copies),
        "memcpy_gb_per_s": 2 * elements / statistics.median(copies) / 1e9,
    }


def _weights(num_bytes: int, share: float) -> tuple[list[Any], list[Any]]:
    """Tensors before and after: one that is made up, and copies of it up to the size."""
    elements = max(num_bytes // 2, 1)
    old, new = specimens.made_up(min(elements, PIECE), share, seed=0)
    pieces = max(elements // PIECE, 1)
    return [old.clone() for _ in range(pieces)], [new.clone() for _ in range(pieces)]


def _against(
    operation: Callable[[], Any], memcpy: Callable[[], None], pairs: int, copies: list[float]
) -> dict[str, float]:
    """Rate of the operation over that of memcpy: geometric mean and its 95 % interval."""
    logs = []
    for i in range(pairs):
        if i % 2:
            copy, seconds = _seconds(memcpy), _seconds(operation)
        else:
            seconds, copy = _seconds(operation), _seconds(memcpy)
        logs.append(math.log(copy / seconds))
        copies.append(copy)
    mean = statistics.fmean(logs)
    half = _T_975[pairs - 2] * statistics.stdev(logs) / math.sqrt(pairs)
    return {"mean": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "pairs": pairs}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start
