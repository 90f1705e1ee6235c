"""What models beside the policy are asked, and what of their answers becomes a view."""

import time
from typing import Any

import numpy as np
import pytest
from learner_peers import make_lease

from actors.scoring import Beside, needed, score
from stream_rl import config
from stream_rl.config import Algorithm
from stream_rl.errors import EngineError
from stream_rl.types import Float32Array, Version

LEASE = make_lease(Version(0, 2))


class Model:
    """Says of each token its id, scaled; remembers what it was asked."""

    def __init__(self, scale: float) -> None:
        self.scale, self.asked, self.bytes = scale, 0, int(10 * abs(scale))
        self.temperatures: list[float] = []

    def _say(self, token_ids: Any) -> list[Float32Array]:
        self.asked += 1
        assert [len(ids) for ids in token_ids] == LEASE.lengths.tolist()
        return [(self.scale * ids).astype(np.float32) for ids in token_ids]

    def logprobs(self, token_ids: Any, temperature: float) -> list[Float32Array]:
        self.temperatures.append(temperature)
        return self._say(token_ids)

    def values(self, token_ids: Any) -> list[Float32Array]:
        return self._say(token_ids)

    def train_step(self, batch: Any, loss: Any) -> dict[str, float]:
        raise AssertionError("scoring trains nothing")


def recipe_of() -> config.Recipe:
    return config.Recipe(
        run=config.Run(name="run", steps=1), model=config.Model(path="m"), task=config.TaskChoice(use="t"),
        queue=config.Queue(min_tokens=1, max_tokens=9), rollout=config.Rollout(temperature=0.6),
    )  # fmt: skip


def test_each_model_is_asked_once_of_all_tokens_in_order() -> None:
    reference, teacher, critic = Model(1.0), Model(-2.0), Model(3.0)
    started = time.perf_counter()
    views, seconds = score(LEASE, Beside(reference=reference, teacher=teacher, critic=critic), recipe_of())
    elapsed = time.perf_counter() - started
    for view, scale in ((views.reference_logprobs, 1.0), (views.teacher_logprobs, -2.0), (views.values, 3.0)):
        np.testing.assert_array_equal(view, (scale * LEASE.token_ids).astype(np.float32))
    assert [one.asked for one in (reference, teacher, critic)] == [1, 1, 1]
    assert reference.temperatures == teacher.temperatures == [0.6]
    parts = [seconds[f"{name}_seconds"] for name in ("reference", "teacher", "values")]
    assert min(parts) > 0.0 and seconds["scoring_seconds"] == pytest.approx(sum(parts)) and sum(parts) <= elapsed
    assert [seconds[f"{name}_bytes"] for name in ("reference", "teacher", "critic")] == [10, 20, 30]


def test_without_models_nothing_is_asked() -> None:
    views, seconds = score(LEASE, Beside(), recipe_of())
    assert (views.reference_logprobs, views.teacher_logprobs, views.values) == (None, None, None)
    assert seconds == {"scoring_seconds": 0}


def test_an_answer_of_another_length_is_refused() -> None:
    class Short(Model):
        def _say(self, token_ids: Any) -> list[Float32Array]:
            return super()._say(token_ids)[1:]

    with pytest.raises(EngineError, match="the teacher gave"):
        score(LEASE, Beside(teacher=Short(1.0)), recipe_of())


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        (Algorithm(), set()),
        (Algorithm(kl_coefficient=1e-3), {"reference"}),
        (Algorithm(advantage="gae"), {"critic"}),
        (Algorithm(advantage="distillation", kl_coefficient=0.1), {"teacher", "reference"}),
    ],
)
def test_what_a_recipe_needs(section: Algorithm, wanted: set[str]) -> None:
    assert {name for name, asked in needed(section).items() if asked} == wanted
