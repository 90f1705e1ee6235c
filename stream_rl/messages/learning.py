"""The learner with the queue: leases, and what becomes of them."""

from stream_rl.types import ByteArray, Float32Array, Int32Array, Int64Array, Version
from stream_rl.wire import message


@message
class LeaseRequest:
    """The learner wants the batch of the step that turns version `step` into the next."""

    step: Version


@message
class Lease:
    """Whole groups for one named optimizer step, as columns over trajectories (S) and tokens (T)."""

    step: Version
    groups: Int64Array
    """[S] group of each trajectory; members of a group are adjacent."""
    members: Int32Array
    """[S]"""
    episodes: Int32Array
    """[S] the member that a trajectory's episode began as.  Trajectories of a group with the same one are branches of
    that episode: they have one reward, and count as one in the group's normalisation."""
    rewards: Float32Array
    """[S]"""
    max_token_ages: Int32Array
    """[S] the bound on the age of each trajectory's trainable tokens, by its task; -1: none."""
    lengths: Int32Array
    """[S] tokens of each trajectory; they sum to T."""
    token_ids: Int32Array
    """[T]"""
    sampled: ByteArray
    """[T] 1 where the policy sampled the token, 0 for the prompt and the environment's tokens."""
    trainable: ByteArray
    """[T] 1 where it was sampled and is not older than the bound."""
    logprobs: Float32Array
    """[T] behaviour log-prob; 0 where not sampled."""
    histories: Int32Array
    """[T] history of the version that sampled the token; 0 where not sampled."""
    steps: Int32Array
    """[T] step of the version that sampled the token; 0 where not sampled."""
    ages: Int32Array
    """[T] `step` minus the token's version, at the fork for a token of a dead history; 0 where not sampled."""


@message
class Applied:
    """The optimizer step named `step` was taken (or skipped): version `step.step + 1` exists from here on."""

    step: Version
    outcome: str
    """trained or skipped."""
    metrics: dict[str, float]


@message
class Committed:
    """A durable checkpoint holds every step below `step`."""

    step: Version


@message
class LearnerDone:
    """The last step is taken, its checkpoint written, its weights handed to the publisher."""

    final: Version
    weights_hash: str
    """Of the learner's own weights: see engines.weights.fingerprint."""
