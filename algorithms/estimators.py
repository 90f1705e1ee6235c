"""Advantages: how much better each token was than what was expected of it.

Each estimator takes (data, section) and returns advantages [T] float64, 0 where the token was not sampled.  Means and
standard deviations are over the whole step, or over a whole group: every member counts, also one of which no token is
trained, and every sampled token.  In a group the sequences of one episode are one: all get the advantage of their mean
score.  A new estimator is one function and one line in `ESTIMATORS`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from algorithms.scores import Float64Array, Scored, kl_rewards, scores, shaped_rewards
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError
from stream_rl.types import Float32Array

Estimator = Callable[[Scored, Algorithm], Float64Array]


def centered(data: Scored, section: Algorithm) -> Float64Array:
    """r - mean of the group: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2)."""
    group = _Groups(data, scores(data, section))
    return _on_tokens(data, group.own - group.mean)


def grpo(data: Scored, section: Algorithm) -> Float64Array:
    """(r - mean) / (std + 1e-6) within the group: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The std has ddof = 1, as in verl (core_algos.py, compute_grpo_outcome_advantage); a group of one has advantage 0.
    """
    group = _Groups(data, scores(data, section))
    return _on_tokens(data, (group.own - group.mean) / (group.std + 1e-6))


def rloo(data: Scored, section: Algorithm) -> Float64Array:
    """r - mean of the others of the group: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 3.2).

    A group of one has advantage 0.
    """
    group = _Groups(data, scores(data, section))
    others = (group.count * group.mean - group.own) / np.maximum(group.count - 1, 1)
    return _on_tokens(data, np.where(group.count > 1, group.own - others, 0.0))


def reinforce_plus_plus(data: Scored, section: Algorithm) -> Float64Array:
    """The discounted return, whitened over the step's tokens: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262).

    Tokens that were not sampled take no discount.  As verl's compute_reinforce_plus_plus_outcome_advantage.
    """
    return _whiten(data, _returns(data, section, shaped_rewards(data, section)))


def reinforce_plus_plus_baseline(data: Scored, section: Algorithm) -> Float64Array:
    """As `reinforce_plus_plus`, of the reward less its group's mean: REINFORCE++-baseline (the same paper)."""
    group = _Groups(data, shaped_rewards(data, section))
    return _whiten(data, _returns(data, section, group.own - group.mean))


def gae(data: Scored, section: Algorithm) -> Float64Array:
    """Generalized advantage estimation, whitened over the step's tokens: PPO with a critic."""
    return _whiten(data, _gae(data, section))


def value_targets(data: Scored, section: Algorithm) -> Float32Array:
    """[T] what the critic learns: the unwhitened advantage plus the value, as in verl; 0 where not sampled."""
    values = np.where(data.kinds.sampled, data.tokens("values", "value_targets"), 0.0)
    return (_gae(data, section) + values).astype(np.float32)


def distillation(data: Scored, section: Algorithm) -> Float64Array:
    """log-prob of the teacher less that of the sampler: the reverse KL per token (Thinking Machines, "On-Policy
    Distillation", 2025; Agarwal et al. 2023, arXiv 2306.13649).  Rewards and groups are not looked at."""
    trained, difference = data.kinds.trainable, np.zeros(len(data.kinds.sampled))
    teacher, own = (data.tokens(name, "distillation") for name in ("teacher_logprobs", "behavior_logprobs"))
    difference[trained] = teacher[trained] - own[trained]
    return difference


ESTIMATORS: dict[str, Estimator] = {
    "grpo": grpo,
    "centered": centered,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gae": gae,
    "distillation": distillation,
}


def advantages(data: Scored, section: Algorithm) -> Float32Array:
    """[T] by the recipe's estimator.

    Raises ConfigError for an unknown one, ValueError if what it needs is missing.
    """
    if section.advantage not in ESTIMATORS:
        raise ConfigError(f"algorithm.advantage must be one of {sorted(ESTIMATORS)}, got {section.advantage!r}")
    return ESTIMATORS[section.advantage](data, section).astype(np.float32)


class _Groups:
    """For each sequence [S], of its group: mean and std (ddof = 1; 0 for one) of the episodes' scores, their count, and
    the score of its own episode.  An episode's is the mean of its sequences'."""

    def __init__(self, data: Scored, score: Float64Array) -> None:
        _, group = np.unique(data.groups, return_inverse=True)
        episode = data.kinds.episode
        of_episode = np.bincount(episode, score) / np.maximum(np.bincount(episode), 1)
        group_of_episode = np.zeros(len(of_episode), dtype=np.int64)
        group_of_episode[episode] = group
        counts = np.bincount(group_of_episode)
        means = np.bincount(group_of_episode, of_episode) / np.maximum(counts, 1)
        squares = np.bincount(group_of_episode, (of_episode - means[group_of_episode]) ** 2)
        self.mean: Float64Array = means[group]
        self.std: Float64Array = np.sqrt(squares / np.maximum(counts - 1, 1))[group]
        self.count: npt.NDArray[np.int64] = counts[group]
        self.own: Float64Array = of_episode[episode]


def _on_tokens(data: Scored, advantage: Float64Array) -> Float64Array:
    """[S] -> [T]"""
    return np.where(data.kinds.sampled, advantage[data.kinds.sequence], 0.0)


def _token_rewards(data: Scored, section: Algorithm, reward: Float64Array) -> Float64Array:
    """[T] the KL rewards, and the sequence's [S] on its last sampled token."""
    rewards, where = kl_rewards(data, section), np.flatnonzero(data.kinds.sampled)
    last = np.full(len(reward), -1)
    last[data.kinds.sequence[where]] = where  # the last of equal indices stays
    rewards[last[last >= 0]] += reward[last >= 0]
    return rewards


def _returns(data: Scored, section: Algorithm, reward: Float64Array) -> Float64Array:
    """[T] discounted sum of the rewards from each sampled token on."""
    sampled, rewards = data.kinds.sampled, _token_rewards(data, section, reward)
    rewards[sampled] = _discounted(rewards[sampled], data.kinds.sequence[sampled], section.gamma)
    return rewards


def _gae(data: Scored, section: Algorithm) -> Float64Array:
    """[T] sum over later sampled tokens l of (gamma * lambda)^l * (r + gamma * V_next - V), with V_next of the next
    sampled token and 0 after the last: GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16)."""
    sampled, advantage = data.kinds.sampled, _token_rewards(data, section, shaped_rewards(data, section))
    sequence, value = data.kinds.sequence[sampled], data.tokens("values", "gae")[sampled]
    following = np.zeros(len(value))
    following[:-1] = np.where(sequence[1:] == sequence[:-1], value[1:], 0.0)
    error = advantage[sampled] + section.gamma * following - value
    advantage[sampled] = _discounted(error, sequence, section.gamma * section.gae_lambda)
    return advantage


def _discounted(rewards: Float64Array, sequence: npt.NDArray[np.int64], factor: float) -> Float64Array:
    """[n] sum over j of factor^j * rewards[i + j] within i's sequence.

    By doubling: after k rounds each sum reaches 2^k tokens far, so 100,000 tokens take 17 passes, not a loop.
    """
    total, reach = rewards.copy(), 1
    longest = int(np.bincount(sequence).max(initial=0))
    while reach < longest and factor:
        total[:-reach] += np.where(sequence[:-reach] == sequence[reach:], factor * total[reach:], 0.0)
        reach, factor = 2 * reach, factor * factor
    return total


def _whiten(data: Scored, value: Float64Array) -> Float64Array:
    """(value - mean) / sqrt(var + 1e-8) over the sampled tokens, with ddof = 1, as verl's masked_whiten."""
    sampled, result = value[data.kinds.sampled], np.zeros(len(value))
    if len(sampled) > 1:
        result[data.kinds.sampled] = (sampled - sampled.mean()) / np.sqrt(sampled.var(ddof=1) + 1e-8)
    return result
