"""A sampler over the learner's own forward pass, with weights that the learner had some steps ago: for experiments.

It keeps no KV cache: each new token runs the model over all of its sequence, so answers are short.  One process.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.megatron.learner import MegatronLearner
from engines.megatron.micro_batch import MicroBatch
from engines.megatron.network import Network
from stream_rl.types import Float32Array, Int32Array


class LaggedSampler:
    """Not thread-safe."""

    def __init__(self, learner: MegatronLearner, ages: int, seed: int) -> None:
        """ages: the greatest age that can be sampled with."""
        section = learner.section
        self._learner = learner
        self._network = Network(learner.model_dir, section.model, section.micro_batch_tokens)
        self._chance = torch.Generator(self._network.device).manual_seed(seed)
        self._kept: collections.deque[list[Tensor]] = collections.deque(maxlen=ages + 1)
        self.remember()

    def remember(self) -> None:
        """Keep the learner's weights of now: what was kept before is one step older."""
        self._kept.append([each.detach().clone() for each in self._learner.network.gpt.parameters()])

    def sample(
        self, prompts: Sequence[Int32Array], new_tokens: int, temperature: float, age: int
    ) -> tuple[list[Int32Array], list[Float32Array]]:
        """So many tokens behind each prompt, with the weights of `age` steps ago, or the oldest kept.

        Returns each prompt with its tokens, and their log-probs [new_tokens] at `temperature`.
        """
        weights = self._kept[max(len(self._kept) - 1 - age, 0)]
        with torch.no_grad():
            for parameter, kept in zip(self._network.gpt.parameters(), weights, strict=True):
                parameter.copy_(kept)
        sequences = [prompt.astype(np.int32) for prompt in prompts]
        columns = []
        for _ in range(new_tokens):
            distributions = self._next(sequences, temperature)
            drawn = torch.multinomial(distributions.exp(), 1, generator=self._chance)
            columns.append(distributions.gather(1, drawn)[:, 0].cpu().numpy())
            tokens = drawn.cpu().numpy().astype(np.int32)
            sequences = [np.concatenate(pair) for pair in zip(sequences, tokens, strict=True)]
        return sequences, list(np.stack(columns, axis=1).astype(np.float32))

    def _next(self, sequences: Sequence[Int32Array], temperature: float) -> Tensor:
        """[S, vocabulary] log-probs of what comes behind each sequence."""
        network, lengths = self._network, np.array([len(ids) for ids in sequences], np.int32)
        flat = np.concatenate(sequences)
        network.check_tokens(flat, lengths, temperature)
        [share] = network._plan(lengths)

        def last(micro_batch: MicroBatch, output: Tensor, **_: Any) -> Tensor:
            ends = micro_batch.first.roll(-1)  # the first of all follows the last of all
            return (output[: len(ends)][ends].float() / temperature).log_softmax(-1)

        with torch.no_grad():
            parts = network._run(
                (network._packer.pack(flat, lengths, own) for own in share), len(share), last, forward_only=True
            )
        order = torch.from_numpy(np.argsort(np.concatenate(share))).to(network.device)
        return torch.cat(parts)[order]
