import dataclasses

import numpy as np
import pytest
import torch

from engines.megatron.flops import model_flops, peak_flops
from engines.megatron.specimen import QWEN3, sized


def test_the_formula_is_that_of_a_count_by_hand() -> None:
    """One layer of two heads of 4 on a width of 8, one key head, an MLP of 24, 10 words; sequences of 3 and 5."""
    shape = dataclasses.replace(
        sized(64, 1, 10), hidden_size=8, heads=2, kv_heads=1, head_dim=4, ffn_size=24, tied=False
    )
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8  # query, key and value, output
    per_token = 2 * (projections + 3 * 8 * 24 + 8 * 10)
    attention = {n: 2 * 2 * 2 * 4 * n * n / 2 for n in (3, 5)}  # scores and sums, two heads of 4, half of n * n
    expected = 3 * (per_token * 8 + sum(attention.values()))
    assert model_flops(shape, np.array([3, 5], np.int32)) == expected


def test_a_model_of_06_billion_takes_about_six_operations_a_weight_and_token() -> None:
    weights = 596e6
    assert model_flops(QWEN3, np.full(1000, 10, np.int32)) == pytest.approx(6 * weights * 10_000, rel=0.01)
    long = model_flops(QWEN3, np.array([32_768], np.int32))
    assert long > 1.5 * model_flops(QWEN3, np.full(32_768 // 64, 64, np.int32))


@pytest.mark.parametrize(
    ("setting", "dtype", "name", "expected"),
    [
        (5.0, "bfloat16", "NVIDIA H100 80GB HBM3", 5.0),
        (0.0, "bfloat16", "NVIDIA H100 80GB HBM3", 989e12),
        (0.0, "bfloat16", "NVIDIA H200", 989e12),
        (0.0, "float32", "NVIDIA H200", 0.0),
        (0.0, "bfloat16", "NVIDIA GeForce RTX 3090", 0.0),
        (0.0, "bfloat16", None, 0.0),
        (7.0, "float32", None, 7.0),
    ],
)
def test_a_peak_is_the_recipes_or_that_of_a_known_gpu(
    monkeypatch: pytest.MonkeyPatch, setting: float, dtype: str, name: str | None, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops(setting, dtype) == expected
