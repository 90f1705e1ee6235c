"""One learner process: a training step, log-probs, weights in the checkpoint's names.

The gradient of a step is the gradient of the plain sum of its weighted token losses, for every cut of the batch into
micro-batches: the whole normalization is in the batch's loss weights.
"""

import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.megatron import core, model, resume
from engines.megatron.attention import PackedSequences, lay_out, rotary_table
from engines.megatron.changes import ChangeFinder
from engines.megatron.checkpoint import (
    CheckpointTensors,
    replacing,
    save_checkpoint,
    write_huggingface,
    write_tensors,
)
from engines.megatron.found import Changes
from engines.megatron.huggingface import to_huggingface
from engines.megatron.layout import layout
from engines.megatron.logprobs import token_statistics
from engines.megatron.model_shape import read_model_shape
from engines.megatron.optimizer import build_optimizer
from engines.megatron.packing import cut, token_indices
from engines.megatron.training_state import load_training_tensors, optimizer_name, training_tensors
from engines.weights.fingerprint import bits_of
from engines.weights.parts import Piece, dense_pieces
from stream_rl import config
from stream_rl.types import Float32Array, Int32Array, Int64Array, TrainingBatch, Version

log = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(log-probs, behaviour log-probs, advantages, loss weights), each float32 [t] over a micro-batch's tokens, and the
sequence of each, int64 from 0, to the SUM of the weighted token losses and its metrics.  A metric is a scalar: a sum
over tokens weighted by the loss weights (reported as their mean), or, if its name ends in "_max", a maximum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MicroBatch:
    """Whole sequences back to back; t tokens."""

    tokens: Tensor
    """[1, t] int64"""
    layout: PackedSequences
    first: Tensor
    """[t] bool: the token is the first of its sequence."""
    temperature: float
    fields: tuple[Tensor, Tensor, Tensor] | None
    """Behaviour log-probs, advantages, loss weights, each [t]; None when nothing is trained."""


class MegatronLearner:
    """Not thread-safe; one per process, since megatron-core keeps its process groups in globals."""

    def __init__(self, model_dir: str | pathlib.Path, section: config.Learner, seed: int) -> None:
        """Load the Hugging Face directory `model_dir`.

        Raises ConfigError for a model or options that cannot be used, WeightsError if the weights do not fit.
        """
        self.model_dir = pathlib.Path(model_dir)
        self.section = section
        self.shape = read_model_shape(self.model_dir)
        torch.set_num_threads(section.threads)
        model.initialize(seed)
        self.device = model.device()
        settings = model.transformer_config(self.shape, section.model)
        with CheckpointTensors(self.model_dir) as weights:
            self._model = model.wrap(model.build_model(self.shape, settings, weights))
        self._rotary = self._rotary_table(1024)
        self.reset_optimizer(section.optimizer, section.schedule)

    def reset_optimizer(
        self, optimizer: Mapping[str, Any], schedule: Mapping[str, Any], section: str = "learner"
    ) -> None:
        """A fresh optimizer and schedule over the current weights, as when warm-start steps end.

        section: where the options come from, for messages.  Raises ConfigError for options that cannot be used.
        """
        self._optimizer, self._scheduler = build_optimizer(self._model, optimizer, schedule, section)
        self._finder: ChangeFinder | None = None

    def watch_changes(self) -> None:
        """From the next step on `take_changes` knows what the steps of this optimizer changed.

        Raises ConfigError for an optimizer whose changes cannot be found.
        """
        state = core.parallel_state
        rank, size = state.get_data_parallel_rank(True), state.get_data_parallel_world_size(True)
        self._finder = ChangeFinder(self._gpt, self._optimizer, layout(self.shape), rank, size)

    def take_changes(self) -> Changes:
        """What the steps since the last time changed, by the checkpoint's names.  Cheap: sorting it is for later."""
        assert self._finder is not None, "watch_changes comes first"
        return self._finder.take()

    def train_step(self, batch: TrainingBatch, loss: LossFunction) -> dict[str, float]:
        """One optimizer step on the whole batch.

        Returns `loss` (the sum), `gradient_norm` (before clipping), `lr` (of this step), `tokens`, `trained_tokens`,
        `entropy` (nats; mean by loss weight), `skipped` (0.0), the loss function's metrics, `forward_backward_seconds`
        and `optimizer_seconds`.  When the loss or a gradient is not finite, or nothing in the batch has a weight, the
        parameters, optimizer and schedule stay as they are, and only `skipped` (1.0), the token counts and the
        seconds are returned.  Raises ValueError for a batch that is not well formed.
        """
        self._check(batch)
        started = time.perf_counter()
        report = {"tokens": float(len(batch.token_ids)), "trained_tokens": float(np.count_nonzero(batch.loss_weights))}
        totals: dict[str, float] = {}
        gradient_norm = math.nan
        if report["trained_tokens"]:
            totals = self._forward_backward(batch, loss)
            gradient_norm = self._gradient_norm()
        forwarded = time.perf_counter()
        taken = math.isfinite(totals.get("loss", math.nan)) and math.isfinite(gradient_norm)
        if taken:
            total_weight = float(batch.loss_weights.sum(dtype=np.float64))
            report |= {
                name: value if name == "loss" or name.endswith("_max") else value / total_weight
                for name, value in totals.items()
            }
            report |= {"gradient_norm": gradient_norm, "lr": float(self._optimizer.param_groups[0]["lr"])}
            self._optimizer.step()
            self._scheduler.step(increment=1)
        else:
            log.warning("step skipped: loss %s, gradient norm %s, %s", totals.get("loss"), gradient_norm, report)
        return report | {
            "skipped": float(not taken),
            "forward_backward_seconds": forwarded - started,
            "optimizer_seconds": time.perf_counter() - forwarded,
        }

    def logprobs(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]], temperature: float) -> list[Float32Array]:
        """Log-prob of each token of each sequence given those before it, at `temperature`; 0 for a first token."""
        if not token_ids:
            return []
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
        flat = np.concatenate(token_ids).astype(np.int32)
        self._check_tokens(flat, lengths, temperature)
        cuts = cut(lengths, self.section.micro_batch_tokens)
        micro_batches = (self._micro_batch(flat, lengths, sequences, temperature) for sequences in cuts)

        def statistics(micro_batch: _MicroBatch, logits: Tensor, non_loss_data: bool = True) -> Tensor:
            return _token_logprobs(micro_batch, logits)[0]

        with torch.no_grad():
            parts = self._run(micro_batches, len(cuts), statistics, forward_only=True)
        result: list[Float32Array] = [np.empty(0, np.float32)] * len(lengths)
        for sequences, part in zip(cuts, parts, strict=True):
            pieces = np.split(part.cpu().numpy(), np.cumsum(lengths[sequences])[:-1])
            for sequence, piece in zip(sequences.tolist(), pieces, strict=True):
                result[sequence] = piece
        return result

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in the checkpoint's names, order, layout and dtype, exact.

        Tensors may alias the live parameters: copy what must outlive the next step.
        """
        model.synchronize(self._model)
        parameters = {name: parameter.detach() for name, parameter in self._gpt.named_parameters()}
        return to_huggingface(self.shape, parameters)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def all_pieces(self) -> Iterator[Piece]:
        """The weights as an anchor has them, on the host; of a model there they alias the live parameters."""
        for name, tensor in self.named_weights():
            yield from dense_pieces(name, tensor.dtype, bits_of(tensor.reshape(-1).cpu()))

    def save(self, directory: str | pathlib.Path) -> None:
        """Write a Hugging Face directory, whole or not at all."""
        save_checkpoint(pathlib.Path(directory), self.named_weights(), self.model_dir)

    def save_checkpoint(self, directory: str | pathlib.Path, version: Version, run: str) -> None:
        """As `save`, with all that `load_checkpoint` needs to go on from here."""
        with replacing(pathlib.Path(directory)) as new:
            write_huggingface(new, self.named_weights(), self.model_dir)
            state = new / resume.STATE
            state.mkdir()
            write_tensors(state, resume.STATE, training_tensors(self._gpt, self._optimizer))
            optimizer = optimizer_name(self._optimizer)
            resume.seal(new, run, version, self.shape, optimizer, self._scheduler.num_steps)

    def load_checkpoint(self, directory: str | pathlib.Path) -> Version:
        """Be what the learner was that saved `directory`: its next step is the same to the bit, given the same options.

        Returns the version that it saved.  Raises WeightsError, before anything changes, if the checkpoint is damaged
        or of another model or optimizer.
        """
        directory = pathlib.Path(directory)
        record = resume.check(directory, self.shape, optimizer_name(self._optimizer))
        with CheckpointTensors(directory) as weights, CheckpointTensors(directory / resume.STATE) as state:
            load_training_tensors(self._gpt, self._optimizer, state)
            model.load_parameters(self._gpt, self.shape, weights)
        self._scheduler.num_steps = record.schedule_steps
        self._scheduler.step(increment=0)  # writes the groups' learning rate and weight decay
        return record.version

    @property
    def _gpt(self) -> Any:
        """The model itself, inside megatron-core's wrappers."""
        return self._model.module.module if self._model.config.bf16 else self._model.module

    def _forward_backward(self, batch: TrainingBatch, loss: LossFunction) -> dict[str, float]:
        """Gradients of the batch into the DDP's buffers.  Returns sums (and maxima) over the micro-batches."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        cuts = cut(batch.lengths, self.section.micro_batch_tokens)
        fields = (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
        micro_batches = (
            self._micro_batch(batch.token_ids, batch.lengths, sequences, batch.temperature, fields)
            for sequences in cuts
        )
        no_tokens = torch.zeros((), dtype=torch.int32, device=self.device)  # see model._sum_gradients

        def weighted(micro_batch: _MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            assert micro_batch.fields is not None
            logprobs, entropy = _token_logprobs(micro_batch, logits)
            value, metrics = loss(logprobs, *micro_batch.fields, micro_batch.first.cumsum(0) - 1)
            weights = micro_batch.fields[2]
            # A first token has no distribution; its weight is 0.
            sums = {"loss": value.detach(), "entropy": (weights * entropy).sum()}
            return value, no_tokens, sums | {name: metric.detach() for name, metric in metrics.items()}

        reports = self._run(micro_batches, len(cuts), weighted, forward_only=False)
        merged = {}
        for name in reports[0]:
            values = torch.stack([report[name].float() for report in reports])
            merged[name] = values.max() if name.endswith("_max") else values.sum()
        # One transfer for all of them.
        return dict(zip(merged, torch.stack(list(merged.values())).tolist(), strict=True))

    def _run(
        self, micro_batches: Iterator[_MicroBatch], count: int, consume: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """megatron-core's schedule over the micro-batches; `consume` gets each one with its logits."""
        # A float32 copy of all logits would be the largest tensor of a step; token_statistics needs none.
        keep_dtype = {"fp32_output": False} if self._model.config.bf16 else {}

        def forward(data: Iterator[_MicroBatch], gpt: Any) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(data)
            logits = gpt(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                packed_seq_params=micro_batch.layout,
                **keep_dtype,
            )
            return logits, lambda output, **keywords: consume(micro_batch, output[0], **keywords)

        schedule = core.get_forward_backward_func()
        result: list[Any] = schedule(
            forward_step_func=forward,
            data_iterator=micro_batches,
            model=[self._model],
            num_microbatches=count,
            seq_length=1,  # of pipeline messages only
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return result

    def _micro_batch(
        self,
        token_ids: Int32Array,
        lengths: Int32Array,
        sequences: Int64Array,
        temperature: float,
        fields: tuple[Float32Array, Float32Array, Float32Array] | None = None,
    ) -> _MicroBatch:
        indices = token_indices(lengths, sequences)
        chosen = lengths[sequences].astype(np.int64)
        if chosen[0] > len(self._rotary[0]):
            self._rotary = self._rotary_table(max(int(chosen[0]), 2 * len(self._rotary[0])))
        first = np.zeros(len(indices), dtype=np.bool_)
        first[np.cumsum(chosen) - chosen] = True
        return _MicroBatch(
            tokens=torch.from_numpy(token_ids[indices].astype(np.int64)).to(self.device)[None],
            layout=lay_out(chosen, self._rotary),
            first=torch.from_numpy(first).to(self.device),
            temperature=temperature,
            fields=None if fields is None else _on_device(fields, indices, self.device),
        )

    def _gradient_norm(self) -> float:
        """Of the whole gradient.  DDP keeps it in few flat buffers, so this is one pass over memory each."""
        norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in self._model.buffers]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _rotary_table(self, positions: int) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.shape.head_dim, self.shape.rope_theta, self.device)

    def _check(self, batch: TrainingBatch) -> None:
        self._check_tokens(batch.token_ids, batch.lengths, batch.temperature)
        for name in ("behavior_logprobs", "advantages", "loss_weights"):
            if (got := len(getattr(batch, name))) != len(batch.token_ids):
                raise ValueError(f"{name} must have one value for each of {len(batch.token_ids)} tokens, got {got}")
        firsts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        if not np.isfinite(batch.loss_weights).all() or np.any(batch.loss_weights[firsts] != 0.0):
            raise ValueError(
                "loss_weights must be finite, and 0 for the first token of a sequence: nothing predicts it"
            )

    def _check_tokens(self, token_ids: Int32Array, lengths: Int32Array, temperature: float) -> None:
        if not len(lengths) or lengths.min() < 1 or lengths.sum(dtype=np.int64) != len(token_ids):
            raise ValueError(f"lengths must be positive and sum to {len(token_ids)} tokens, got {lengths}")
        if lengths.max() > self.shape.max_positions:
            raise ValueError(f"the model has {self.shape.max_positions} positions, a sequence has {lengths.max()}")
        if token_ids.min() < 0 or token_ids.max() >= self.shape.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.shape.vocab_size}), got {token_ids.min()} to {token_ids.max()}"
            )
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}; greedy sampling cannot be trained on")


def _token_logprobs(micro_batch: _MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[t, vocabulary] -> each token's log-prob and the entropy of the distribution it came from, [t]; 0 for firsts."""
    # Position i predicts token i + 1; what the last position of a sequence predicts falls on a first token.
    targets = micro_batch.tokens[0].roll(-1)
    shifted = (value.roll(1) for value in token_statistics(logits, targets, micro_batch.temperature))
    logprobs, entropy = (value.masked_fill(micro_batch.first, 0.0) for value in shifted)
    return logprobs, entropy


def _on_device(
    fields: tuple[Float32Array, Float32Array, Float32Array], indices: Int64Array, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    behavior, advantages, weights = (torch.from_numpy(field[indices]).to(device) for field in fields)
    return behavior, advantages, weights
