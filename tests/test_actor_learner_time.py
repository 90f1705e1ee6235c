"""`run.seconds`: a learner whose time is up takes no further step, and its last checkpoint is the final one."""

import dataclasses
import pathlib

import pytest
from learner_peers import Around, run

from actors import learner
from stream_rl import config


def test_a_run_whose_time_is_up_ends_as_one_that_has_taken_all_of_its_steps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = config.load

    def limited(path: pathlib.Path) -> config.Recipe:
        recipe = load(path)
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seconds=1e-9))

    monkeypatch.setattr(learner.config, "load", limited)

    async def test() -> None:
        async with Around(tmp_path) as around, around.learner():
            done = await around.until_done()
            assert done.final == (0, 1), "the step that was under way is taken"
            assert [path.name for path in around.checkpoints.iterdir()] == ["final"]
            assert "Committed 0.1" in around.queue.said()

    run(test())
