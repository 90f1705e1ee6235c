import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.megatron.model_shape import ModelShape
from engines.megatron.packing import cut, token_indices
from engines.megatron.plan import costs_of, plan

lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.int32))


@given(lengths_strategy, st.integers(1, 100))
def test_every_sequence_is_in_one_micro_batch_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    cuts = cut(lengths, budget)
    assert sorted(np.concatenate(cuts).tolist()) == list(range(len(lengths)))
    for sequences in cuts:
        assert len(sequences) == 1 or lengths[sequences].sum() <= budget
        assert np.all(np.diff(lengths[sequences]) <= 0), "longest first"


@given(lengths_strategy, st.integers(1, 100))
def test_micro_batches_are_few(lengths: np.ndarray, budget: int) -> None:
    cuts = cut(lengths, budget)
    # First fit never leaves two micro-batches at most half full.
    assert sum(2 * lengths[sequences].sum() <= budget for sequences in cuts) <= 1


@given(lengths_strategy, st.integers(1, 100))
def test_the_cut_is_deterministic(lengths: np.ndarray, budget: int) -> None:
    assert [c.tolist() for c in cut(lengths, budget)] == [c.tolist() for c in cut(lengths.copy(), budget)]


@given(lengths_strategy, st.integers(1, 100))
def test_token_indices_are_the_sequences_tokens_in_order(lengths: np.ndarray, budget: int) -> None:
    starts = np.cumsum(lengths) - lengths
    for sequences in cut(lengths, budget):
        expected = np.concatenate([np.arange(starts[s], starts[s] + lengths[s]) for s in sequences])
        np.testing.assert_array_equal(token_indices(lengths, sequences), expected)


def test_no_sequences_need_no_micro_batch() -> None:
    assert cut(np.array([], dtype=np.int32), 10) == []


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        cut(np.array([1], dtype=np.int32), 0)
    with pytest.raises(ValueError, match="sequence 1 has 0"):
        cut(np.array([1, 0], dtype=np.int32), 10)


# -- over ranks ----------------------------------------------------------------------------------------------

SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM", hidden_size=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn_size=3072,
    vocab_size=151936, max_positions=1 << 20, rms_norm_epsilon=1e-6, rope_theta=1e6, tied=True, dtype="bfloat16",
    eos_token_ids=(),
)  # fmt: skip
tailed = st.lists(st.integers(0, 17).flatmap(lambda e: st.integers(1, 1 << e)), min_size=1, max_size=40)


@given(tailed, st.integers(1, 1 << 17), st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_a_plan_gives_each_sequence_to_one_rank_and_every_rank_as_many_micro_batches(
    of: list[int], budget: int, ranks: int, pipelined: bool
) -> None:
    lengths = np.array(of, dtype=np.int32)
    costs = costs_of(SHAPE, lengths)
    made = plan(lengths, costs, budget, ranks, pipelined=pipelined)
    assert len(made) == ranks
    assert len({len(own) for own in made}) == 1, "the schedule waits for as many on each"
    assert sorted(int(s) for own in made for sequences in own for s in sequences) == list(range(len(lengths)))
    for own in made:
        sizes = [len(sequences) for sequences in own]
        assert sizes == sorted(sizes, key=bool, reverse=True), "fillers come last"
        for sequences in own:
            assert len(sequences) <= 1 or lengths[sequences].sum() <= budget
            assert np.all(np.diff(lengths[sequences]) <= 0), "longest first"
    assert any(len(own[-1]) for own in made), "no rank waits for more than there is"
    again = plan(lengths.copy(), costs.copy(), budget, ranks, pipelined=pipelined)
    assert [[s.tolist() for s in own] for own in again] == [[s.tolist() for s in own] for own in made]


@given(tailed, st.integers(1, 9))
@settings(deadline=None)
def test_no_rank_has_more_than_its_share_and_one_sequence(of: list[int], ranks: int) -> None:
    lengths = np.array(of, dtype=np.int32)
    costs = costs_of(SHAPE, lengths)
    loads = [sum(float(costs[sequences].sum()) for sequences in own) for own in plan(lengths, costs, 1 << 15, ranks)]
    assert max(loads) <= (costs.sum() - costs.max()) / ranks + costs.max() * (1 + 1e-9)


def test_attention_counts_in_the_balance() -> None:
    lengths = np.array([60_000, *[1000] * 120], dtype=np.int32)

    def beside_the_long_one(costs: np.ndarray) -> int:
        (own,) = (own for own in plan(lengths, costs, 65_536, 2) if any(0 in sequences for sequences in own))
        return int(lengths[np.concatenate(own)].sum()) - 60_000

    assert beside_the_long_one(lengths.astype(np.float64)) == 30_000
    assert beside_the_long_one(costs_of(SHAPE, lengths)) == 0


def test_micro_batches_of_a_pipeline_are_level() -> None:
    lengths = np.array([90, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10], dtype=np.int32)
    costs = lengths.astype(np.float64) ** 2
    for pipelined, most in ((False, 90**2 + 100), (True, 90**2)):
        (own,) = plan(lengths, costs, 100, 1, pipelined=pipelined)
        assert len(own) == 2
        assert max(float(costs[sequences].sum()) for sequences in own) == most
