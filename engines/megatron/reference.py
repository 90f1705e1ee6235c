"""A frozen policy: the reference that a KL is taken to, or a teacher.  Weights alone: no gradients, no optimizer."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.megatron.network import Network
from stream_rl import config
from stream_rl.types import Float32Array


class FrozenPolicy:
    """Not thread-safe.  The learner of the process comes first: a frozen policy has its place in the process groups."""

    def __init__(self, directory: str | pathlib.Path, section: config.Learner) -> None:
        """Load the Hugging Face directory; it may be of another size and family than what is trained.

        section: the learner's, whose parallel sizes and micro-batches hold here too.
        Raises ConfigError for a model that cannot be used, WeightsError if the weights do not fit.
        """
        self._network = Network(
            directory, section.model, section.micro_batch_tokens, max_sequence_tokens=section.max_sequence_tokens
        )
        self._network.gpt.requires_grad_(False)

    @property
    def bytes(self) -> int:
        """Of its weights in this process."""
        return sum(parameter.nbytes for parameter in self._network.gpt.parameters())

    def logprobs(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]], temperature: float) -> list[Float32Array]:
        """Log-prob of each token of each sequence given those before it, at `temperature`; 0 for a first token."""
        return self._network.logprobs(token_ids, temperature)
