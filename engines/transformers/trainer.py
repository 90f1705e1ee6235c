"""The learner's step as transformers and torch's AdamW take it: what the learner is measured against.

The same loss function, clipping and optimizer.  Only how sequences lie in a micro-batch differs:

padded       side by side, filled up on the right to the longest of them.  Causal attention keeps the filling out of
             sight, so transformers needs no mask and takes torch's fused causal attention.
packed       back to back in one row, told apart by position ids that begin again, from which transformers makes a
             block-diagonal mask; torch's fused attention then looks at every pair of tokens of the row.
by_sequence  back to back too, with an attention of our own under transformers' interface for such: torch's fused causal
             attention, one sequence at a time.  The most that packing can save; transformers itself has it on a GPU
             only (flash attention).
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from engines.transformers.loading import library, load_model
from stream_rl.types import Float32Array, Int64Array, TrainingBatch

Lying = Literal["padded", "packed", "by_sequence"]
LYING: tuple[Lying, ...] = get_args(Lying)
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""As the learner takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """A micro-batch: r rows of w tokens."""

    ids: Tensor
    """[r, w] int64"""
    positions: Tensor | None
    """[r, w] int64, each token's in its sequence; None where a row is one sequence."""
    lengths: list[int] | None
    """Of the sequences in one row, for an attention that asks."""
    sequences: Tensor
    """[r * w] int64 the sequence of each token, from 0."""
    fields: tuple[Tensor, ...]
    """Behaviour log-probs, advantages, loss weights, [r * w] each; 0 in the filling."""


class TransformersTrainer:
    """One process, in float32 on a CPU."""

    def __init__(self, directory: str | pathlib.Path, lying: Lying, optimizer: Mapping[str, Any]) -> None:
        """Load the Hugging Face directory.

        optimizer: lr, weight_decay, adam_beta1, adam_beta2, adam_eps and clip_grad, as megatron-core names them.
        """
        self.lying = lying
        if lying == "by_sequence":
            _register_by_sequence()
        self.model = load_model(directory, "by_sequence" if lying == "by_sequence" else "sdpa")
        parameters = list(self.model.parameters())
        decay = optimizer["weight_decay"]
        self._clip = optimizer["clip_grad"]
        self._optimizer = torch.optim.AdamW(
            [  # as megatron-core has it, norms do not decay
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=optimizer["lr"],
            betas=(optimizer["adam_beta1"], optimizer["adam_beta2"]),
            eps=optimizer["adam_eps"],
        )

    def train_step(self, batch: TrainingBatch, cuts: Sequence[Int64Array], loss: Loss) -> dict[str, float]:
        """One optimizer step.  cuts: the sequences of each micro-batch.

        Returns `loss` (the sum) and `gradient_norm` (before clipping).
        """
        self._optimizer.zero_grad()
        total = 0.0
        for sequences in cuts:
            rows = self._rows(batch, sequences)
            behavior, advantages, weights = rows.fields
            value, _ = loss(
                self._logprobs(rows, batch.temperature), behavior, advantages, weights, rows.sequences, None
            )
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return {"loss": total, "gradient_norm": float(norm)}

    def _logprobs(self, rows: _Rows, temperature: float) -> Tensor:
        """[r * w] of each token given those before it; 0 for the first of a row."""
        logits = self.model(
            input_ids=rows.ids, position_ids=rows.positions, use_cache=False, sequence_lengths=rows.lengths
        ).logits
        if temperature != 1.0:
            logits = logits / temperature
        targets = rows.ids.roll(-1, dims=1)
        said = -functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return said.view(rows.ids.shape).roll(1, dims=1).flatten()

    def _rows(self, batch: TrainingBatch, sequences: Int64Array) -> _Rows:
        lengths = batch.lengths[sequences].astype(np.int64)
        ends = np.cumsum(batch.lengths, dtype=np.int64)[sequences]
        fields = (batch.behavior_logprobs, batch.advantages, batch.loss_weights)
        pieces = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        if self.lying == "padded":
            shape = (len(lengths), int(lengths.max()))

            def laid(values: Any) -> Any:
                rows = np.zeros(shape, values.dtype)
                for row, piece in zip(rows, pieces, strict=True):
                    row[: piece.stop - piece.start] = values[piece]
                return rows

            positions = None
            ids = np.repeat(np.arange(len(lengths)), shape[1])
        else:

            def laid(values: Any) -> Any:
                return np.concatenate([values[piece] for piece in pieces])[None]

            positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None]
            ids = np.repeat(np.arange(len(lengths)), lengths)
        return _Rows(
            ids=torch.from_numpy(laid(batch.token_ids).astype(np.int64)),
            positions=positions,
            lengths=lengths.tolist() if self.lying == "by_sequence" else None,
            sequences=torch.from_numpy(ids),
            fields=tuple(torch.from_numpy(_flat(laid(field))) for field in fields),
        )


def _flat(rows: Any) -> Float32Array:
    flat: Float32Array = np.ascontiguousarray(rows, np.float32).reshape(-1)
    return flat


def _register_by_sequence() -> None:
    def by_sequence(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sequence_lengths: Sequence[int] = (),
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, heads, w, head_dim] each -> [1, w, heads, head_dim]"""
        sizes = list(sequence_lengths)
        split = (torch.split(x, sizes, dim=2) for x in (query, key, value))
        outputs = [
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    library().AttentionInterface.register("by_sequence", by_sequence)
