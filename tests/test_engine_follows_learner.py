"""A real learner takes real steps, a real engine follows it live: same log-probs, same bits as a fresh engine."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import huggingface_reference
import marked_model
import numpy as np
import pytest
import torch
from engine_harness import RUN, EngineHarness, logprob_gap

from algorithms.losses import cross_entropy
from engines.megatron.learner import MegatronLearner
from engines.weights import fingerprint
from stream_rl.config import Learner
from stream_rl.types import TrainingBatch, Version, make_rid

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
"""The first test's time includes the server's start."""
UPDATES = 20


def demonstration(step: int) -> TrainingBatch:
    generator = np.random.default_rng(step)
    lengths = generator.integers(4, 40, 6).astype(np.int32)
    tokens = int(lengths.sum())
    weights = np.full(tokens, 1 / tokens, np.float32)
    weights[np.cumsum(lengths) - lengths] = 0
    return TrainingBatch(
        token_ids=generator.integers(1, 120, tokens).astype(np.int32),
        lengths=lengths,
        behavior_logprobs=np.zeros(tokens, np.float32),
        advantages=np.zeros(tokens, np.float32),
        loss_weights=weights,
        temperature=1.0,
    )


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> MegatronLearner:
    directory = tmp_path_factory.mktemp("tied") / "model"
    marked_model.write(directory, marked_model.random_weights(3, tied=True))
    return MegatronLearner(directory, Learner(optimizer={"lr": 1e-3}), 0)


@pytest.fixture(scope="module")
def following(
    tmp_path_factory: pytest.TempPathFactory, learner: MegatronLearner
) -> Iterator[tuple[EngineHarness, pathlib.Path]]:
    """An engine after 20 live updates, with requests running all the while; and the learner's checkpoint."""
    directory = tmp_path_factory.mktemp("following")
    harness = EngineHarness(directory, learner.model_dir)
    try:
        harness.start()
        harness.publish(Version(0, 0), learner.named_weights())
        rids = [make_rid(RUN, 0, member, 0) for member in range(8)]
        answers = harness.start_many([harness.generate(rid, [1, 2, 3], 700) for rid in rids])
        for step in range(UPDATES):
            learner.train_step(demonstration(step), cross_entropy)
            harness.publish(Version(0, step + 1), learner.named_weights())
            # each is to land by itself: an engine that fell behind would be brought up by an anchor
            harness.wait(lambda count=step + 1: len(harness.reports) == count, f"update {step + 1}")
        answers.result(120)
        checkpoint = directory / "checkpoint"
        learner.save(checkpoint)
        yield harness, checkpoint
    finally:
        harness.stop()


def prompt_logprobs(harness: EngineHarness) -> list[float]:
    """What the engine makes of fixed prompts, alone in their batch: the same bits for the same weights."""
    values = []
    for i in range(4):
        prompt = [1 + (11 * i + 3 * j) % 110 for j in range(20 + 30 * i)]
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        answer = json.loads(harness.call(harness.post("/generate", **body, return_logprob=True, logprob_start_len=0)))
        values += [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    return values


def full_hash(harness: EngineHarness, version: Version) -> str:
    """Fingerprint recomputed from all live parameters of the engine."""
    harness.learner_done(version)
    harness.wait(lambda: bool(harness.verified), "the full recomputation")
    return harness.verified[-1].weights_hash


def test_updates_came_live_while_requests_ran(following: tuple[EngineHarness, pathlib.Path]) -> None:
    harness, _ = following
    assert all(report.hash_matches and not report.anchor for report in harness.reports)
    versions = {version for stream in harness.streamed().values() for version in stream.versions}
    assert len(versions) > 5


def largest_gap(harness: EngineHarness, learner: MegatronLearner, group: int, version: Version) -> float:
    """Between the log-probs of tokens that the engine samples greedily, all at `version`, and the learner's."""
    prompts = [[1 + (5 * i + j) % 100 for j in range(2 + 11 * i)] for i in range(6)]
    rids = [make_rid(RUN, group, member, 0) for member in range(6)]
    harness.start_many([
        harness.generate(rid, prompt, 40, temperature=0) for rid, prompt in zip(rids, prompts, strict=True)
    ]).result(60)  # fmt: skip
    harness.wait(lambda: all(harness.streams[rid].finish for rid in rids), "the finishes")
    streams = [harness.streams[rid] for rid in rids]
    assert all(stream.versions == [version] * 40 for stream in streams)
    whole = [np.array(prompt + stream.token_ids, np.int32) for prompt, stream in zip(prompts, streams, strict=True)]
    return max(
        logprob_gap(stream.logprobs, logprobs[len(prompt) :].tolist())
        for stream, prompt, logprobs in zip(streams, prompts, learner.logprobs(whole, 1.0), strict=True)
    )


def test_log_probs_equal_the_learners_tied(
    following: tuple[EngineHarness, pathlib.Path], learner: MegatronLearner
) -> None:
    assert largest_gap(following[0], learner, 1, Version(0, UPDATES)) < 1e-4


def test_the_followed_weights_are_those_of_a_fresh_engine_bit_for_bit(
    following: tuple[EngineHarness, pathlib.Path], learner: MegatronLearner, tmp_path: pathlib.Path
) -> None:
    harness, checkpoint = following
    live_hash, live_logprobs = full_hash(harness, Version(0, UPDATES)), prompt_logprobs(harness)
    assert live_hash == fingerprint.text(fingerprint.model_sum(learner.named_weights()))
    fresh = EngineHarness(tmp_path, checkpoint)
    try:
        fresh.start()
        assert prompt_logprobs(fresh) == live_logprobs
        fresh.publish(Version(0, 0), learner.named_weights())
        assert full_hash(fresh, Version(0, 0)) == live_hash
        assert fresh.reports == [], "it needed no update to hold these bits"

        # both comparisons can fail: one bit of one element
        changed = {name: tensor.clone() for name, tensor in learner.named_weights()}
        changed["model.layers.1.self_attn.v_proj.weight"].view(torch.int32)[3, 5] ^= 1 << 12
        fresh.publish(Version(0, 1), changed.items())
        fresh.wait(lambda: len(fresh.reports) == 1, "the changed element")
        assert fresh.reports[0].changed == 1
        assert fresh.reports[0].weights_hash != live_hash
        assert prompt_logprobs(fresh) != live_logprobs
    finally:
        fresh.stop()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "changes", "biases"),
    [
        ("Qwen2ForCausalLM", {"head_dim": ...}, 6),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, 0),
    ],
)
def test_an_engine_follows_models_of_other_families(
    tmp_path: pathlib.Path, architecture: str, changes: dict[str, Any], biases: int
) -> None:
    """Log-probs before and after updates of every tensor, then of the biases alone; and the recomputed fingerprint."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    huggingface_reference.write_random_model(tmp_path / "model", architecture, **(sizes | changes))
    learner = MegatronLearner(tmp_path / "model", Learner(optimizer={"lr": 1e-3}), 0)
    harness = EngineHarness(tmp_path, learner.model_dir)
    try:
        harness.start()
        harness.publish(Version(0, 0), learner.named_weights())
        assert largest_gap(harness, learner, 0, Version(0, 0)) < 1e-4
        names = {name for name, _ in learner.named_weights() if name.endswith(".bias")}
        assert len(names) == biases
        for step in range(1, 6):
            old = {name: tensor.clone() for name, tensor in learner.named_weights()}
            learner.train_step(demonstration(step), cross_entropy)
            assert all(not torch.equal(old[name], tensor) for name, tensor in learner.named_weights())
            harness.publish(Version(0, step), learner.named_weights())
            harness.wait(lambda count=step: len(harness.reports) == count, f"update {step}")
        assert largest_gap(harness, learner, 1, Version(0, 5)) < 1e-4
        old_logprobs = prompt_logprobs(harness)

        with torch.no_grad():
            for name, parameter in learner.network.gpt.named_parameters():
                if name.endswith("linear_qkv.bias"):
                    parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        harness.publish(Version(0, 6), learner.named_weights())
        harness.wait(lambda: len(harness.reports) == 6, "the update of the biases")
        elements = sum(tensor.numel() for name, tensor in learner.named_weights() if name in names)
        assert harness.reports[-1].changed == elements
        assert largest_gap(harness, learner, 2, Version(0, 6)) < 1e-4
        assert (prompt_logprobs(harness) != old_logprobs) == (biases > 0)
        assert all(report.hash_matches and not report.anchor for report in harness.reports)
        assert full_hash(harness, Version(0, 6)) == fingerprint.text(fingerprint.model_sum(learner.named_weights()))
    finally:
        harness.stop()
