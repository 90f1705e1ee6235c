"""The learner's checkpoints: written beside training, one at a time, and said to the queue when they are durable."""

import asyncio
import logging
import pathlib

from actors.scoring import NOTHING_BESIDE, Beside
from engines.megatron import resume
from engines.megatron.checkpoint import sweep
from engines.megatron.learner import MegatronLearner
from engines.megatron.saving import Saving
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.messages import Committed, Done
from stream_rl.session import Session
from stream_rl.types import Version

log = logging.getLogger(__name__)
FINAL = "final"
"""The last step's checkpoint."""


class Checkpoints:
    """Of one life of a learner.  Each is written by a task of the caller's group, which a failure ends."""

    def __init__(
        self, recipe: config.Recipe, run: str, session: Session, engine: MegatronLearner, beside: Beside
    ) -> None:
        self._recipe, self._run, self._session = recipe, run, session
        self._engine, self._beside = engine, beside
        self._writing: asyncio.Task[None] | None = None

    async def begin(self, group: asyncio.TaskGroup, version: Version, last: bool = False) -> None:
        """Take a snapshot of what the engine is, as `version`, and have it written.  The one before it must be
        durable, and the weights must not change until this returns.

        last: no step comes after it, although `run.steps` were not taken.
        """
        directory = directory_of(self._recipe, version, last)
        saving = await asyncio.to_thread(
            self._engine.begin_checkpoint, directory, version, self._run, **self._beside.trained
        )
        self._writing = group.create_task(self._finish(saving, directory, version), name=f"checkpoint {version}")

    async def durable(self) -> None:
        """Return when the checkpoint that was begun last is durable, and the queue knows it."""
        if self._writing is not None:
            await self._writing

    async def _finish(self, saving: Saving, directory: pathlib.Path, version: Version) -> None:
        await asyncio.to_thread(saving.finish)
        await self._session.request(Committed(step=version), Done)
        if directory.name != FINAL:
            await asyncio.to_thread(resume.retire, directory.parent, version.step)


def directory_of(recipe: config.Recipe, version: Version, last: bool = False) -> pathlib.Path:
    """Where the checkpoint of a version lies."""
    name = FINAL if last or version.step >= recipe.run.steps else resume.directory_name(version.step)
    return recipe.run_directory / "checkpoints" / name


def recover(
    engine: MegatronLearner, checkpoints: pathlib.Path, run: str, beside: Beside = NOTHING_BESIDE
) -> Version | None:
    """Make `engine`, and what is trained beside it, what the newest whole checkpoint holds; its version, or None."""
    sweep(checkpoints)
    for directory in resume.newest_first(checkpoints, run):
        try:
            version = engine.load_checkpoint(directory, **beside.trained)
        except WeightsError as error:
            log.error("%s; trying the one before it", error)
        else:
            log.info("going on from %s, version %s", directory, version)
            return version
    log.warning("no checkpoint to go on from in %s; beginning again", checkpoints)
    return None
