"""A lease as what the learner trains on: advantages and loss weights for each token."""

import numpy as np

from algorithms.denominators import TokenKinds, loss_weights
from algorithms.estimators import advantages
from algorithms.scores import Scored
from stream_rl import config
from stream_rl.errors import WireError
from stream_rl.messages import Lease
from stream_rl.types import TrainingBatch


def training_batch(lease: Lease, algorithm: config.Algorithm, temperature: float) -> TrainingBatch:
    """A lease with its advantages and loss weights.

    Raises WireError if the queue broke its contract: an age beyond the bound on a trainable token, an age that its
    version does not give, a version of a history to come, a trainable token that was not sampled.
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
    kinds = TokenKinds(lengths=lease.lengths, sampled=sampled, trainable=trainable)
    behavior = np.where(sampled, lease.logprobs, np.float32(0))
    scored = Scored(kinds=kinds, rewards=lease.rewards, groups=lease.groups, behavior_logprobs=behavior)
    return TrainingBatch(
        token_ids=lease.token_ids,
        lengths=lease.lengths,
        behavior_logprobs=behavior,
        advantages=advantages(scored, algorithm),
        loss_weights=loss_weights(algorithm.aggregation, kinds, algorithm.constant),
        temperature=temperature,
    )
