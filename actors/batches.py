"""A lease as what the learner trains on: advantages and loss weights for each token."""

import dataclasses

import numpy as np

from algorithms.denominators import TokenKinds, loss_weights
from algorithms.estimators import advantages, value_targets
from algorithms.scores import Scored
from stream_rl import config
from stream_rl.errors import WireError
from stream_rl.messages import Lease
from stream_rl.types import Float32Array, TrainingBatch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What models beside the policy say of a lease's tokens, each [T]; None of those that the recipe does not need."""

    reference_logprobs: Float32Array | None = None
    teacher_logprobs: Float32Array | None = None
    values: Float32Array | None = None
    """The critic's, of the state before the token."""


NO_VIEWS = Views()


def token_kinds(lease: Lease) -> TokenKinds:
    """Which tokens were sampled and which train.

    Raises WireError if the queue broke its contract: an age beyond the bound on a trainable token, an age that its
    version does not give, a version of a history to come, a trainable token that was not sampled, a sampled token with
    nothing before it.
    """
    sampled, trainable = lease.sampled.astype(bool), lease.trainable.astype(bool)
    # a token of this history has exactly this age; one of a dead history counts from the fork and can only be older
    by_version = lease.step.step - lease.steps
    age_is_right = np.where(lease.histories == lease.step.history, lease.ages == by_version, lease.ages >= by_version)
    wrong = sampled & (~age_is_right | (lease.histories > lease.step.history))
    if wrong.any() or (lease.ages < 0).any() or (trainable & ~sampled).any():
        raise WireError(
            "lease_ages", f"lease of step {lease.step} has tokens whose age does not follow from its version"
        )
    of_sequence = np.repeat(np.arange(len(lease.lengths)), lease.lengths)
    bounds = lease.max_token_ages[of_sequence]
    if (too_old := trainable & (bounds >= 0) & (lease.ages > bounds)).any():
        age, bound = int(lease.ages[too_old][0]), int(bounds[too_old][0])
        raise WireError("lease_too_old", f"lease of step {lease.step} trains a token of age {age} > {bound}")
    firsts = np.cumsum(lease.lengths, dtype=np.int64) - lease.lengths
    if len(lease.lengths) and (lease.lengths.min() < 1 or sampled[firsts].any()):
        raise WireError(
            "lease_sequences",
            f"lease of step {lease.step} has a trajectory that begins with no prompt",
        )
    episodes = lease.groups << 32 | lease.episodes
    return TokenKinds(lengths=lease.lengths, sampled=sampled, trainable=trainable, episodes=episodes)


def scored(lease: Lease, views: Views = NO_VIEWS) -> Scored:
    """All that advantages are made from.  Raises as `token_kinds`, and ValueError for rewards that are not finite."""
    kinds = token_kinds(lease)
    return Scored(
        kinds=kinds,
        rewards=lease.rewards,
        groups=lease.groups,
        behavior_logprobs=np.where(kinds.sampled, lease.logprobs, np.float32(0)),
        reference_logprobs=views.reference_logprobs,
        teacher_logprobs=views.teacher_logprobs,
        values=views.values,
    )


def training_batch(
    lease: Lease, algorithm: config.Algorithm, temperature: float, views: Views = NO_VIEWS
) -> TrainingBatch:
    """A lease with its advantages and loss weights.

    Raises as `scored`, and ValueError if a view is missing that the recipe needs.
    """
    data = scored(lease, views)
    assert data.behavior_logprobs is not None
    in_loss = algorithm.kl_coefficient > 0.0 and algorithm.kl_in == "loss"
    return TrainingBatch(
        token_ids=lease.token_ids,
        lengths=lease.lengths,
        behavior_logprobs=data.behavior_logprobs,
        advantages=advantages(data, algorithm),
        loss_weights=loss_weights(algorithm.aggregation, data.kinds, algorithm.constant),
        temperature=temperature,
        reference_logprobs=views.reference_logprobs if in_loss else None,
    )


def critic_batch(batch: TrainingBatch, lease: Lease, algorithm: config.Algorithm, views: Views) -> TrainingBatch:
    """The same tokens and weights for a critic: its values before the step are the behaviour, targets the advantages.

    batch: what the policy trains on.  Raises as `training_batch`.
    """
    if views.values is None:
        raise ValueError('advantage = "gae" needs the values of a critic, got None')
    return dataclasses.replace(
        batch,
        behavior_logprobs=views.values,
        advantages=value_targets(scored(lease, views), algorithm),
        reference_logprobs=None,
    )
