"""The staleness experiment: its sampler samples with the weights it says, its leases keep the contract, it is drawn."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from huggingface_reference import reference_logprobs, write_random_model
from megatron_builders import make_batch, make_learner

from actors.batches import token_kinds
from algorithms.losses import make_loss
from engines.megatron.lagged import LaggedSampler
from scripts.bench.staleness import ALGORITHMS, Plan, lease_of, measure, plot, reward
from stream_rl.config import Algorithm
from stream_rl.errors import ConfigError

PROMPTS = [np.array(ids, np.int32) for ids in ([3, 5, 1], [7], [2, 2, 2, 2, 9, 4], [11, 12])]
TINY = Plan(ages=(0, 2), seeds=1, steps=30, prompts=2, members=2, evaluated=4, symbols=3, answer=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("micro_batch_tokens", [7, 1000])
def test_it_samples_from_the_weights_of_so_many_steps_ago(tmp_path: pathlib.Path, micro_batch_tokens: int) -> None:
    write_random_model(tmp_path / "model")
    learner = make_learner(tmp_path / "model", micro_batch_tokens)
    sampler = LaggedSampler(learner, ages=2, seed=1)
    versions = []
    for step in range(4):
        answers, logprobs = sampler.sample(PROMPTS, 5, 0.7, age=0)
        assert all((ids[: len(prompt)] == prompt).all() for ids, prompt in zip(answers, PROMPTS, strict=True))
        own = [values[-5:] for values in learner.logprobs(answers, 0.7)]
        np.testing.assert_allclose(logprobs, own, atol=1e-5)
        versions.append((answers, own))
        learner.train_step(make_batch(step), make_loss("ppo_clip", Algorithm()))
        sampler.remember()
    for age, version in ((1, 3), (2, 2), (9, 2)):  # version 4 is now, and two older ones are kept
        torch.manual_seed(0)
        answers, logprobs = sampler.sample(PROMPTS, 5, 0.7, age=age)
        now = np.stack([values[-5:] for values in learner.logprobs(answers, 0.7)])
        assert np.abs(now - logprobs).max() > 1e-3, "these are other weights"
        kept = make_learner(tmp_path / "model", micro_batch_tokens)
        for step in range(version):
            kept.train_step(make_batch(step), make_loss("ppo_clip", Algorithm()))
        then = np.stack([values[-5:] for values in kept.logprobs(answers, 0.7)])
        np.testing.assert_allclose(logprobs, then, atol=1e-5)


def test_tokens_come_as_often_as_they_should(tmp_path: pathlib.Path) -> None:
    model = write_random_model(tmp_path / "model")
    sampler = LaggedSampler(make_learner(tmp_path / "model"), ages=0, seed=1)
    count, prompt = 4000, PROMPTS[2]
    answers, _ = sampler.sample([prompt] * count, 1, 1.5, age=0)
    got = np.bincount([ids[-1] for ids in answers], minlength=64) / count
    with torch.no_grad():
        every = [reference_logprobs(model, np.append(prompt, token), 1.5)[-1].exp().item() for token in range(64)]
    expected = np.array(every)
    assert expected.sum() == pytest.approx(1.0)
    assert np.abs(got - expected).max() < 5 * np.sqrt(0.25 / count)


def test_its_leases_keep_the_contract() -> None:
    answers = [np.array([2, 3, 1, 2, 4], np.int32)] * 4
    assert reward(TINY, answers[0]) == 0.5
    lease = lease_of(TINY, 7, 2, answers, [np.array([-1.0, -2.0], np.float32)] * 4)
    assert token_kinds(lease).trainable.reshape(4, 5).tolist() == [[False] * 3 + [True] * 2] * 4
    assert lease.logprobs.reshape(4, 5)[0].tolist() == [0.0, 0.0, 0.0, -1.0, -2.0]
    assert set(lease.ages.tolist()) == {0, 2} and set(lease.steps.tolist()) == {0, 5}
    assert lease.groups.tolist() == [0, 0, 1, 1] and lease.members.tolist() == [0, 1, 0, 1]


def test_it_is_measured_and_drawn(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    result = measure(TINY, said.append)
    assert len(said) == 1 + len(ALGORITHMS)
    assert len(result["runs"]) == len(result["summary"]) == 2 * len(ALGORITHMS)
    for run in result["runs"]:
        assert len(run["rewards"]) == 4 and 0 <= min(run["rewards"]) <= max(run["rewards"]) <= 1
        assert run["skipped"] == 0
        assert (run["effective_sample_size"] == pytest.approx(1.0, abs=1e-6)) == (run["age"] == 0)
    gaps = {run["algorithm"]: run["logprob_gap_abs"] for run in result["runs"] if run["age"]}
    assert gaps["naive PPO"] != gaps["truncated IS"], "the recipes differ"
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("changes", [{"ages": ()}, {"ages": (-1,)}, {"seeds": 0}, {"members": 1}, {"steps": 29}])
def test_a_plan_that_cannot_be_carried_out_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        measure(dataclasses.replace(TINY, **changes), lambda line: None)  # type: ignore[arg-type]
