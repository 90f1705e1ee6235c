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
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors import leases
from actors.checkpoints import Checkpoints, recover
from actors.hand_over import HandOver, anchor_parts
from actors.scoring import NOTHING_BESIDE, Beside
from actors.together import together
from actors.training import Training, models_beside
from engines.megatron.found import Changes
from engines.megatron.learner import MegatronLearner
from engines.weights import fingerprint
from engines.weights.codes import payload
from engines.weights.parts import Line
from stream_rl import config, runtime
from stream_rl.errors import WouldOnlyRepeat
from stream_rl.messages import Applied, Committed, Done, Hello, LearnerDone, Lease, LeaseRequest, UpdatePart
from stream_rl.metrics import JsonLines
from stream_rl.session import Session
from stream_rl.transport import Dealer
from stream_rl.types import Version

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
        beside: Beside = NOTHING_BESIDE,
    ) -> None:
        """first: what the engine's weights are.  saved: a checkpoint holds them.  beside: the models that the recipe
        asks."""
        self._recipe, self._run, self._first, self._saved = recipe, run, first, saved
        self._session, self._engine = session, engine
        self._version = first
        """What the engine's weights are, while nobody holds `_weights`."""
        self._weights = asyncio.Lock()
        """Held while they change, until the queue knows the version that they have become."""
        self.hand_over = HandOver(publisher, run, recipe.weights, recipe.supervise, self._anchor)
        self._training = Training(recipe, run, engine, beside)
        self._checkpoints = Checkpoints(recipe, run, session, engine, beside)
        self._log = JsonLines(recipe.run_directory / "learner.jsonl")
        self._skipped: list[Version] = []
        """Steps that were, in a row."""
        self._settled = 0.0
        """When the last step ended, or the first lease came: waiting for engines to start is not idleness."""
        self._began = math.inf
        """When the first lease came."""

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
        async with asyncio.TaskGroup() as saving:
            while version.step < recipe.run.steps and not self._is_time_up():
                version = await self._step(version, patience)
                patience = recipe.queue.lease_timeout_s
                every = recipe.learner.checkpoint_every
                over = version.step >= recipe.run.steps or self._is_time_up()
                if every and version.step % every == 0 and not over:
                    await self._checkpoint(saving, version)
            if not (self._saved and version == self._first):
                await self._checkpoint(saving, version, last=True)
            await self._checkpoints.durable()
        async with self._weights:
            weights_sum = await asyncio.to_thread(fingerprint.model_sum, self._engine.named_weights())
        done = LearnerDone(final=version, weights_hash=fingerprint.text(weights_sum))
        await self.hand_over.finish(done)
        await self._session.request(done, Done)
        log.info("done at version %s", version)

    async def _checkpoint(self, saving: asyncio.TaskGroup, version: Version, last: bool = False) -> None:
        await self._checkpoints.durable()  # while anchors may be taken
        async with self._weights:
            await self._checkpoints.begin(saving, version, last)

    async def listen(self) -> None:
        """Consumes: what the queue says unasked.  Only a Welcome after its restart can be that, and the session has
        done what that takes."""
        while True:
            log.info("the queue says %r", await self._session.receive())

    async def _step(self, version: Version, patience: float) -> Version:
        """Lease, step, log, apply, hand over.  Returns the next version."""
        asked = time.perf_counter()
        lease = await self._session.request(LeaseRequest(step=version), Lease, patience)
        leased = time.perf_counter()
        self._settled, self._began = self._settled or leased, min(self._began, leased)
        async with self._weights:
            metrics, changes = await asyncio.to_thread(self._train, lease)
            trained = time.perf_counter()
            outcome = "skipped" if metrics.get("skipped") else "trained"
            self._log.write(log_line(lease, outcome, metrics))
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
        self._notice_skips(lease.step, outcome)
        return version

    def _is_time_up(self) -> bool:
        return 0 < self._recipe.run.seconds <= time.perf_counter() - self._began

    def _train(self, lease: Lease) -> tuple[dict[str, float], Changes]:
        """Do with a lease what learner.leases says."""
        if self._recipe.learner.leases != "train":
            kept = leases.write(self._recipe.run_directory / leases.DIRECTORY, lease)
        if self._recipe.learner.leases == "only_record":
            return {"skipped": 1.0}, Changes(())
        if self._recipe.learner.leases == "record":
            sequences = np.split(lease.token_ids, np.cumsum(lease.lengths)[:-1])
            own = self._engine.logprobs(sequences, self._recipe.rollout.temperature)
            leases.write_logprobs(kept, np.concatenate(own))
        metrics = self._training.step(lease)
        changes = self._engine.take_changes()
        publishing = {"publish_seconds": changes.seconds, "changed_share": changes.share}
        return metrics | publishing, changes

    def _notice_skips(self, step: Version, outcome: str) -> None:
        """Raises WouldOnlyRepeat when learner.max_skipped_steps have been skipped in a row."""
        section = self._recipe.learner
        most = 0 if section.leases == "only_record" else section.max_skipped_steps
        self._skipped = [*self._skipped, step] if outcome == "skipped" and most else []
        if most and len(self._skipped) == most:
            raise WouldOnlyRepeat(
                f"the last {most} steps, {self._skipped[0]} to {step}, were skipped (learner.max_skipped_steps): their "
                f"loss or gradient was not finite, or nothing in them was to be trained.  The weights are still those "
                f"of step {self._skipped[0]}; `stream-rl learner capsule` says of what is kept in "
                f"{self._recipe.run_directory}/capsules which tokens are to blame"
            )

    async def _anchor(self) -> tuple[Version, list[UpdatePart]]:
        """All weights, between two steps."""
        async with self._weights:
            version, part_bytes = self._version, self._recipe.weights.part_bytes
            line = Line(self._run, version, version, True)
            return version, await asyncio.to_thread(anchor_parts, self._engine.all_pieces(), line, part_bytes)


def log_line(lease: Lease, outcome: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A step taken, for learner.jsonl: who was trained on, one group and member for each trajectory, and what a replay
    must come to."""
    return {
        "history": lease.step.history,
        "step": lease.step.step,
        "outcome": outcome,
        "groups": lease.groups.tolist(),
        "members": lease.members.tolist(),
        "trained_tokens": int(lease.trainable.sum()) if outcome == "trained" else 0,
        "loss": metrics.get("loss"),
        "gradient_norm": metrics.get("gradient_norm"),
        "wall": time.time(),
    }


async def main(options: argparse.Namespace) -> None:
    recipe = config.load(options.recipe)
    engine = await asyncio.to_thread(MegatronLearner, recipe.model.path, recipe.learner, recipe.run.seed)
    beside = await asyncio.to_thread(models_beside, recipe)
    with together(recipe, engine, beside) as leading:
        if leading is not None:
            await lead(options, recipe, *leading)


async def lead(options: argparse.Namespace, recipe: config.Recipe, engine: MegatronLearner, beside: Beside) -> None:
    """Of the learner's processes the one that talks to the queue and the publisher."""
    incarnation = options.incarnation
    await asyncio.to_thread(payload.prepare)
    saved = None
    if incarnation > 1:
        checkpoints = recipe.run_directory / "checkpoints"
        saved = await asyncio.to_thread(recover, engine, checkpoints, options.run_id, beside)
    async with (
        Dealer.connect(options.queue, f"{NAME}@{incarnation}") as queue,
        Dealer.connect(options.publisher, f"{NAME}@{incarnation}") as publisher,
    ):
        hello = Hello(run=options.run_id, role="learner", name=NAME, incarnation=incarnation, pid=os.getpid())
        session = Session(queue, hello, recipe.supervise)
        welcome = await session.start()
        history = welcome.version.history + 1 if incarnation > 1 else 0
        first = Version(history, saved.step if saved else 0)
        loop = LearnerLoop(recipe, options.run_id, session, publisher, engine, first, saved is not None, beside)
        runtime.report_ready(options.ready_fd)
        await runtime.supervise(
            session=session.run(), listen=loop.listen(), train=loop.train(), publish=loop.hand_over.run()
        )


if __name__ == "__main__":
    runtime.execute("learner", main, runtime.arguments(__doc__, "queue", "publisher").parse_args())
