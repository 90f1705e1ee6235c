"""Which token a loss is not finite for: found where it was planted, and nowhere else."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_builders import SECTIONS, micro_batch
from torch import Tensor

from algorithms.diagnosis import not_finite
from algorithms.losses import make_loss
from stream_rl.types import Float32Array, TrainingBatch

few = settings(max_examples=30, deadline=None)


def batch_of(seed: int) -> tuple[TrainingBatch, Float32Array]:
    """As a learner has it; and log-probs of its own."""
    made = micro_batch(seed)
    columns = {name: getattr(made, name).numpy().astype(np.float32) for name in ("behavior", "advantages", "weights")}
    batch = TrainingBatch(
        token_ids=np.zeros(len(made.weights), np.int32),
        lengths=np.bincount(made.sequences.numpy()).astype(np.int32),
        behavior_logprobs=columns["behavior"],
        advantages=columns["advantages"],
        loss_weights=columns["weights"],
        temperature=1.0,
        reference_logprobs=made.reference.numpy().astype(np.float32),
    )
    return batch, made.logprobs.numpy().astype(np.float32)


@pytest.mark.parametrize("name", SECTIONS)
def test_nothing_is_found_in_a_batch_that_is_fine(name: str) -> None:
    section = SECTIONS[name]
    assert not_finite(*batch_of(0), make_loss(section.loss, section)) == {}


@few
@given(
    seed=st.integers(0, 2**16), where=st.floats(0, 1), poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    column=st.sampled_from(["behavior_logprobs", "advantages", "reference_logprobs", "learner_logprobs"]),
)  # fmt: skip
def test_the_token_is_found_whose_column_is_not_finite(seed: int, where: float, poison: float, column: str) -> None:
    batch, logprobs = batch_of(seed)
    trained = np.flatnonzero(batch.loss_weights)
    token = int(trained[int(where * (len(trained) - 1))])
    values = (logprobs if column == "learner_logprobs" else getattr(batch, column)).copy()
    values[batch.loss_weights == 0] = poison  # of no account
    values[token] = poison
    if column == "learner_logprobs":
        logprobs = values
    else:
        batch = dataclasses.replace(batch, **{column: values})
    section = SECTIONS["kl_k3"]
    found = dict(not_finite(batch, logprobs, make_loss(section.loss, section)))
    assert found.pop(column).tolist() == [token]
    own = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    for name, tokens in found.items():
        assert name in ("loss", "gradient")
        assert set(own[tokens]) == {own[token]}
    if math.isnan(poison):
        assert "loss" in found


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is() -> None:
    batch, logprobs = batch_of(1)
    token = int(np.flatnonzero(batch.loss_weights)[3])

    def loss(own: Tensor, behavior: Tensor, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
        """The square root of 0 at one token: its gradient is NaN."""
        here = behavior == batch.behavior_logprobs[token]
        return own.sum() + (own[here] - own.detach()[here]).abs().sqrt().sum(), {}

    found = not_finite(batch, logprobs, loss)  # type: ignore[arg-type]
    assert {name: tokens.tolist() for name, tokens in found.items()} == {"gradient": [token]}
