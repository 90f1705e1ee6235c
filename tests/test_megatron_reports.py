"""The norm of a gradient is right to rounding, however large the model."""

import math
import types

import pytest
import torch

from engines.megatron.reports import squared_gradient_norm

ALONE = types.SimpleNamespace(peers=types.SimpleNamespace(size=1))


def test_the_norm_of_many_elements_is_exact_to_rounding() -> None:
    buffers = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 1e-3 for n in (20_000_000, 1, 300_000)]
    wrapped = types.SimpleNamespace(buffers=[types.SimpleNamespace(grad_data=buffer) for buffer in buffers])
    exact = sum(buffer.double().square().sum().item() for buffer in buffers)
    assert squared_gradient_norm(wrapped, None, ALONE) == pytest.approx(exact, rel=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_anywhere_is_not_finite(bad: float) -> None:
    buffer = torch.zeros(1_000_000)
    buffer[777_777] = bad
    wrapped = types.SimpleNamespace(buffers=[types.SimpleNamespace(grad_data=buffer)])
    assert not math.isfinite(squared_gradient_norm(wrapped, None, ALONE))  # type: ignore[arg-type]
