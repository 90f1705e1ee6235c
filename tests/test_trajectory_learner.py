"""With learner.leases = "record" the learner keeps what it finds of each token before its step, for the gap."""

import pathlib

import numpy as np
from learner_peers import STEPS, Around, make_lease, run

from actors import leases
from engines.megatron.learner import MegatronLearner
from stream_rl.types import Version


def test_the_log_probs_beside_a_lease_are_those_of_the_weights_before_its_step(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with Around(tmp_path, leases="record") as around:
            async with around.learner():
                await around.until_done()
            kept = [leases.path_of(around.recipe.run_directory / "leases", Version(0, step)) for step in range(STEPS)]
            found = [leases.read_logprobs(path) for path in kept]
            lease = make_lease(Version(0, 0))
            engine = MegatronLearner(around.recipe.model.path, around.recipe.learner, around.recipe.run.seed)
            expected = engine.logprobs(np.split(lease.token_ids, np.cumsum(lease.lengths)[:-1]), 1.0)
            assert found[0] is not None and np.array_equal(found[0], np.concatenate(expected))
            for path, own in zip(kept, found, strict=True):
                assert own is not None and own.shape == leases.read(path).token_ids.shape and own.dtype == np.float32
            assert leases.surviving(kept[0].parent) == kept, "they are no leases"

    run(test())


def test_without_recording_nothing_is_kept(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            async with around.learner():
                await around.until_done()
            assert not (around.recipe.run_directory / "leases").exists()

    run(test())
