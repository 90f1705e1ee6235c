"""One real SGLang server, real updates in the middle of real requests."""

import itertools
import pathlib
import time

import marked_model
import numpy as np
import pytest
import torch
from engine_harness import RUN, EngineHarness, Stream, logprob_gap

from engines.megatron.learner import MegatronLearner
from engines.sglang.client import EngineClient
from engines.weights.fingerprint import model_sum, text
from stream_rl.config import Learner
from stream_rl.types import Version, make_rid

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
"""The first test's time includes the server's start."""
_groups = itertools.count()
_steps = itertools.count(1)


class Publishing:
    """Hands versions to the shared engine; steps go on counting from test to test, as a learner's do."""

    def __init__(self, harness: EngineHarness) -> None:
        self.harness = harness

    def publish(self, weights: dict[str, torch.Tensor] | None = None) -> Version:
        """Make the next version live, marked with its own number unless `weights` are given."""
        version = Version(0, next(_steps))
        self.harness.publish(version, (weights or marked_model.marked_weights(version.step)).items())
        self.live(version)
        return version

    def live(self, version: Version) -> None:
        self.harness.wait(lambda: any(r.version == version for r in self.harness.reports), f"version {version} live")


@pytest.fixture(scope="module")
def publishing(harness: EngineHarness) -> Publishing:
    harness.publish(Version(0, 0), marked_model.marked_weights(0).items())
    return Publishing(harness)


def rids(count: int) -> list[str]:
    group = next(_groups)
    return [make_rid(RUN, group, member, 0) for member in range(count)]


def finished(harness: EngineHarness, names: list[str]) -> list[Stream]:
    harness.wait(lambda: all(harness.streams[name].finish for name in names), "every request's finish")
    return [harness.streams[name] for name in names]


def mismatches(stream: Stream) -> list[tuple[int, int, Version]]:
    """Positions whose token is not the mark of the version that they claim."""
    return [
        (i, token, version)
        for i, (token, version) in enumerate(zip(stream.token_ids, stream.versions, strict=True))
        if token != version.step
    ]


def test_every_token_states_the_version_that_sampled_it(harness: EngineHarness, publishing: Publishing) -> None:
    names = rids(12)
    answers = harness.start_many([
        harness.generate(name, [i + 1] * (15 + 25 * i), 150 + 20 * i, temperature=0) for i, name in enumerate(names)
    ])  # fmt: skip
    before = len(harness.reports)
    for _ in range(8):
        publishing.publish()
        time.sleep(0.1)
    streams = finished(harness, names)
    assert len(harness.reports) == before + 8
    assert all(report.hash_matches for report in harness.reports)
    for stream, answer in zip(streams, answers.result(60), strict=True):
        assert stream.token_ids == answer["output_ids"]
        assert mismatches(stream) == []
    spanning = [stream for stream in streams if len(set(stream.versions)) >= 3]
    assert len(spanning) >= 6, "updates must land in the middle of requests"

    # the check can fail: one token moved from one span to the next is noticed
    shifted = spanning[0]
    change = next(i for i in range(1, len(shifted.versions)) if shifted.versions[i] != shifted.versions[i - 1])
    shifted.versions[change] = shifted.versions[change - 1]
    assert len(mismatches(shifted)) == 1


def test_versions_hold_when_requests_are_retracted(harness: EngineHarness, publishing: Publishing) -> None:
    names = rids(24)
    retracted_before = harness.fresh_stats().counters["retractions"]
    answers = harness.start_many([
        harness.generate(name, [i + 1] * 60, 400, temperature=0) for i, name in enumerate(names)
    ])  # fmt: skip
    while not answers.done():
        # each is live before the next: an engine that misses too many gets all weights, which the last test forbids
        publishing.publish()
        time.sleep(0.3)
    for stream, answer in zip(finished(harness, names), answers.result(60), strict=True):
        assert len(stream.token_ids) == 400
        assert stream.token_ids == answer["output_ids"]
        assert mismatches(stream) == []
    assert harness.fresh_stats().counters["retractions"] > retracted_before
    assert harness.problems["out of order"] == 0


def test_an_idle_engine_commits_within_100_ms(harness: EngineHarness, publishing: Publishing) -> None:
    time.sleep(1.5)  # long enough for the scheduler to sleep in its poll
    seconds: list[float] = []
    while min(seconds, default=1.0) >= 0.1 and len(seconds) < 10:  # the bound is the engine's, not a busy machine's
        version = publishing.publish()
        seconds.append(next(r.commit_seconds for r in harness.reports if r.version == version))
        time.sleep(0.3)
    assert min(seconds) < 0.1, seconds


def test_no_prefix_computed_under_older_weights_is_reused(harness: EngineHarness, publishing: Publishing) -> None:
    publishing.publish()
    prompt = list(range(1, 41))

    def cached() -> int:
        answer = harness.call(harness.generate(rids(1)[0], prompt, 4))
        return int(answer["meta_info"]["cached_tokens"])

    assert cached() == 0
    assert cached() > 0
    publishing.publish()
    assert cached() == 0


def test_the_next_turn_reuses_its_prefix_until_that_is_too_old(harness: EngineHarness, publishing: Publishing) -> None:
    publishing.publish()
    group, prompt = next(_groups), list(range(50, 90))

    def cached(segment: int, member: int = 0) -> int:
        nonlocal prompt
        rid = make_rid(RUN, group, member, segment)
        answer = harness.call(harness.generate(rid, prompt, 8))
        prompt += answer["output_ids"] + [7, 8, 9]
        return int(answer["meta_info"]["cached_tokens"])

    assert cached(0) == 0
    held = len(prompt) - 4  # all but what was appended, and maybe the last token, which no step need take in
    assert held <= cached(1) <= held + 1
    for _ in range(harness.recipe.rollout.max_kv_age):
        publishing.publish()
    assert cached(2) > held + 1, "as old as it may be"
    assert cached(0, member=1) == 0, "another trajectory takes the live version"
    publishing.publish()
    assert cached(3) == 0, "too old: computed again"
    assert cached(4) > held + 1


def test_chunks_come_while_a_request_grows_and_slow_ones_do_not_sit_on_tokens(
    harness: EngineHarness, publishing: Publishing
) -> None:
    (name,) = rids(1)
    harness.call(harness.generate(name, [1, 2, 3], 42))
    (stream,) = finished(harness, [name])
    assert stream.chunks >= 42 // harness.recipe.engine.chunk_tokens
    assert stream.finish == "length"
    assert len(stream.logprobs) == len(stream.versions) == len(stream.token_ids) == 42


def test_chunks_that_are_not_acknowledged_come_again(harness: EngineHarness, publishing: Publishing) -> None:
    names, before = rids(4), harness.problems["unanswered"]
    harness.answer_acks = False
    try:
        answers = harness.start_many([harness.generate(name, [7, 8, 9], 60) for name in names])
        results = answers.result(60)
        harness.wait(lambda: harness.problems["unanswered"] > before, "chunks that are dropped")
    finally:
        harness.answer_acks = True
    for stream, answer in zip(finished(harness, names), results, strict=True):
        assert stream.token_ids == answer["output_ids"]


def test_aborted_requests_say_so_and_are_counted_also_those_that_wait(
    harness: EngineHarness, publishing: Publishing
) -> None:
    before = harness.fresh_stats().counters["aborts"]
    names = rids(40)  # more than max_running_requests: some wait
    answers = harness.start_many([harness.generate(name, [5] * 30, 2000) for name in names])
    harness.wait(lambda: len(harness.streams[names[0]].token_ids) > 5, "the first tokens")
    for name in names:
        harness.call(harness.post("/abort_request", rid=name))
    results = answers.result(60)
    for stream, answer in zip(finished(harness, names), results, strict=True):
        assert stream.finish == answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert stream.token_ids[: len(answer["output_ids"])] == answer["output_ids"]
    assert harness.fresh_stats().counters["aborts"] == before + len(names)


def test_a_trajectory_goes_on_as_a_later_segment_and_an_abort_of_the_old_one_does_not_touch_it(
    harness: EngineHarness, publishing: Publishing
) -> None:
    version, group = publishing.publish(), next(_groups)
    old, new, eleventh = (make_rid(RUN, group, 0, segment) for segment in (0, 1, 11))
    first = harness.start_many([harness.generate(old, [4] * 20, 3000, temperature=0)])
    harness.wait(lambda: len(harness.streams[old].token_ids) > 10, "the first tokens")
    sofar = list(harness.streams[old].token_ids)
    rest = harness.start_many([
        harness.generate(name, [4] * 20 + sofar, 40, temperature=0) for name in (new, eleventh)
    ])  # fmt: skip
    harness.call(harness.post("/abort_request", rid=old))
    first.result(60)
    answers = rest.result(60)
    interrupted, *resumed = finished(harness, [old, new, eleventh])
    assert interrupted.finish == "abort" and interrupted.token_ids[: len(sofar)] == sofar
    for stream, answer in zip(resumed, answers, strict=True):
        assert stream.finish == "length" and stream.token_ids == answer["output_ids"]
        assert stream.versions == [version] * 40 and mismatches(stream) == []


def test_a_client_that_goes_away_has_its_request_aborted(harness: EngineHarness, publishing: Publishing) -> None:
    (name,) = rids(1)

    async def ask() -> None:
        async with EngineClient("engine-0", harness.http, 60) as client:
            await client.generate(name, [6] * 20, {"max_new_tokens": 3900, "ignore_eos": True})

    request = harness.start_many([ask()])
    harness.wait(lambda: len(harness.streams[name].token_ids) >= 10, "the first tokens")
    request.cancel()
    (stream,) = finished(harness, [name])
    assert stream.finish == "abort" and 10 <= len(stream.token_ids) < 3900


def test_a_request_that_the_scheduler_refuses_harms_no_other(harness: EngineHarness, publishing: Publishing) -> None:
    """SGLang runs a prompt that is too long for its pool for one token without a log-prob, then aborts it."""
    good, (refused,) = rids(4), rids(1)
    answers = harness.start_many([harness.generate(name, [3, 4, 5], 80) for name in good])
    harness.start_many([harness.generate(refused, [1] * 4090, 1)]).result(60)
    results = answers.result(60)
    for stream, answer in zip(finished(harness, good), results, strict=True):
        assert stream.token_ids == answer["output_ids"]
        assert len(stream.logprobs) == 80
    harness.wait(lambda: harness.streams[refused].finish == "abort", "the refused request's end")
    assert harness.streams[refused].token_ids == []


def test_pauses_are_counted_inside_the_server(harness: EngineHarness, publishing: Publishing) -> None:
    before = harness.fresh_stats().counters["pauses"]
    harness.call(harness.post("/pause_generation", mode="in_place"))
    version = publishing.publish()  # a paused engine still takes weights
    harness.call(harness.post("/continue_generation", torch_empty_cache=False))
    stats = harness.fresh_stats()
    assert stats.counters["pauses"] == before + 1
    assert stats.version == version


def test_requests_of_nobody_are_not_streamed(harness: EngineHarness, publishing: Publishing) -> None:
    seen = set(harness.streamed())
    harness.call(harness.generate("evaluation-1.", [1, 2, 3], 20))
    harness.call(harness.generate(None, [1, 2, 3], 20))
    assert set(harness.streamed()) == seen


def test_log_probs_equal_the_learners_untied(
    harness: EngineHarness, publishing: Publishing, tmp_path: pathlib.Path
) -> None:
    weights = marked_model.random_weights(77)
    publishing.publish(weights)
    directory = marked_model.write(tmp_path / "model", weights)
    learner = MegatronLearner(directory, Learner(optimizer={"lr": 1e-3}), 0)
    names = rids(8)
    prompts = [[1 + (7 * i + j) % 120 for j in range(3 + 9 * i)] for i in range(8)]
    harness.start_many([
        harness.generate(name, prompt, 30, temperature=0) for name, prompt in zip(names, prompts, strict=True)
    ]).result(60)  # fmt: skip
    streams = finished(harness, names)
    whole = [np.array(p + s.token_ids, np.int32) for p, s in zip(prompts, streams, strict=True)]
    for prompt, stream, logprobs in zip(prompts, streams, learner.logprobs(whole, 1.0), strict=True):
        assert logprob_gap(stream.logprobs, logprobs[len(prompt) :].tolist()) < 1e-4


def test_the_full_hash_of_the_live_weights_is_the_publishers(harness: EngineHarness, publishing: Publishing) -> None:
    weights = marked_model.random_weights(5)
    version = publishing.publish(weights)
    harness.learner_done(version)
    harness.wait(lambda: any(v.version == version for v in harness.verified), "the full recomputation")
    verified = next(v for v in harness.verified if v.version == version)
    assert verified.weights_hash == verified.expected == text(model_sum(weights.items()))


def test_nothing_went_wrong_inside_the_engine(harness: EngineHarness, publishing: Publishing) -> None:
    """Last of the module: what all tests before have left behind."""
    assert harness.fresh_stats().counters["faults"] == 0
    assert harness.problems["out of order"] == 0
    assert not any(report.anchor for report in harness.reports)
