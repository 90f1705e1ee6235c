"""A model of a Hugging Face directory in megatron-core: its forward and backward passes over micro-batches.

It has no optimizer.  The learner trains one; a reference policy is one, and a critic is one with a value head.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.megatron import core, model, world
from engines.megatron.checkpoint import CheckpointTensors
from engines.megatron.gathering import gathered
from engines.megatron.holdings import holdings
from engines.megatron.huggingface import to_huggingface
from engines.megatron.logprobs import Columns, token_statistics
from engines.megatron.micro_batch import MicroBatch, Packer, of_tokens
from engines.megatron.model_shape import read_model_shape
from engines.megatron.plan import MicroBatches, costs_of, plan
from stream_rl.types import Float32Array, Int32Array

Head = Literal["tokens", "value"]
"""What comes out for each token: the distribution of the next token, or one number."""
StepLoss = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Any]]
"""(micro-batch, and as `Network.scores` gives them) to the scalar to differentiate, and something to keep."""


class Network:
    """Not thread-safe.  All in one process have its place in the process groups."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        options: Mapping[str, Any],
        micro_batch_tokens: int,
        head: Head = "tokens",
        max_sequence_tokens: int = 0,
    ) -> None:
        """Load the Hugging Face directory; `world.initialize` comes first.

        options: megatron-core's TransformerConfig, as in the recipe's `[learner.model]`.  micro_batch_tokens: packed
        tokens of one forward pass.  max_sequence_tokens: 0: as many as the model has positions.
        Raises ConfigError for a model or options that cannot be used, WeightsError if the weights do not fit.
        """
        self.directory = pathlib.Path(directory)
        self.shape = read_model_shape(self.directory)
        if head == "value":
            self.shape = dataclasses.replace(self.shape, tied=False, value_head=True)
        self.head: Head = head
        self.world = world.here()
        self.world.enter()
        self.device = self.world.device
        self._micro_batch_tokens, self._max_sequence_tokens = micro_batch_tokens, max_sequence_tokens
        settings = model.transformer_config(self.shape, options)
        self.holdings = holdings(self.shape, world.place(self.shape, self.world))
        """Where this process's parameters lie in the checkpoint."""
        with CheckpointTensors(self.directory) as weights:
            self.module = model.build_model(self.shape, settings, weights)
        """As the schedule runs it: in megatron-core's wrappers."""
        multiple = self.world.tensor_size if settings.sequence_parallel else 1
        self._packer = Packer(self.shape, self.device, multiple)
        self._columns = self._own_columns()

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig."""
        return self.module.config

    @property
    def gpt(self) -> Any:
        """The model itself, inside megatron-core's wrappers."""
        module = self.module
        while not isinstance(module, core.GPTModel):
            module = module.module
        return module

    def wrap(self, options: Mapping[str, Any]) -> None:
        """Make it trainable: megatron-core's DDP, with the recipe's `[learner.ddp]`."""
        self.module = model.wrap(self.module, options)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in the checkpoint's names, order, layout and dtype, exact: on the first process, from all.

        All of them call this, and exhaust it; the others get nothing.  Of one process they may alias the live
        parameters: copy what must outlive the next step.
        """
        model.synchronize(self.module)
        parameters = {name: parameter.detach() for name, parameter in self.gpt.named_parameters()}
        if self.world.peers.size == 1:
            return to_huggingface(self.shape, parameters)
        return gathered(self.shape, parameters, self.world)

    def scores(self, micro_batch: MicroBatch, output: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Of the model's output [p, vocabulary or 1], for each token, given those before it in its sequence:

        its log-prob at `temperature` and the entropy of the distribution that it came from, or the value and 0.
        [t] float32 each; 0 for the first token of a sequence.  Only the first of the two carries a gradient.
        """
        if self.head == "value":
            values = of_tokens(output[:, 0].float(), micro_batch)
            return values, torch.zeros_like(values)
        # Position i predicts token i + 1.
        statistics = token_statistics(output, micro_batch.tokens[0].roll(-1), temperature, self._columns)
        logprobs, entropy = (of_tokens(value, micro_batch) for value in statistics)
        return logprobs, entropy

    def logprobs(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]], temperature: float) -> list[Float32Array]:
        """Log-prob of each token of each sequence given those before it, at `temperature`; 0 for a first token."""
        return self._forward(token_ids, temperature)

    def values(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]]) -> list[Float32Array]:
        """With a value head: what it says of the state before each token of each sequence; 0 for a first token."""
        return self._forward(token_ids, 1.0)

    def _forward(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]], temperature: float) -> list[Float32Array]:
        """The first of `scores`, for each sequence."""
        if not token_ids:
            return []
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
        flat = np.concatenate(token_ids).astype(np.int32)
        self.check_tokens(flat, lengths, temperature)
        shares = self._plan(lengths)
        with torch.no_grad():
            parts = self._run(
                (self._packer.pack(flat, lengths, sequences) for sequences in shares[self.world.data_rank]),
                len(shares[0]),
                lambda micro_batch, output, non_loss_data: (
                    None if micro_batch.filler else self.scores(micro_batch, output, temperature)[0]
                ),
                forward_only=True,
            )
        own = b""
        if self.world.speaks:
            own = b"".join(part.cpu().numpy().tobytes() for part in parts if part is not None)
        said = [word for word in self.world.peers.exchange(own) if word]
        result: list[Float32Array] = [np.empty(0, np.float32)] * len(lengths)
        # a rank with fillers alone says nothing
        for share, word in zip((share for share in shares if len(share[0])), said, strict=True):
            order = np.concatenate(share)
            pieces = np.split(np.frombuffer(word, np.float32), np.cumsum(lengths[order])[:-1])
            for sequence, piece in zip(order.tolist(), pieces, strict=True):
                result[sequence] = piece.copy()
        return result

    def forward_backward(
        self,
        token_ids: Int32Array,
        lengths: Int32Array,
        fields: Sequence[Float32Array],
        temperature: float,
        loss: StepLoss,
    ) -> list[Any]:
        """Gradients of the sum of `loss` over all micro-batches, summed over all ranks, into the DDP's buffers.

        Returns what `loss` keeps of each of this rank's micro-batches; nothing on a pipeline stage but the last.
        token_ids: [T] of sequences of `lengths` [S]; fields: [T] each, handed on in the micro-batches.
        """
        self.module.zero_grad_buffer()
        own = self._plan(lengths)[self.world.data_rank]
        no_tokens = torch.zeros((), dtype=torch.int32, device=self.device)  # see model._sum_gradients

        def differentiated(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
            value, kept = loss(micro_batch, *self.scores(micro_batch, output, temperature))
            return value, no_tokens, kept

        micro_batches = (self._packer.pack(token_ids, lengths, sequences, fields) for sequences in own)
        return self._run(micro_batches, len(own), differentiated, forward_only=False)

    def check_tokens(self, token_ids: Int32Array, lengths: Int32Array, temperature: float) -> None:
        """Raises ValueError for sequences that the model does not take."""
        if not len(lengths) or lengths.min() < 1 or lengths.sum(dtype=np.int64) != len(token_ids):
            raise ValueError(f"lengths must be positive and sum to {len(token_ids)} tokens, got {lengths}")
        if lengths.max() > self.shape.max_positions:
            raise ValueError(f"the model has {self.shape.max_positions} positions, a sequence has {lengths.max()}")
        if self._max_sequence_tokens and lengths.max() > self._max_sequence_tokens:
            raise ValueError(
                f"a sequence has {lengths.max()} tokens and learner.max_sequence_tokens is "
                f"{self._max_sequence_tokens}; raise it, or keep rollouts shorter (rollout.max_new_tokens)"
            )
        if token_ids.min() < 0 or token_ids.max() >= self.shape.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.shape.vocab_size}), got {token_ids.min()} to {token_ids.max()}"
            )
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}; greedy sampling cannot be trained on")

    def _plan(self, lengths: Int32Array) -> list[MicroBatches]:
        """The micro-batches of each data-parallel rank."""
        costs = costs_of(self.shape, lengths)
        ranks, pipelined = self.world.data_size, self.world.stages > 1
        return plan(lengths, costs, self._micro_batch_tokens, ranks, pipelined=pipelined)

    def _own_columns(self) -> Columns | None:
        rows = world.padded_vocabulary(self.shape, self.world.tensor_size) // self.world.tensor_size
        first = rows * self.world.tensor_rank
        if self.world.tensor_size == 1:
            return None
        group = core.parallel_state.get_tensor_model_parallel_group()
        return Columns(group, first, max(min(rows, self.shape.vocab_size - first), 0))

    def _run(
        self, micro_batches: Iterator[MicroBatch], count: int, consume: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """megatron-core's schedule over the micro-batches; on the last stage `consume` gets each one with its output
        [p, vocabulary]."""
        # A float32 copy of all logits would be the largest tensor of a step; token_statistics needs none.
        keep_dtype = {"fp32_output": False} if self.config.bf16 else {}

        def forward(data: Iterator[MicroBatch], module: Any) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(data)
            output = module(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                packed_seq_params=micro_batch.layout,
                **keep_dtype,
            )
            return output, lambda output, **keywords: consume(micro_batch, output[0], **keywords)

        schedule = core.get_forward_backward_func()
        result: list[Any] = schedule(
            forward_step_func=forward,
            data_iterator=micro_batches,
            model=[self.module],
            num_microbatches=count,
            seq_length=1,  # of pipeline messages only
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return result
