"""The same proofs on a GPU, where forward passes overlap with everything else: CUDA graphs, overlap scheduler, bf16."""

import pathlib
import time
from collections.abc import Iterator

import marked_model
import numpy as np
import pytest
import torch
from engine_harness import RUN, EngineHarness
from test_engine_follows_learner import demonstration

from algorithms.losses import cross_entropy
from engines.megatron.learner import MegatronLearner
from stream_rl.config import Learner
from stream_rl.types import Version, make_rid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
SGLANG = {
    "device": "cuda",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "dtype": "bfloat16",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 40000,
    "max_running_requests": 64,
    "cuda_graph_max_bs_decode": 32,
    "chunked_prefill_size": 64,
}


def bf16(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["one_gpu", "two_gpus"])
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} CUDA devices, here are {torch.cuda.device_count()}")
    directory = tmp_path_factory.mktemp("gpu")
    model = marked_model.write(directory / "model", bf16(marked_model.marked_weights(0)))
    harness = EngineHarness(directory, model, **SGLANG, tp_size=request.param)
    try:
        harness.start()
        harness.publish(Version(0, 0), bf16(marked_model.marked_weights(0)).items())
        yield harness
    finally:
        harness.stop()
        print(harness.logs())


def test_every_token_states_the_version_that_sampled_it(gpu: EngineHarness) -> None:
    rids = [make_rid(RUN, 0, member, 0) for member in range(32)]
    answers = gpu.start_many([
        gpu.generate(rid, [i + 1] * (10 + 9 * i), 900 + 20 * i, temperature=0) for i, rid in enumerate(rids)
    ])  # fmt: skip
    step = 0
    while not answers.done() and step < 60:
        step += 1
        gpu.publish(Version(0, step), bf16(marked_model.marked_weights(step)).items())
        time.sleep(0.05)
    for rid, answer in zip(rids, answers.result(120), strict=True):
        gpu.wait(lambda rid=rid: bool(gpu.streams[rid].finish), f"the finish of {rid}")
        stream = gpu.streams[rid]
        assert stream.token_ids == answer["output_ids"]
        wrong = [(t, v) for t, v in zip(stream.token_ids, stream.versions, strict=True) if t != v.step]
        assert wrong == []
    spanned = [len(set(gpu.streams[rid].versions)) for rid in rids]
    stalls = sorted(report.stall_seconds * 1e3 for report in gpu.reports)
    print(f"\n{step} versions, {len(gpu.reports)} commits; a request spans {min(spanned)} to {max(spanned)}")
    print(f"stall of a commit: p50 {stalls[len(stalls) // 2]:.2f} ms, max {stalls[-1]:.2f} ms")
    assert max(spanned) >= 3
    gpu.wait(lambda: bool(gpu.reports) and gpu.reports[-1].version == Version(0, step), "the last version")
    assert all(report.hash_matches and len(report.forward_counts) == 1 for report in gpu.reports)


def test_an_idle_engine_commits_within_100_ms(gpu: EngineHarness) -> None:
    time.sleep(2)
    version = Version(0, 100)
    gpu.publish(version, bf16(marked_model.marked_weights(100)).items())
    gpu.wait(lambda: gpu.reports[-1].version == version, "the idle commit")
    assert gpu.reports[-1].commit_seconds < 0.1


def test_the_full_hash_is_the_publishers(gpu: EngineHarness) -> None:
    gpu.learner_done(Version(0, 100))
    gpu.wait(lambda: bool(gpu.verified), "the full hash")
    assert gpu.verified[-1].weights_hash == gpu.verified[-1].expected
    assert gpu.stats is not None
    assert gpu.stats.counters["faults"] == 0


def test_a_learner_on_the_same_gpu_is_followed(tmp_path: pathlib.Path) -> None:
    model = marked_model.write(tmp_path / "model", bf16(marked_model.random_weights(3, tied=True, scale=0.1)))
    learner = MegatronLearner(model, Learner(optimizer={"lr": 1e-4}), 0)
    harness = EngineHarness(tmp_path, model, **SGLANG)
    try:
        harness.start()
        harness.publish(Version(0, 0), learner.named_weights())
        for step in range(10):
            learner.train_step(demonstration(step), cross_entropy)
            harness.publish(Version(0, step + 1), learner.named_weights())
            harness.wait(lambda count=step + 1: len(harness.reports) == count, f"update {step + 1}")
        assert all(r.hash_matches and not r.anchor for r in harness.reports)
        prompts = [[1 + (5 * i + j) % 100 for j in range(4 + 7 * i)] for i in range(16)]
        rids = [make_rid(RUN, 1, member, 0) for member in range(16)]
        harness.start_many([harness.generate(r, p, 60) for r, p in zip(rids, prompts, strict=True)]).result(60)
        harness.wait(lambda: all(harness.streams[r].finish for r in rids), "the finishes")
        whole = [np.array(p + harness.streams[r].token_ids, np.int32) for p, r in zip(prompts, rids, strict=True)]
        gaps = np.concatenate([
            np.abs(logprobs[len(prompt) :] - np.array(harness.streams[rid].logprobs))
            for rid, prompt, logprobs in zip(rids, prompts, learner.logprobs(whole, 1.0), strict=True)
        ])  # fmt: skip
        changed = sum(r.changed for r in harness.reports) / sum(r.elements for r in harness.reports)
        print(f"\nlog-prob gap, bf16: mean {gaps.mean():.4f} p99 {np.quantile(gaps, 0.99):.4f} max {gaps.max():.4f}; "
              f"{changed:.1%} of elements changed a step")  # fmt: skip
        assert gaps.mean() < 0.05
    finally:
        harness.stop()
        print(harness.logs())
