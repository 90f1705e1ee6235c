import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algorithms.denominators import DENOMINATORS, TokenKinds, loss_weights
from stream_rl.errors import ConfigError

# Per token: 0 context, 1 sampled and masked, 2 trainable.
batches = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6)


def kinds_of(sequences: list[list[int]], episodes: list[int] | None = None) -> TokenKinds:
    flat = np.concatenate([np.array(sequence) for sequence in sequences])
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    of = None if episodes is None else np.array(episodes, np.int64)
    return TokenKinds(lengths=lengths, sampled=flat > 0, trainable=flat == 2, episodes=of)


def reference(aggregation: str, sequences: list[list[int]], episodes: list[int], constant: float) -> list[float]:
    total = sum(sequence.count(2) for sequence in sequences)
    whole: dict[int, list[int]] = {}
    for sequence, episode in zip(sequences, episodes, strict=True):
        whole.setdefault(episode, []).extend(sequence)
    trained_episodes = sum(2 in tokens for tokens in whole.values())
    weights = []
    for sequence, episode in zip(sequences, episodes, strict=True):
        full = len(whole[episode]) - whole[episode].count(0)
        divisor = {"token_mean": total, "sequence_mean": trained_episodes * full, "constant": constant}[aggregation]
        weights += [1.0 / divisor if kind == 2 else 0.0 for kind in sequence]
    return weights


@pytest.mark.parametrize("aggregation", sorted(DENOMINATORS))
@given(sequences=batches, data=st.data())
def test_weights_match_a_plain_reference(aggregation: str, sequences: list[list[int]], data: st.DataObject) -> None:
    got = loss_weights(aggregation, kinds_of(sequences), 50.0)
    assert got.dtype == np.float32
    each = list(range(len(sequences)))
    np.testing.assert_allclose(got, reference(aggregation, sequences, each, 50.0), rtol=1e-6)
    episodes = [data.draw(st.sampled_from([7, 9, 1 << 40])) for _ in sequences]
    got = loss_weights(aggregation, kinds_of(sequences, episodes), 50.0)
    np.testing.assert_allclose(got, reference(aggregation, sequences, episodes, 50.0), rtol=1e-6)


def test_an_episode_that_forked_ten_times_weighs_as_much_as_its_sibling() -> None:
    weights = loss_weights("sequence_mean", kinds_of([[0, 2, 2]] * 10 + [[0, 2, 2]], [4] * 10 + [5]))
    assert weights[:30].sum() == pytest.approx(0.5)
    assert weights[30:].sum() == pytest.approx(0.5)


def test_masking_the_head_of_a_long_sequence_does_not_weight_its_tail_up() -> None:
    whole = loss_weights("sequence_mean", kinds_of([[0, 2, 2, 2, 2], [0, 2]]))
    masked = loss_weights("sequence_mean", kinds_of([[0, 1, 1, 1, 2], [0, 2]]))
    assert masked[4] == whole[4] == np.float32(1 / 8)
    assert masked[6] == whole[6] == np.float32(1 / 2)


@pytest.mark.parametrize("aggregation", sorted(DENOMINATORS))
@pytest.mark.parametrize("sequences", [[[0, 1, 1], [0, 0]], [[1]]])
def test_nothing_trainable_gives_zero_weights(aggregation: str, sequences: list[list[int]]) -> None:
    np.testing.assert_array_equal(loss_weights(aggregation, kinds_of(sequences), 2.0), 0.0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"constant', 'sequence_mean', 'token_mean'\], got 'mean'"):
        loss_weights("mean", kinds_of([[2]]))
    with pytest.raises(ConfigError, match=r"constant must be positive.*got 0\.0"):
        loss_weights("constant", kinds_of([[2]]))


def test_kinds_that_do_not_fit_are_refused() -> None:
    one = np.array([True])
    with pytest.raises(ValueError, match="lengths sum to 2"):
        loss_weights("token_mean", TokenKinds(lengths=np.array([2], np.int32), sampled=one, trainable=one))
    with pytest.raises(ValueError, match=r"episodes must have shape \(1,\)"):
        kinds_of([[2]], [1, 2])
    with pytest.raises(ValueError, match="only sampled"):
        loss_weights("token_mean", TokenKinds(lengths=np.array([1], np.int32), sampled=~one, trainable=one))
