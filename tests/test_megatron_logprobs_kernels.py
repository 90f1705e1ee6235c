"""The triton kernels against torch's log-softmax: on a GPU, or interpreted where triton is installed without one
(TRITON_INTERPRET=1)."""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and triton is not told to interpret", allow_module_level=True)

from engines.megatron import logprobs_kernels
from engines.megatron.logprobs import token_statistics
from engines.megatron.logprobs_kernels import FusedStatistics

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def statistics(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, entropy = FusedStatistics.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "block"), [(11, 16), (64, 16), (97, 32), (97, 128)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kernels_are_torchs_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, block: int, temperature: float
) -> None:
    monkeypatch.setattr(logprobs_kernels, "_BLOCK", block)
    chance = torch.Generator().manual_seed(width)
    logits = (torch.randn(7, width, generator=chance) * 4 + 30).to(dtype).to(DEVICE).requires_grad_()
    targets = torch.randint(0, width, (7,), generator=chance).to(DEVICE)
    upstream = torch.randn(7, generator=chance).to(DEVICE)
    results = []
    for function in (token_statistics, statistics):
        logprobs, entropy = function(logits, targets, temperature)
        assert not entropy.requires_grad
        (logprobs * upstream).sum().backward()
        assert logits.grad is not None
        results.append((logprobs.detach(), entropy, logits.grad))
        logits.grad = None
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5 if got.dtype == torch.float32 else 1e-2, atol=1e-5)


def test_a_forbidden_token_has_no_part() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 2.0, -torch.inf]], device=DEVICE, requires_grad=True)
    got, entropy = statistics(logits, torch.tensor([1, 1], device=DEVICE), 1.0)
    got.sum().backward()
    assert entropy.tolist() == pytest.approx([0.6931472, 0.0])
    assert got.tolist() == pytest.approx([-0.6931472, 0.0])
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_no_tokens_are_no_work() -> None:
    logits = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    got, entropy = statistics(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), 1.0)
    got.sum().backward()
    assert got.shape == entropy.shape == (0,)


@pytest.mark.skipif(DEVICE == "cpu", reason="as large as it is on a GPU")
def test_offsets_go_beyond_32_bits() -> None:
    """Planted by size: row 15,000 of a vocabulary of 151,936 begins beyond 2^31 elements."""
    logits = torch.zeros(15_000, 151_936, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        logits[-1, 7] = 20.0
    got, entropy = statistics(logits, torch.full((15_000,), 7, device=DEVICE), 1.0)
    got.sum().backward()
    assert got[-1].item() == pytest.approx(-3.1e-4, abs=1e-4) and got[0].item() == pytest.approx(-11.9312, abs=1e-3)
    assert entropy[0].item() == pytest.approx(11.9312, abs=1e-3)
    assert logits.grad is not None and logits.grad[-1].float().abs().max().item() < 1e-3
    assert logits.grad[0, 7].item() == pytest.approx(1.0, abs=1e-2)
