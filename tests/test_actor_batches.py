"""What becomes of a lease: kinds, advantages, weights, a critic's batch; what breaks the contract is refused."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from learner_peers import make_lease

from actors.batches import Views, critic_batch, scored, token_kinds, training_batch
from algorithms.estimators import ESTIMATORS, advantages, value_targets
from stream_rl import config
from stream_rl import messages as m
from stream_rl.config import Algorithm
from stream_rl.errors import WireError
from stream_rl.types import Version

STEP = Version(0, 3)


def views_of(lease: m.Lease, seed: int = 0) -> Views:
    random, tokens = np.random.default_rng(seed), len(lease.token_ids)
    names = ("reference_logprobs", "teacher_logprobs", "values")
    return Views(**{name: -random.random(tokens).astype(np.float32) for name in names})


def single(**changes: Any) -> m.Lease:
    """One trajectory of one sampled token behind one prompt token."""
    one = np.zeros(2, np.int32)
    sampled = np.array([0, 1], np.uint8)
    fields: dict[str, Any] = {
        "groups": np.array([1]), "members": np.zeros(1, np.int32), "episodes": np.zeros(1, np.int32),
        "rewards": np.ones(1, np.float32),
        "max_token_ages": np.full(1, -1, np.int32), "lengths": np.array([2], np.int32), "token_ids": one,
        "sampled": sampled, "trainable": sampled, "logprobs": np.array([0, -1], np.float32), "histories": one,
        "steps": np.array([0, 3], np.int32), "ages": one,
    }  # fmt: skip
    return make_lease(STEP, **(fields | changes))


def needs(advantage: str) -> Algorithm:
    return Algorithm(advantage=advantage)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_trains_a_lease(name: str) -> None:
    lease = make_lease(STEP)
    batch = training_batch(lease, needs(name), 0.7, views_of(lease))
    assert np.isfinite(batch.advantages).all() and np.abs(batch.advantages[lease.sampled == 1]).max() > 0
    assert not batch.advantages[lease.sampled == 0].any()
    assert batch.loss_weights.sum() == pytest.approx(1.0)
    assert (batch.temperature, batch.reference_logprobs) == (0.7, None)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_single_sampled_token_has_a_finite_advantage(name: str) -> None:
    batch = training_batch(single(), needs(name), 1.0, views_of(single()))
    assert np.isfinite(batch.advantages).all()
    assert batch.loss_weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["grpo", "centered", "rloo", "reinforce_plus_plus_baseline"])
def test_equal_rewards_or_one_trajectory_train_nothing_by_groups(name: str) -> None:
    for lease in (make_lease(STEP, rewards=np.full(4, 0.3, np.float32)), single()):
        np.testing.assert_allclose(training_batch(lease, needs(name), 1.0).advantages, 0.0, atol=1e-6)


def test_the_reference_is_in_the_batch_only_where_the_loss_asks_it() -> None:
    lease = make_lease(STEP)
    views = views_of(lease)
    for where, wanted in (("loss", True), ("reward", False)):
        section = Algorithm(kl_coefficient=0.1, kl_in=where)  # type: ignore[arg-type]
        batch = training_batch(lease, section, 1.0, views)
        assert (batch.reference_logprobs is views.reference_logprobs) == wanted
        plain = training_batch(lease, Algorithm(), 1.0, views)
        assert plain.reference_logprobs is None
        assert np.array_equal(batch.advantages, plain.advantages) == wanted


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (needs("gae"), "gae needs values"),
        (needs("distillation"), "distillation needs teacher_logprobs"),
        (Algorithm(kl_coefficient=0.1, kl_in="reward"), "needs reference_logprobs"),
    ],
)
def test_a_model_that_was_not_asked_is_named(section: Algorithm, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training_batch(make_lease(STEP), section, 1.0)


def test_a_critic_learns_targets_from_its_own_values() -> None:
    lease, section = make_lease(STEP), needs("gae")
    views = views_of(lease)
    batch = training_batch(lease, section, 0.7, views)
    own = critic_batch(batch, lease, section, views)
    assert own.behavior_logprobs is views.values
    np.testing.assert_array_equal(own.advantages, value_targets(scored(lease, views), section))
    for name in ("token_ids", "lengths", "loss_weights"):
        assert getattr(own, name) is getattr(batch, name)
    with pytest.raises(ValueError, match="needs the values of a critic"):
        critic_batch(batch, lease, section, dataclasses.replace(views, values=None))


def test_what_the_engine_says_of_masked_tokens_is_not_looked_at() -> None:
    plain = make_lease(STEP)
    masked = plain.trainable.copy()
    masked[: len(masked) // 2] = 0
    clean = make_lease(STEP, trainable=masked)
    spoiled = make_lease(
        STEP, trainable=masked, logprobs=np.where(masked, plain.logprobs, -math.inf).astype(np.float32)
    )
    for name in ("grpo", "distillation"):
        got, wanted = (training_batch(one, needs(name), 1.0, views_of(plain)) for one in (spoiled, clean))
        np.testing.assert_array_equal(got.advantages, wanted.advantages)
        np.testing.assert_array_equal(got.loss_weights, wanted.loss_weights)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="rewards must be finite"):
        training_batch(make_lease(STEP, rewards=np.array([0, reward, 1, 0], np.float32)), Algorithm(), 1.0)


def test_a_nan_log_prob_of_a_trained_token_stays_to_be_seen() -> None:
    """The step is skipped for it: it must not become a number on the way."""
    lease = make_lease(STEP)
    logprobs = lease.logprobs.copy()
    token = int(np.flatnonzero(lease.trainable)[0])
    logprobs[token] = math.nan
    assert math.isnan(training_batch(make_lease(STEP, logprobs=logprobs), Algorithm(), 1.0).behavior_logprobs[token])


def test_a_trajectory_that_begins_with_no_prompt_is_refused() -> None:
    both, version = np.ones(2, np.uint8), np.full(2, 3, np.int32)
    for lease in (
        single(sampled=both, trainable=both, steps=version),
        single(sampled=both, trainable=np.array([0, 1], np.uint8), steps=version),
        single(lengths=np.array([2, 0], np.int32), max_token_ages=np.full(2, -1, np.int32)),
    ):
        with pytest.raises(WireError, match="lease_sequences"):
            token_kinds(lease)


def test_a_prompt_alone_is_context() -> None:
    nothing = np.zeros(1, np.uint8)
    none = np.zeros(1, np.int32)
    lease = single(
        lengths=np.ones(1, np.int32), token_ids=none, sampled=nothing, trainable=nothing, histories=none, steps=none,
        ages=none, logprobs=np.zeros(1, np.float32),
    )  # fmt: skip
    for name in sorted(ESTIMATORS):
        batch = training_batch(lease, needs(name), 1.0, views_of(lease))
        assert (batch.advantages.tolist(), batch.loss_weights.tolist()) == ([0.0], [0.0])


def test_spanning_versions_and_masked_members_count_in_the_baseline() -> None:
    """A wholly masked member of a group, and a trajectory of three versions: advantages as if nothing were masked."""
    lease = make_lease(Version(1, 5))
    chance = np.random.default_rng(0)
    ages = np.where(lease.sampled, chance.integers(0, 3, len(lease.token_ids)), 0).astype(np.int32)
    of_second = np.repeat(np.arange(4), lease.lengths) == 1
    fields = {
        "ages": ages,
        "steps": np.where(lease.sampled, 5 - ages, 0).astype(np.int32),
        "trainable": np.where(of_second | (ages > 1), 0, lease.sampled).astype(np.uint8),
    }
    spanning = make_lease(Version(1, 5), **fields)
    for section in (Algorithm(), Algorithm(aggregation="sequence_mean"), config.Algorithm(advantage="rloo")):
        got, plain = training_batch(spanning, section, 1.0), training_batch(lease, section, 1.0)
        np.testing.assert_array_equal(got.advantages, plain.advantages)
        assert np.array_equal(got.loss_weights != 0, spanning.trainable == 1)
    assert not advantages(scored(spanning), Algorithm())[lease.sampled == 0].any()


def test_branches_of_an_episode_share_its_advantage_and_its_weight() -> None:
    """Of each group on its own: both have an episode 0."""
    episodes, rewards = np.array([0, 0, 0, 3], np.int32), np.array([1.0, 1.0, 0.5, 0.0], np.float32)
    lease = make_lease(STEP, episodes=episodes, rewards=rewards)
    data = scored(lease)
    assert data.kinds.episode.tolist() == [0, 0, 1, 2]
    sequence = data.kinds.sequence
    batch = training_batch(lease, Algorithm(advantage="rloo", aggregation="sequence_mean"), 1.0)
    weights = np.bincount(data.kinds.episode[sequence], batch.loss_weights)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-5)
    expected = np.array([0.0, 0.0, 0.5, -0.5])[sequence] * lease.sampled
    np.testing.assert_allclose(batch.advantages, expected)
