import pytest
import torch

from engines.megatron import logprobs
from engines.megatron.logprobs import token_statistics


@pytest.mark.parametrize("elements_at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_match_log_softmax_however_many_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, elements_at_once: int, temperature: float
) -> None:
    monkeypatch.setattr(logprobs, "_ELEMENTS_AT_ONCE", elements_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(13, 11, generator=generator) * 4).requires_grad_()
    targets = torch.randint(0, 11, (13,), generator=generator)
    upstream = torch.randn(13, generator=generator)

    reference = (logits / temperature).log_softmax(-1)
    (reference.gather(1, targets[:, None])[:, 0] * upstream).sum().backward()
    wanted, logits.grad = logits.grad, None
    got, entropy = token_statistics(logits, targets, temperature)
    (got * upstream).sum().backward()
    torch.testing.assert_close(got, reference.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(reference.exp() * reference).sum(-1))
    torch.testing.assert_close(logits.grad, wanted)
    assert not entropy.requires_grad


def test_a_forbidden_token_has_no_part_in_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    got, entropy = token_statistics(logits, torch.tensor([1]), 1.0)
    got.sum().backward()
    assert entropy.item() == pytest.approx(0.6931472)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.5, 0.0]]


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(5)
    got, _ = token_statistics(logits, targets, 1.0)
    wanted = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
