"""One process of the learner: a training step, log-probs, weights in the checkpoint's names.

The gradient of a step is the gradient of the plain sum of its weighted token losses, for every cut of the batch into
micro-batches: the whole normalization is in the batch's loss weights.
"""

import collections
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.megatron import model, world
from engines.megatron.changes import ChangeFinder
from engines.megatron.checkpoint import save_checkpoint
from engines.megatron.collecting import ChangeCollector
from engines.megatron.found import Changes
from engines.megatron.micro_batch import MicroBatch
from engines.megatron.network import Head, Network
from engines.megatron.optimizer import build_optimizer
from engines.megatron.reports import Report, agreed, reduced, squared_gradient_norm, without_weight
from engines.megatron.resume import POLICY
from engines.megatron.saving import Checkpoints, Saving
from engines.megatron.snapshot import Trained
from engines.weights.fingerprint import bits_of
from engines.weights.parts import Piece, dense_pieces
from stream_rl import config
from stream_rl.types import Float32Array, TrainingBatch, Version

log = logging.getLogger(__name__)

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(log-probs, behaviour log-probs, advantages, loss weights), each float32 [t] over a micro-batch's tokens, the
sequence of each, int64 from 0, and the reference policy's log-probs [t] or None, to the SUM of the weighted token
losses and its metrics.  A metric is a scalar: a sum over tokens weighted by the loss weights (reported as their mean),
or, if its name ends in "_max", a maximum."""


class MegatronLearner:
    """Not thread-safe.  Where there are several processes, what is called on one is called on all, in the same order
    and with the same arguments (see ranks.py)."""

    def __init__(
        self, model_dir: str | pathlib.Path, section: config.Learner, seed: int, head: Head = "tokens"
    ) -> None:
        """Load the Hugging Face directory `model_dir`.

        Raises ConfigError for a model or options that cannot be used, WeightsError if the weights do not fit.
        """
        self.model_dir = pathlib.Path(model_dir)
        self.section = section
        torch.set_num_threads(section.threads)
        self.world = world.initialize(seed, section.model, section.processes, section.process_timeout_s)
        self.network = Network(
            self.model_dir, section.model, section.micro_batch_tokens, head, section.max_sequence_tokens
        )
        self.network.wrap(section.ddp)
        self.shape, self.device = self.network.shape, self.network.device
        self._collector: ChangeCollector | None = None
        self._checkpoints = Checkpoints(section.process_timeout_s)
        self.reset_optimizer(section.optimizer, section.schedule)

    def reset_optimizer(
        self, optimizer: Mapping[str, Any], schedule: Mapping[str, Any], section: str = "learner"
    ) -> None:
        """A fresh optimizer and schedule over the current weights, as when warm-start steps end.

        section: where the options come from, for messages.  Raises ConfigError for options that cannot be used.
        """
        self._optimizer, self._scheduler = build_optimizer(self.network.module, optimizer, schedule, section)
        self._finder: ChangeFinder | None = None

    def watch_changes(self) -> None:
        """From the next step on `take_changes` knows what the steps of this optimizer changed.

        Raises ConfigError for an optimizer whose changes cannot be found.
        """
        boxes, here = self.network.holdings.exported, self.world
        self._finder = ChangeFinder(self._gpt, self._optimizer, boxes, here.data_rank, here.data_size)
        if here.peers.size > 1 and self._collector is None:
            self._collector = ChangeCollector(here.peers.rank, here.peers.size, self.section.process_timeout_s)

    def take_changes(self) -> Changes:
        """What the steps since the last time changed, by the checkpoint's names; of all processes, on the first.

        Cheap: sorting and collecting it is for later, beside the next step.
        """
        assert self._finder is not None, "watch_changes comes first"
        own = self._finder.take()
        return own if self._collector is None else self._collector.put(own)

    def train_step(self, batch: TrainingBatch, loss: LossFunction) -> dict[str, float]:
        """One optimizer step on the whole batch; every process is given the same.

        Returns, on all of them the same, `loss` (the sum), `gradient_norm` (before clipping), `lr` (of this step),
        `tokens`, `trained_tokens`, `entropy` (nats; mean by loss weight), `skipped` (0.0), the loss function's metrics,
        and of this process `forward_backward_seconds` and `optimizer_seconds`.  When the loss or a gradient is not
        finite on any process, or nothing in the batch has a weight, the parameters, optimizer and schedule of all stay
        as they are, and only `skipped` (1.0), the token counts and the seconds are returned.  Raises ValueError for a
        batch that is not well formed.
        """
        self._check(batch)
        started = time.perf_counter()
        report = {"tokens": float(len(batch.token_ids)), "trained_tokens": float(np.count_nonzero(batch.loss_weights))}
        totals: dict[str, float] = {}
        gradient_norm = math.nan
        if report["trained_tokens"]:
            totals, gradient_norm = self._forward_backward(batch, loss)
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
            by_tokens = self.section.schedule_unit == "tokens"
            self._scheduler.step(increment=int(report["trained_tokens"]) if by_tokens else 1)
        else:
            log.warning("step skipped: loss %s, gradient norm %s, %s", totals.get("loss"), gradient_norm, report)
        return report | {
            "skipped": float(not taken),
            "forward_backward_seconds": forwarded - started,
            "optimizer_seconds": time.perf_counter() - forwarded,
        }

    def logprobs(self, token_ids: Sequence[npt.NDArray[np.integer[Any]]], temperature: float) -> list[Float32Array]:
        """Log-prob of each token of each sequence given those before it, at `temperature`; 0 for a first token."""
        return self.network.logprobs(token_ids, temperature)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in the checkpoint's names, order, layout and dtype, exact: see `Network.named_weights`."""
        return self.network.named_weights()

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
        if self.world.peers.rank == 0:
            save_checkpoint(pathlib.Path(directory), self.named_weights(), self.model_dir)
        else:
            collections.deque(self.named_weights(), maxlen=0)

    def begin_checkpoint(
        self, directory: str | pathlib.Path, version: Version, run: str, **beside: "MegatronLearner"
    ) -> Saving:
        """A snapshot of all that `load_checkpoint` needs to go on from here; `finish` of what it returns writes it, in
        any thread, while training goes on.

        beside: other learners of this process that belong in it (critic=...).  One at a time: the one before it must be
        finished.
        """
        return self._checkpoints.begin(pathlib.Path(directory), version, run, self._networks(beside))

    def save_checkpoint(
        self, directory: str | pathlib.Path, version: Version, run: str, **beside: "MegatronLearner"
    ) -> None:
        """`begin_checkpoint` and its `finish`: `save` with all that `load_checkpoint` needs."""
        self.begin_checkpoint(directory, version, run, **beside).finish()

    def load_checkpoint(self, directory: str | pathlib.Path, **beside: "MegatronLearner") -> Version:
        """Be what the learner was that saved `directory`: its next step is the same to the bit, given the same options
        and placement, and to rounding in another placement.

        Returns the version that it saved.  Raises WeightsError, before anything changes, if the checkpoint is damaged
        or of another model or optimizer.
        """
        return self._checkpoints.load(pathlib.Path(directory), self._networks(beside))

    def _networks(self, beside: "Mapping[str, MegatronLearner]") -> dict[str, Trained]:
        return {name: learner._trained() for name, learner in {POLICY: self, **beside}.items()}

    def _trained(self) -> Trained:
        model.synchronize(self.network.module)
        return Trained(
            model=self._gpt,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            shape=self.shape,
            holdings=self.network.holdings,
            schedule_unit=self.section.schedule_unit,
            source=self.model_dir,
        )

    @property
    def _gpt(self) -> Any:
        return self.network.gpt

    def _forward_backward(self, batch: TrainingBatch, loss: LossFunction) -> tuple[dict[str, float], float]:
        """Gradients of the batch into the DDP's buffers.  Returns sums (and maxima) over the micro-batches of all
        ranks, and the norm of the whole gradient."""
        self._optimizer.zero_grad()
        fields = [batch.behavior_logprobs, batch.advantages, batch.loss_weights]
        if batch.reference_logprobs is not None:
            fields.append(batch.reference_logprobs)

        def weighted(micro_batch: MicroBatch, scores: Tensor, entropy: Tensor) -> tuple[Tensor, Report]:
            behavior, advantages, weights, *reference = micro_batch.fields
            value, metrics = loss(scores, behavior, advantages, weights, micro_batch.sequences, *reference)
            # A first token has no distribution; its weight is 0.
            sums = {"loss": value.detach(), "entropy": (weights * entropy).sum()}
            sums |= {name: metric.detach() for name, metric in metrics.items()}
            return (0.0 * scores.sum(), without_weight(sums)) if micro_batch.filler else (value, sums)

        reports = self.network.forward_backward(batch.token_ids, batch.lengths, fields, batch.temperature, weighted)
        own = reduced(reports) if self.world.speaks else {}
        return agreed(own, squared_gradient_norm(self.network.module, self._optimizer, self.world), self.world.peers)

    def _check(self, batch: TrainingBatch) -> None:
        self.network.check_tokens(batch.token_ids, batch.lengths, batch.temperature)
        for name in ("behavior_logprobs", "advantages", "loss_weights", "reference_logprobs"):
            values = getattr(batch, name)
            if values is not None and len(values) != len(batch.token_ids):
                raise ValueError(
                    f"{name} must have one value for each of {len(batch.token_ids)} tokens, got {len(values)}"
                )
        firsts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        if not np.isfinite(batch.loss_weights).all() or np.any(batch.loss_weights[firsts] != 0.0):
            raise ValueError(
                "loss_weights must be finite, and 0 for the first token of a sequence: nothing predicts it"
            )
