"""Sums over the trained tokens of a sequence, said again to each of its tokens."""

import torch
from torch import Tensor


class Sequences:
    """Which sequence each of t tokens is of, and which tokens count."""

    def __init__(self, ids: Tensor | None, trained: Tensor) -> None:
        """ids: [t] int64 from 0, below t.  None: every question about sequences raises ValueError."""
        if ids is not None and ids.shape != trained.shape:
            raise ValueError(f"sequences must have one id for each of {tuple(trained.shape)} tokens, got {ids.shape}")
        self._ids, self._trained = ids, trained

    def sum(self, value: Tensor) -> Tensor:
        """[t] -> [t] the sum over the token's sequence."""
        if self._ids is None:
            raise ValueError("a loss over whole sequences needs the sequence of each token, got sequences = None")
        # as many sums as tokens: their number would have to come back from the device
        sums = torch.zeros_like(value).index_add_(0, self._ids, value.masked_fill(~self._trained, 0.0))
        return sums[self._ids]

    def mean(self, value: Tensor) -> Tensor:
        """[t] -> [t] the mean over the token's sequence; 0 where none of its tokens counts."""
        return self.sum(value) / self.sum(torch.ones_like(value)).clamp(min=1.0)

    def all(self, value: Tensor) -> Tensor:
        """[t] bool -> [t] bool"""
        return self.sum((~value).to(torch.float32)) == 0.0
