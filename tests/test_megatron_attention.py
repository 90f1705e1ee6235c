"""Packed attention: its blocks hold every token once, waste little, and no sequence sees another."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.megatron.attention import PackedAttention, lay_out

HEADS, KV_HEADS, WIDTH = 4, 2, 8
ROTATION = torch.rand(1, WIDTH // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)


def table(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions)[:, None] * ROTATION
    half = WIDTH // 2
    return angles.cos()[:, None], torch.cat([-angles.sin()[:, :half], angles.sin()[:, half:]], dim=-1)[:, None]


lengths_of_sequences = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(lambda n: sorted(n, reverse=True))


@given(lengths_of_sequences)
def test_blocks_hold_every_token_once_and_no_sequence_is_padded_by_half(lengths: list[int]) -> None:
    blocks = lay_out(np.array(lengths, np.int64), table(64)).blocks
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == sum(lengths) and sum(block.sequences for block in blocks) == len(lengths)
    left = list(lengths)
    for block in blocks:
        own = [left.pop(0) for _ in range(block.sequences)]
        assert block.longest == own[0] and own[-1] * 3 >= own[0] * 2
        assert not left or left[0] * 3 < own[0] * 2, "the next one would have fitted"
        if block.slots is not None:
            assert block.slots.tolist() == [row * own[0] + i for row, n in enumerate(own) for i in range(n)]
        else:
            assert set(own) == {own[0]}


@given(lengths_of_sequences, st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_it_is_causal_attention_of_each_sequence_alone(lengths: list[int], seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(sum(lengths), heads, WIDTH, generator=chance, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    upstream = torch.randn(sum(lengths), HEADS * WIDTH, generator=chance)
    module = PackedAttention(config=None)
    got = module(query, key, value, packed_seq_params=lay_out(np.array(lengths, np.int64), table(64)))
    wanted = torch.cat([
        _plain(*(x[end - n : end] for x in (query, key, value)))
        for n, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(each, (query, key, value), upstream) for each in (got, wanted))
    for own, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence, written out: [n, heads, WIDTH] each -> [n, HEADS * WIDTH]."""
    n = len(query)
    positions = torch.arange(n)[:, None] * ROTATION
    half = WIDTH // 2

    def rotated(x: torch.Tensor) -> torch.Tensor:
        crossed = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * positions.cos()[:, None] + crossed * positions.sin()[:, None]

    repeats = HEADS // KV_HEADS
    query, key = rotated(query), rotated(key).repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(repeats, 1)).reshape(n, -1)
