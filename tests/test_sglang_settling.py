"""What changes make of live elements: on a GPU the same as in numpy, bit for bit."""

import numpy as np
import pytest
import torch

from engines.sglang.settling import prepare, settled
from engines.weights import fingerprint
from engines.weights.codes import arrays

MODES = [(False, False), (True, False), (True, True)]


def check(device: str, dtype: torch.dtype, dense: bool, anchor: bool, counts: list[int], seed: int = 0) -> None:
    rng, low = np.random.default_rng(seed), np.iinfo(np.int64)
    width = np.dtype(f"i{dtype.itemsize}")
    limits = np.iinfo(width)
    arena = rng.integers(limits.min, limits.max, 5000, width, endpoint=True)
    arena[:4] = limits.min, limits.max, 0, -1
    total = sum(counts)
    places = rng.permutation(arena.size)[:total] if total <= arena.size else rng.integers(0, arena.size, total)
    places[: min(4, total)] = np.arange(min(4, total))
    linear = rng.integers(low.min, low.max, total, endpoint=True)
    values = rng.integers(limits.min, limits.max, total, width, endpoint=True)
    new = values.copy()
    if not dense:
        by_steps = arena[places]
        arrays.apply(by_steps, np.arange(total), values)
        new = by_steps
    expected, first = [], 0
    for count in counts:
        gain = 0
        for k in range(first, first + count):
            seed_of_one = int(linear[k])  # position 0: the seed is all of what was hashed so far
            gain += arrays.element_sum(seed_of_one, np.zeros(1, np.int64), new[k : k + 1])
            gain -= 0 if anchor else arrays.element_sum(seed_of_one, np.zeros(1, np.int64), arena[places[k : k + 1]])
        expected.append(gain % (1 << 64))
        first += count
    on_device = [torch.from_numpy(each).to(device) for each in (arena, places, linear, values)]
    got, gains = settled(*on_device, counts, dense=dense, anchor=anchor)
    assert got.dtype == fingerprint.integers(dtype) and np.array_equal(got.cpu().numpy(), new)
    assert [gain % (1 << 64) for gain in gains] == expected
    assert np.array_equal(on_device[0].cpu().numpy(), arena), "nothing is written"


@pytest.mark.parametrize(("dense", "anchor"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_new_bits_and_gains_are_those_of_the_reference(dtype: torch.dtype, dense: bool, anchor: bool) -> None:
    for counts in ([0], [1], [7, 0, 300], [1024, 1, 1023]):
        check("cpu", dtype, dense, anchor, counts)


@pytest.mark.gpu
@pytest.mark.parametrize(("dense", "anchor"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_does_the_same_in_one_kernel(dtype: torch.dtype, dense: bool, anchor: bool) -> None:
    prepare([torch.zeros(16, dtype=fingerprint.integers(dtype), device="cuda")])
    for counts in ([0], [1], [7, 0, 300], [1024, 1, 1023], [2049, 33, 2048]):
        check("cuda", dtype, dense, anchor, counts)
