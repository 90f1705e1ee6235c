"""Advantages against loops over sequences and tokens, written after the papers and verl."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.denominators import TokenKinds
from algorithms.estimators import ESTIMATORS, advantages, value_targets
from algorithms.scores import Scored, overlong
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

few = settings(max_examples=40, deadline=None)
every_estimator = pytest.mark.parametrize("name", sorted(ESTIMATORS))
GROUP_RELATIVE = ("grpo", "centered", "rloo")


def scored(seed: int, num_sequences: int = 9) -> Scored:
    """Prompt, turns of the policy and of the environment; some sequences have no sampled or no trainable token."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, num_sequences).astype(np.int32)
    tokens = int(lengths.sum())
    sampled = random.random(tokens) < 0.7
    trainable = sampled & (random.random(tokens) < 0.8)
    logprobs = [np.where(sampled, -random.exponential(1, tokens), 0).astype(np.float32) for _ in range(4)]
    rewards, groups = random.normal(size=num_sequences).astype(np.float32), random.integers(5, 8, num_sequences)
    episodes = 10 * groups + random.integers(0, 4, num_sequences)
    return Scored(
        kinds=TokenKinds(lengths=lengths, sampled=sampled, trainable=trainable, episodes=episodes),
        rewards=rewards,
        groups=groups,
        behavior_logprobs=logprobs[0],
        reference_logprobs=logprobs[1],
        teacher_logprobs=logprobs[2],
        values=logprobs[3],
    )


def section_of(name: str, **changes: Any) -> Algorithm:
    return Algorithm(advantage=name, **changes)  # type: ignore[arg-type]


def sequences_of(data: Scored) -> list[list[int]]:
    """The indices of each sequence's sampled tokens."""
    ends = np.cumsum(data.kinds.lengths)
    return [
        [t for t in range(end - length, end) if data.kinds.sampled[t]]
        for end, length in zip(ends.tolist(), data.kinds.lengths.tolist(), strict=True)
    ]


def plain_kl(data: Scored, section: Algorithm, token: int) -> float:
    if section.kl_in != "reward" or not data.kinds.trainable[token]:
        return 0.0
    x = float(data.reference_logprobs[token]) - float(data.behavior_logprobs[token])  # type: ignore[index]
    return section.kl_coefficient * {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[section.kl_estimator]


def plain_scores(data: Scored, section: Algorithm, with_kl: bool) -> list[float]:
    scores = []
    for reward, tokens in zip(data.rewards.tolist(), sequences_of(data), strict=True):
        if section.overlong_buffer:
            over = len(tokens) - (section.overlong_length - section.overlong_buffer)
            reward -= section.overlong_penalty * min(max(over / section.overlong_buffer, 0.0), 1.0)
        scores.append(reward - (sum(plain_kl(data, section, t) for t in tokens) if with_kl else 0.0))
    return scores


def plain_group_relative(name: str, data: Scored, scores: list[float]) -> list[float]:
    known = data.kinds.episodes
    episodes: list[Any] = list(range(len(scores))) if known is None else known.tolist()
    members: dict[Any, dict[Any, list[float]]] = {}
    for group, episode, score in zip(data.groups.tolist(), episodes, scores, strict=True):
        members.setdefault(group, {}).setdefault(episode, []).append(score)
    result = []
    for group, episode in zip(data.groups.tolist(), episodes, strict=True):
        of_episode = {other: float(np.mean(values)) for other, values in members[group].items()}
        score = of_episode[episode]
        everyone, others = list(of_episode.values()), [of_episode[other] for other in of_episode if other != episode]
        std = float(np.std(everyone, ddof=1)) if others else 0.0
        result.append(
            {
                "centered": score - np.mean(everyone),
                "grpo": (score - np.mean(everyone)) / (std + 1e-6),
                "rloo": score - np.mean(others) if others else 0.0,
            }[name]
        )
    return result


def plain_whitened(data: Scored, values: dict[int, float]) -> np.ndarray:  # type: ignore[type-arg]
    result = np.zeros(len(data.kinds.sampled))
    mean = sum(values.values()) / len(values)
    variance = sum((value - mean) ** 2 for value in values.values()) / max(len(values) - 1, 1)
    for t, value in values.items():
        result[t] = (value - mean) / math.sqrt(variance + 1e-8)
    return result


def plain_tokens(name: str, data: Scored, section: Algorithm) -> dict[int, float]:
    """Of the sampled tokens, before whitening: the loops of verl's core_algos.py, token by token from the end."""
    scores = plain_scores(data, section, with_kl=False)
    if name == "reinforce_plus_plus_baseline":
        scores = plain_group_relative("centered", data, scores)
    result = {}
    for score, tokens in zip(scores, sequences_of(data), strict=True):
        running, value_next, reward = 0.0, 0.0, score
        for t in reversed(tokens):
            reward -= plain_kl(data, section, t)
            if name == "gae":
                value = float(data.values[t])  # type: ignore[index]
                error = reward + section.gamma * value_next - value
                running, value_next = error + section.gamma * section.gae_lambda * running, value
            else:
                running = reward + section.gamma * running
            result[t], reward = running, 0.0
    return result


SETTINGS = [
    {},
    {"kl_coefficient": 0.2, "kl_in": "reward", "kl_estimator": "k1"},
    {"kl_coefficient": 0.2, "kl_in": "reward", "overlong_buffer": 4, "overlong_length": 7, "overlong_penalty": 0.5},
]


@pytest.mark.parametrize("name", GROUP_RELATIVE)
@pytest.mark.parametrize("changes", SETTINGS)
@few
@given(seed=st.integers(0, 2**32 - 1), fan_out=st.booleans())
def test_group_relative_advantages_match_a_plain_reference(
    name: str, changes: dict[str, Any], seed: int, fan_out: bool
) -> None:
    section, data = section_of(name, **changes), scored(seed)
    data = data if fan_out else dataclasses.replace(data, kinds=dataclasses.replace(data.kinds, episodes=None))
    expected = plain_group_relative(name, data, plain_scores(data, section, with_kl=True))
    got = advantages(data, section)
    assert got.dtype == np.float32
    on_tokens = np.where(data.kinds.sampled, np.repeat(expected, data.kinds.lengths), 0.0)
    scale = max(1.0, float(np.abs(expected).max()))  # float32 rewards that differ by rounding are divided by 1e-6
    np.testing.assert_allclose(got / scale, on_tokens / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
@pytest.mark.parametrize("changes", [*SETTINGS, {"gamma": 0.9, "gae_lambda": 0.5}, {"gamma": 0.0}])
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_token_level_advantages_match_a_plain_reference(name: str, changes: dict[str, Any], seed: int) -> None:
    section, data = section_of(name, **changes), scored(seed)
    plain = plain_tokens(name, data, section)
    np.testing.assert_allclose(advantages(data, section), plain_whitened(data, plain), rtol=1e-4, atol=1e-5)
    if name == "gae":
        targets = np.zeros(len(data.kinds.sampled))
        for t, value in plain.items():
            targets[t] = value + float(data.values[t])  # type: ignore[index]
        np.testing.assert_allclose(value_targets(data, section), targets, rtol=1e-5, atol=1e-5)


def test_returns_over_a_long_sequence_are_those_of_a_loop() -> None:
    length = 5000
    ones = np.ones(length, np.bool_)
    values = np.random.default_rng(0).normal(size=length).astype(np.float32)
    data = Scored(
        kinds=TokenKinds(lengths=np.array([length], np.int32), sampled=ones, trainable=ones),
        rewards=np.array([1.0], np.float32),
        groups=np.array([0]),
        values=values,
    )
    section = section_of("gae", gae_lambda=0.99)
    plain = plain_tokens("gae", data, section)
    np.testing.assert_allclose(value_targets(data, section), [plain[t] + values[t] for t in range(length)], atol=1e-5)


def test_distillation_is_the_log_ratio_of_the_teacher() -> None:
    data = scored(3)
    got = advantages(data, section_of("distillation"))
    difference = data.teacher_logprobs - data.behavior_logprobs  # type: ignore[operator]
    np.testing.assert_allclose(got, np.where(data.kinds.trainable, difference, 0.0), rtol=1e-6)


def flat(rewards: list[float], groups: list[int], episodes: list[int] | None = None) -> Scored:
    """Sequences of one sampled token, with a critic that says nothing and a teacher that agrees."""
    num, zeros = len(rewards), np.zeros(len(rewards), np.float32)
    ones = np.ones(num, np.bool_)
    of = None if episodes is None else np.array(episodes, np.int64)
    return Scored(
        kinds=TokenKinds(lengths=np.ones(num, np.int32), sampled=ones, trainable=ones, episodes=of),
        rewards=np.array(rewards, np.float32),
        groups=np.array(groups, np.int64),
        behavior_logprobs=zeros,
        teacher_logprobs=zeros,
        values=zeros,
    )


def test_known_groups() -> None:
    two = flat([1.0, 0.0], [7, 7])
    np.testing.assert_allclose(advantages(two, section_of("grpo")), [0.70710578, -0.70710578], rtol=1e-5)
    np.testing.assert_allclose(advantages(two, section_of("rloo")), [1.0, -1.0])
    three = flat([1.0, 0.0, 5.0], [7, 7, 2])
    np.testing.assert_allclose(advantages(three, section_of("centered")), [0.5, -0.5, 0.0])


@pytest.mark.parametrize("name", [*GROUP_RELATIVE, "reinforce_plus_plus_baseline"])
def test_an_episode_of_many_sequences_counts_once(name: str) -> None:
    """Its siblings get what they would beside one sequence of it."""
    once = advantages(flat([1.0, 0.0, 0.0], [4, 4, 4], [9, 8, 7]), section_of(name))
    thrice = advantages(flat([1.0, 1.0, 1.0, 0.0, 0.0], [4, 4, 4, 4, 4], [9, 9, 9, 8, 7]), section_of(name))
    if name in GROUP_RELATIVE:
        np.testing.assert_allclose(thrice, once[[0, 0, 0, 1, 2]])
    else:  # whitening is over tokens, of which an episode of three has more
        assert thrice[0] == thrice[2] > 0.0 > thrice[3] == thrice[4]


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_the_sequences_of_an_episode_have_one_advantage_whatever_their_length(name: str) -> None:
    lengths = np.array([6, 1, 3, 2], np.int32)
    ones, rewards = np.ones(12, np.bool_), np.array([1.0, 1.0, 0.0, 0.5], np.float32)
    kinds = TokenKinds(lengths=lengths, sampled=ones, trainable=ones, episodes=np.array([4, 4, 5, 6]))
    data = Scored(kinds=kinds, rewards=rewards, groups=np.zeros(4, np.int64))
    got = advantages(data, section_of(name, overlong_buffer=4, overlong_length=6))
    assert len(set(got[:7].tolist())) == 1 < len(set(got.tolist()))


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae", *GROUP_RELATIVE])
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_what_an_environment_said_neither_gets_nor_delays_reward(name: str, seed: int) -> None:
    """With any number of its tokens between those of the policy, these have the same advantages."""
    data, random = scored(seed), np.random.default_rng(seed)
    section = section_of(name, gamma=0.9, kl_coefficient=0.1, kl_in="reward")
    kinds = data.kinds
    copies = np.where(kinds.sampled, 1, random.integers(1, 5, len(kinds.sampled)))
    index = np.repeat(np.arange(len(copies)), copies)
    lengths = np.bincount(kinds.sequence, copies, len(kinds.lengths)).astype(np.int32)
    longer = dataclasses.replace(kinds, lengths=lengths, sampled=kinds.sampled[index], trainable=kinds.trainable[index])
    names = ("behavior_logprobs", "reference_logprobs", "values")
    more = dataclasses.replace(
        data, kinds=longer, teacher_logprobs=None, **{key: getattr(data, key)[index] for key in names}
    )
    got = advantages(more, section)
    np.testing.assert_allclose(got, advantages(data, section)[index], rtol=1e-5, atol=1e-6)
    assert not got[~longer.sampled].any()


@pytest.mark.parametrize("name", [*GROUP_RELATIVE, "reinforce_plus_plus_baseline"])
def test_a_group_of_one_or_of_equals_has_no_advantage(name: str) -> None:
    np.testing.assert_allclose(
        advantages(flat([3.0, 0.25, 0.25, 0.25], [9, 1, 1, 1]), section_of(name)), 0.0, atol=1e-6
    )


@every_estimator
def test_no_trajectories_have_no_advantages(name: str) -> None:
    assert advantages(flat([], []), section_of(name)).shape == (0,)
    assert advantages(flat([2.0], [1]), section_of(name)).tolist() == [0.0]


@every_estimator
@pytest.mark.parametrize("poison", [-math.inf, math.nan])
def test_what_the_engine_says_of_masked_tokens_changes_nothing(name: str, poison: float) -> None:
    """But the critic's values: a masked token's is what the reward of an earlier one is compared with."""
    data = scored(11)
    section = section_of(name, **({} if name == "distillation" else {"kl_coefficient": 0.1, "kl_in": "reward"}))
    names = ("behavior_logprobs", "reference_logprobs", "teacher_logprobs")
    spoiled = {key: np.where(data.kinds.trainable, getattr(data, key), poison).astype(np.float32) for key in names}
    np.testing.assert_array_equal(advantages(dataclasses.replace(data, **spoiled), section), advantages(data, section))


def test_overlong_answers_lose_linearly() -> None:
    """DAPO's numbers: 16,384 tokens are free, 20,480 lose 1."""
    lost = overlong([0, 16384, 18432, 20480, 30000], longest=20480, buffer=4096, penalty=1.0)
    np.testing.assert_allclose(lost, [0.0, 0.0, -0.5, -1.0, -1.0])


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        flat([1.0, float("nan")], [0, 0])
    with pytest.raises(ValueError, match="one group id for each"):
        flat([1.0], [0, 0])
    with pytest.raises(ValueError, match=r"values must have shape \(2,\)"):
        dataclasses.replace(flat([1.0, 2.0], [0, 0]), values=np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        ("gae", {}, "values"),
        ("distillation", {}, "teacher_logprobs"),
        ("grpo", {"kl_coefficient": 0.1, "kl_in": "reward"}, "reference_logprobs"),
    ],
)
def test_an_estimator_says_what_it_lacks(name: str, changes: dict[str, Any], missing: str) -> None:
    data = dataclasses.replace(flat([1.0], [0]), values=None, teacher_logprobs=None)
    with pytest.raises(ValueError, match=f"needs {missing}"):
        advantages(data, section_of(name, **changes))


def test_an_unknown_advantage_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"one of \['centered', .*, got 'best'"):
        advantages(flat([], []), section_of("best"))
