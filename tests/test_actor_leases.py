"""What the learner takes for a lease, and what it writes down of it."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from learner_peers import Around, make_lease, run

from actors import batches
from stream_rl import config
from stream_rl import messages as m
from stream_rl.errors import WireError
from stream_rl.types import Version


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_lease_of_masked_tokens_alone_is_a_skipped_step(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            masked = np.zeros(int(make_lease(Version(0, 1)).lengths.sum()), np.uint8)
            around.queue.changes[1] = {"trainable": masked}
            async with around.learner():
                done = await around.until_done()
            applied = around.queue.each(m.Applied)
            assert [a.outcome for a in applied] == ["trained", "skipped", "trained", "trained", "trained"]
            assert applied[1].metrics["trained_tokens"] == 0
            hashes = around.publisher.hashes
            assert hashes[Version(0, 1)] == hashes[Version(0, 2)] != hashes[Version(0, 3)]
            assert done.final == (0, 5)
            lines = (around.recipe.run_directory / "learner.jsonl").read_text().splitlines()
            first, second = map(json.loads, lines[:2])
            assert second | {"wall": 0} == {
                "history": 0, "step": 1, "outcome": "skipped", "groups": [17, 17, 19, 19], "members": [0, 1, 0, 1],
                "trained_tokens": 0, "loss": None, "gradient_norm": None, "wall": 0,
            }  # fmt: skip
            assert first["trained_tokens"] == make_lease(Version(0, 0)).trainable.sum()

    run(test())


def batch_of(lease: m.Lease) -> Any:
    return batches.training_batch(lease, config.Algorithm(), 1.0)


def aged(step: Version, history: int, token_step: int, age: int) -> m.Lease:
    """All sampled tokens of one version and age."""
    sampled = make_lease(step).sampled.astype(np.int32)
    columns = {"histories": history, "steps": token_step, "ages": age}
    return make_lease(step, **{name: value * sampled for name, value in columns.items()})


def test_tokens_of_a_dead_history_come_with_the_age_from_the_fork() -> None:
    # history 1 forked at step 4; what history 0 sampled at its step 6 counts from there
    for token_step, age in ((6, 1), (4, 1), (3, 2)):
        assert batch_of(aged(Version(1, 5), 0, token_step, age)).loss_weights.sum() == pytest.approx(1.0)


def test_the_bound_is_each_trajectorys_own() -> None:
    lease = aged(Version(1, 5), 1, 2, 3)
    bounds = np.array([2, 3, -1, 3], np.int32)
    masked = lease.trainable.copy()
    masked[: lease.lengths[0]] = 0
    assert batch_of(dataclasses.replace(lease, max_token_ages=bounds, trainable=masked)).loss_weights.sum() > 0
    with pytest.raises(WireError, match="trains a token of age 3 > 2"):
        batch_of(dataclasses.replace(lease, max_token_ages=bounds))


@pytest.mark.parametrize(
    ("lease", "reason"),
    [
        (aged(Version(1, 5), 1, 4, 2), "lease_ages"),  # of this history, and not its age
        (aged(Version(1, 5), 0, 3, 1), "lease_ages"),  # younger than its version
        (aged(Version(1, 5), 2, 5, 0), "lease_ages"),  # of a history to come
        (aged(Version(1, 5), 1, 6, -1), "lease_ages"),
        (aged(Version(1, 5), 1, 2, 3), "lease_too_old"),
        (make_lease(Version(0, 0), trainable=np.ones(int(make_lease(Version(0, 0)).lengths.sum()), np.uint8)),
         "lease_ages"),
    ],
)  # fmt: skip
def test_a_lease_against_the_contract_is_refused(lease: m.Lease, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        batch_of(lease)
