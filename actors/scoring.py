"""What models beside the policy say of a lease, before the step that it is for: reference, teacher, critic."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actors.batches import Views
from algorithms.losses import Loss
from stream_rl import config
from stream_rl.errors import EngineError
from stream_rl.messages import Lease
from stream_rl.types import Float32Array, TrainingBatch

Tokens = Sequence[npt.NDArray[np.int32]]


class LogProbs(Protocol):
    """A frozen policy."""

    @property
    def bytes(self) -> int: ...

    def logprobs(self, token_ids: Tokens, temperature: float, /) -> list[Float32Array]: ...


class Values(Protocol):
    """A critic."""

    @property
    def bytes(self) -> int: ...

    def values(self, token_ids: Tokens, /) -> list[Float32Array]: ...

    def train_step(self, batch: TrainingBatch, loss: Loss, /) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """The models that a recipe needs beside the policy; None of the others."""

    reference: LogProbs | None = None
    teacher: LogProbs | None = None
    critic: Values | None = None

    @property
    def trained(self) -> dict[str, Any]:
        """Those that a checkpoint of the policy holds too, by name."""
        return {} if self.critic is None else {"critic": self.critic}


NOTHING_BESIDE = Beside()


def score(lease: Lease, beside: Beside, recipe: config.Recipe) -> tuple[Views, dict[str, float]]:
    """Each model's view of all tokens, and the seconds that each took (`reference_seconds`, `teacher_seconds`,
    `values_seconds`) with their sum and the bytes of its weights (`reference_bytes`, `teacher_bytes`, `critic_bytes`).

    A frozen policy is asked at the sampling temperature, as the behaviour policy was; a first token has log-prob and
    value 0.
    """
    token_ids, temperature = np.split(lease.token_ids, np.cumsum(lease.lengths)[:-1]), recipe.rollout.temperature
    views: dict[str, Float32Array] = {}
    seconds: dict[str, float] = {}

    def ask(name: str, view: str, question: Callable[..., list[Float32Array]], *more: Any) -> None:
        started = time.perf_counter()
        views[view] = np.concatenate(question(token_ids, *more))
        if views[view].shape != lease.token_ids.shape:
            raise EngineError(f"the {name} gave {views[view].shape} values for {lease.token_ids.shape} tokens")
        seconds[f"{name}_seconds"] = time.perf_counter() - started

    if beside.reference is not None:
        ask("reference", "reference_logprobs", beside.reference.logprobs, temperature)
    if beside.teacher is not None:
        ask("teacher", "teacher_logprobs", beside.teacher.logprobs, temperature)
    if beside.critic is not None:
        ask("values", "values", beside.critic.values)
    models = {"reference": beside.reference, "teacher": beside.teacher, "critic": beside.critic}
    sizes = {f"{name}_bytes": float(model.bytes) for name, model in models.items() if model is not None}
    return Views(**views), seconds | sizes | {"scoring_seconds": sum(seconds.values())}


def needed(algorithm: config.Algorithm) -> Mapping[str, bool]:
    """Which models beside the policy a recipe's algorithm asks."""
    return {
        "reference": algorithm.kl_coefficient > 0.0,
        "teacher": algorithm.advantage == "distillation",
        "critic": algorithm.advantage == "gae",
    }
