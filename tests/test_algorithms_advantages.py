import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algorithms.advantages import ADVANTAGES, centered, get_advantage, grpo
from stream_rl.errors import ConfigError


def reference(rewards: list[float], groups: list[int], with_std: bool) -> list[float]:
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        std = np.std(members, ddof=1) if len(members) > 1 else 1.0
        result.append((reward - np.mean(members)) / (std + 1e-6 if with_std else 1.0))
    return result


members = st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 4)), min_size=1, max_size=30)


@given(members)
def test_advantages_match_a_plain_reference(pairs: list[tuple[float, int]]) -> None:
    rewards, groups = [reward for reward, _ in pairs], [group for _, group in pairs]
    np.testing.assert_allclose(centered(rewards, groups), reference(rewards, groups, False), rtol=1e-5, atol=1e-5)
    expected = reference(rewards, groups, True)
    # Rewards that differ by rounding only are divided by 1e-6.
    np.testing.assert_allclose(grpo(rewards, groups), expected, rtol=1e-4, atol=1e-4)


def test_a_known_group() -> None:
    np.testing.assert_allclose(grpo([1.0, 0.0], [7, 7]), [0.70710578, -0.70710578], rtol=1e-5)
    np.testing.assert_allclose(centered([1.0, 0.0, 5.0], [7, 7, 2]), [0.5, -0.5, 0.0])


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_group_of_one_or_of_equals_has_no_advantage(name: str) -> None:
    np.testing.assert_allclose(get_advantage(name)([3.0, 0.25, 0.25, 0.25], [9, 1, 1, 1]), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_no_trajectories_have_no_advantages(name: str) -> None:
    assert get_advantage(name)([], []).shape == (0,)


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        grpo([1.0, float("nan")], [0, 0])
    with pytest.raises(ValueError, match="one group id for each"):
        grpo([1.0, 2.0], [0])


def test_an_unknown_advantage_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"one of \['centered', 'grpo'\], got 'gae'"):
        get_advantage("gae")
