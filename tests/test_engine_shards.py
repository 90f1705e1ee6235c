"""Two real tensor-parallel ranks: every commit at the same step on both, and together the published bits."""

import pathlib
import time
from collections.abc import Iterator

import marked_model
import numpy as np
import pytest
from engine_harness import RUN, EngineHarness, logprob_gap

from engines.megatron.learner import MegatronLearner
from engines.weights.fingerprint import model_sum, text
from stream_rl.config import Learner
from stream_rl.types import Version, make_rid

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]
STEPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    directory: pathlib.Path = tmp_path_factory.mktemp("shards")
    model = marked_model.write(directory / "model", marked_model.marked_weights(0))
    server = EngineHarness(directory, model, tp_size=2, chunked_prefill_size=64)
    try:
        server.start()
        server.publish(Version(0, 0), marked_model.marked_weights(0).items())
        yield server
    finally:
        server.stop()


def test_updates_come_live_on_both_ranks_at_one_step_while_requests_run(shards: EngineHarness) -> None:
    """A step with the weights of two versions would say neither version's token."""
    rids = [make_rid(RUN, 0, member, 0) for member in range(8)]
    answers = shards.start_many([
        shards.generate(rid, [i + 1] * (5 + 9 * i), 60 + 10 * i, temperature=0) for i, rid in enumerate(rids)
    ])  # fmt: skip
    for step in range(1, STEPS + 1):
        shards.publish(Version(0, step), marked_model.marked_weights(step).items())
        shards.wait(lambda count=step: len(shards.reports) == count, f"version {step}")
        time.sleep(0.05)
    for rid, answer in zip(rids, answers.result(120), strict=True):
        shards.wait(lambda rid=rid: bool(shards.streams[rid].finish), f"the finish of {rid}")
        stream = shards.streams[rid]
        assert stream.token_ids == answer["output_ids"]
        assert [t for t, v in zip(stream.token_ids, stream.versions, strict=True) if t != v.step] == []
    assert max(len(set(shards.streams[rid].versions)) for rid in rids) >= 3
    assert all(report.hash_matches and not report.anchor for report in shards.reports)


def test_both_ranks_compute_with_what_was_published(shards: EngineHarness, tmp_path: pathlib.Path) -> None:
    """Log-probs and the recomputed fingerprint are those of a learner with the same weights."""
    weights = marked_model.random_weights(5)
    version = Version(1, 0)
    shards.publish(version, weights.items())
    shards.wait(lambda: shards.reports[-1].version == version, "the version of another history")
    shards.learner_done(version)
    shards.wait(lambda: bool(shards.verified), "the full recomputation")
    assert shards.verified[-1].weights_hash == shards.verified[-1].expected == text(model_sum(weights.items()))
    learner = MegatronLearner(marked_model.write(tmp_path / "model", weights), Learner(optimizer={"lr": 1e-3}), 0)
    rids = [make_rid(RUN, 1, member, 0) for member in range(4)]
    prompts = [[1 + (7 * j + member) % 100 for j in range(3 + 9 * member)] for member in range(4)]
    shards.start_many([
        shards.generate(rid, prompt, 20, temperature=0) for rid, prompt in zip(rids, prompts, strict=True)
    ]).result(60)  # fmt: skip
    shards.wait(lambda: all(shards.streams[rid].finish for rid in rids), "the finishes")
    whole = [np.array(p + shards.streams[r].token_ids, np.int32) for p, r in zip(prompts, rids, strict=True)]
    for rid, prompt, logprobs in zip(rids, prompts, learner.logprobs(whole, 1.0), strict=True):
        assert logprob_gap(shards.streams[rid].logprobs, logprobs[len(prompt) :].tolist()) < 1e-4
    assert shards.fresh_stats().counters["faults"] == 0
