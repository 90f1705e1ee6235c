"""Flash attention over packed sequences against the blocks, which transformers agrees with: needs a GPU."""

import numpy as np
import pytest
import torch

from engines.megatron import attention
from engines.megatron.attention import PackedAttention, lay_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
LENGTHS = np.array([700, 300, 299, 128, 64, 17, 2, 1, 1], np.int64)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_flash_attention_is_that_of_the_blocks(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    tokens, heads, width = int(LENGTHS.sum()), 8, 128
    chance = torch.Generator("cuda").manual_seed(0)

    def random(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, width, generator=chance, device="cuda").bfloat16().requires_grad_()

    query, key, value = random(heads), random(kv_heads), random(kv_heads)
    upstream = torch.randn(tokens, heads * width, generator=chance, device="cuda").bfloat16()
    angles = torch.arange(1024, device="cuda")[:, None] * torch.rand(width, generator=chance, device="cuda")
    layout = lay_out(LENGTHS, (angles.cos()[:, None], angles.sin()[:, None]))
    module, results = PackedAttention(config=None), []
    for flash in (False, True):
        monkeypatch.setattr(attention, "FLASH", flash)
        output = module(query, key, value, packed_seq_params=layout)
        results.append((output, *torch.autograd.grad(output, (query, key, value), upstream)))
    for wanted, got in zip(*results, strict=True):
        assert got.shape == wanted.shape
        apart = (got.float() - wanted.float()).norm() / wanted.float().norm()
        assert apart < 0.02  # bfloat16 in another order; a wrong boundary or head gives 0.1 and more
