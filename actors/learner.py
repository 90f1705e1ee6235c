"""The learner's loop: lease, step, apply, publish; and the next lease while the weights are on their way.

    python -m actors.learner RECIPE --run-id R --queue ADDRESS --publisher ADDRESS --ready-fd N

The only place where the training engine meets the algorithms: it hands the engine the loss function.  A learner that
was restarted (`--incarnation 2` and up) goes on from its newest checkpoint, in a new history.  One that is done stays
until it is stopped, to hand its last version to a publisher that is restarted.
"""

import argparse
import asyncio
import logging
import math
import os
import pathlib
import time
from typing import Any

from actors.batches import training_batch
from actors.hand_over import HandOver, anchor_parts
from algorithms.losses import make_loss
from engines.megatron import resume
from engines.megatron.checkpoint import sweep
from engines.megatron.found import Changes
from engines.megatron.learner import MegatronLearner
from engines.weights import fingerprint
from engines.weights.codes import payload
from engines.weights.parts import Line
from stream_rl import config, runtime
from stream_rl.errors import WeightsError
from stream_rl.messages import Applied, Committed, Done, Hello, LearnerDone, Lease, LeaseRequest, UpdatePart
from stream_rl.metrics import JsonLines
from stream_rl.session import Session
from stream_rl.transport import Dealer
from stream_rl.types import TrainingBatch, Version

log = logging.getLogger(__name__)
NAME = "learner-0"


class LearnerLoop:
    """What the learner does from its first version to the last."""

    def __init__(
        self,
        recipe: config.Recipe,
        run: str,
        session: Session,
        publisher: Dealer,
        engine: MegatronLearner,
        first: Version,
        saved: bool,
    ) -> None:
        """first: what the engine's weights are.  saved: a checkpoint holds them."""
        self._recipe, self._run, self._first, self._saved = recipe, run, first, saved
        self._session, self._engine = session, engine
        self._version = first
        """What the engine's weights are, while nobody holds `_weights`."""
        self._weights = asyncio.Lock()
        """Held while they change, until the queue knows the version that they have become."""
        self.hand_over = HandOver(publisher, run, recipe.weights, recipe.supervise, self._anchor)
        self._loss = make_loss(recipe.algorithm.loss, recipe.algorithm)
        self._log = append_lines(recipe.run_directory / "learner.jsonl")
        self._settled = 0.0
        """When the last step ended, or the first lease came: waiting for engines to start is not idleness."""

    async def train(self) -> None:
        """Consumes: leases.  Waits for: the queue to fill one.  Produces: steps, versions, checkpoints.
        Unblocked by: engines and rewards, through the queue."""
        recipe, version = self._recipe, self._first
        self._engine.watch_changes()
        if version.history:
            # opens the history, before anyone can hold a version of it; and the former learner may have died between
            # writing this checkpoint and saying so
            await self._session.request(Committed(step=version), Done)
        self.hand_over.begin(version)
        patience = recipe.queue.lease_timeout_s + recipe.engine.start_timeout_s  # the first lease waits for engines too
        while version.step < recipe.run.steps:
            version = await self._step(version, patience)
            patience = recipe.queue.lease_timeout_s
            every = recipe.learner.checkpoint_every
            if every and version.step % every == 0 and version.step < recipe.run.steps:
                directory = await self._checkpoint(version)
                await asyncio.to_thread(resume.retire, directory.parent, version.step)
        if not (self._saved and version == self._first):
            await self._checkpoint(version)
        weights_sum = await asyncio.to_thread(fingerprint.model_sum, self._engine.named_weights())
        done = LearnerDone(final=version, weights_hash=fingerprint.text(weights_sum))
        await self.hand_over.finish(done)
        await self._session.request(done, Done)
        log.info("done at version %s", version)

    async def listen(self) -> None:
        """Consumes: what the queue says unasked.  Only a Welcome after its restart can be that, and the session has
        done what that takes."""
        while True:
            log.info("the queue says %r", await self._session.receive())

    async def _step(self, version: Version, patience: float) -> Version:
        """Lease, step, log, apply, hand over.  Returns the next version."""
        recipe = self._recipe
        asked = time.perf_counter()
        lease = await self._session.request(LeaseRequest(step=version), Lease, patience)
        leased = time.perf_counter()
        self._settled = self._settled or leased
        batch = training_batch(lease, recipe.algorithm, recipe.rollout.temperature)
        async with self._weights:
            metrics, changes = await asyncio.to_thread(self._train, batch)
            trained = time.perf_counter()
            outcome = "skipped" if metrics.get("skipped") else "trained"
            self._log.write(log_line(lease, outcome))
            metrics |= {
                "wait_seconds": leased - asked,
                "busy_seconds": trained - leased,
                "wall_seconds": trained - self._settled,
                "tokens": float(len(lease.token_ids)),
                "trained_tokens": float(lease.trainable.sum()),
            }
            self._settled = trained
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            # the queue must know that a version exists before an engine can sample with it
            await self._session.request(Applied(step=version, outcome=outcome, metrics=metrics), Done)
            self._version = version = Version(version.history, version.step + 1)
        await self.hand_over.put(version, changes.pieces)
        return version

    def _train(self, batch: TrainingBatch) -> tuple[dict[str, float], Changes]:
        metrics = self._engine.train_step(batch, self._loss)
        changes = self._engine.take_changes()
        publishing = {"publish_seconds": changes.seconds, "changed_share": changes.share}
        return metrics | publishing, changes

    async def _anchor(self) -> tuple[Version, list[UpdatePart]]:
        """All weights, between two steps."""
        async with self._weights:
            version, part_bytes = self._version, self._recipe.weights.part_bytes
            line = Line(self._run, version, version, True)
            return version, await asyncio.to_thread(anchor_parts, self._engine.all_pieces(), line, part_bytes)

    async def _checkpoint(self, version: Version) -> pathlib.Path:
        directory = checkpoint_directory(self._recipe, version)
        await asyncio.to_thread(self._engine.save_checkpoint, directory, version, self._run)
        await self._session.request(Committed(step=version), Done)
        return directory


def log_line(lease: Lease, outcome: str) -> dict[str, Any]:
    """A step taken, for learner.jsonl: who was trained on, one group and member for each trajectory."""
    return {
        "history": lease.step.history,
        "step": lease.step.step,
        "outcome": outcome,
        "groups": lease.groups.tolist(),
        "members": lease.members.tolist(),
        "trained_tokens": int(lease.trainable.sum()) if outcome == "trained" else 0,
        "wall": time.time(),
    }


def append_lines(path: pathlib.Path) -> JsonLines:
    """Go on with a log: what a killed learner left of a line stays a line of its own."""
    with path.open("ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read() != b"\n":
                file.write(b"\n")
    return JsonLines(path)


def checkpoint_directory(recipe: config.Recipe, version: Version) -> pathlib.Path:
    """Where the checkpoint of a version lies: the last step's is `final`."""
    name = "final" if version.step == recipe.run.steps else resume.directory_name(version.step)
    return recipe.run_directory / "checkpoints" / name


def recover(engine: MegatronLearner, checkpoints: pathlib.Path, run: str) -> Version | None:
    """Make `engine` what the newest whole checkpoint holds; its version, None if there is none."""
    sweep(checkpoints)
    for directory in resume.newest_first(checkpoints, run):
        try:
            version = engine.load_checkpoint(directory)
        except WeightsError as error:
            log.error("%s; trying the one before it", error)
        else:
            log.info("going on from %s, version %s", directory, version)
            return version
    log.warning("no checkpoint to go on from in %s; beginning again", checkpoints)
    return None


async def main(options: argparse.Namespace) -> None:
    recipe, incarnation = config.load(options.recipe), options.incarnation
    engine = await asyncio.to_thread(MegatronLearner, recipe.model.path, recipe.learner, recipe.run.seed)
    await asyncio.to_thread(payload.prepare)
    saved = None
    if incarnation > 1:
        checkpoints = recipe.run_directory / "checkpoints"
        saved = await asyncio.to_thread(recover, engine, checkpoints, options.run_id)
    async with (
        Dealer.connect(options.queue, f"{NAME}@{incarnation}") as queue,
        Dealer.connect(options.publisher, f"{NAME}@{incarnation}") as publisher,
    ):
        hello = Hello(run=options.run_id, role="learner", name=NAME, incarnation=incarnation, pid=os.getpid())
        session = Session(queue, hello, recipe.supervise)
        welcome = await session.start()
        history = welcome.version.history + 1 if incarnation > 1 else 0
        first = Version(history, saved.step if saved else 0)
        loop = LearnerLoop(recipe, options.run_id, session, publisher, engine, first, saved is not None)
        runtime.report_ready(options.ready_fd)
        await runtime.supervise(
            session=session.run(), listen=loop.listen(), train=loop.train(), publish=loop.hand_over.run()
        )


if __name__ == "__main__":
    runtime.execute("learner", main, runtime.arguments(__doc__, "queue", "publisher").parse_args())
