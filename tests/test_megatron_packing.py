import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.megatron.packing import cut, token_indices

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
