"""The critic of PPO: a model with one value a token, trained as the policy is, in the same processes."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.megatron.learner import MegatronLearner
from stream_rl import config
from stream_rl.types import Float32Array


class Critic(MegatronLearner):
    """The policy's learner comes first, and takes it along in its checkpoints (`critic=`).

    Its steps are those of `MegatronLearner.train_step` on `actors.batches.critic_batch`, with a value loss.
    """

    def __init__(self, policy: str | pathlib.Path, learner: config.Learner, section: config.Critic, seed: int) -> None:
        """Load `section.path`, or the policy's own directory; the value head of one that has none begins at 0.

        learner: the policy's section, whose model and optimizer options hold where the critic's own say nothing.
        Raises ConfigError for a model or options that cannot be used, WeightsError if the weights do not fit.
        """
        own = dataclasses.replace(
            learner,
            model=learner.model | section.model,
            optimizer=learner.optimizer | section.optimizer,
            schedule=section.schedule,
        )
        super().__init__(section.path or policy, own, seed, head="value")

    @property
    def bytes(self) -> int:
        """Of its weights in this process, without gradients and optimizer."""
        return sum(parameter.nbytes for parameter in self.network.gpt.parameters())

    def values(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]]) -> list[Float32Array]:
        """The value of what is before each token of each sequence; 0 for a first token."""
        return self.network.values(token_ids)
