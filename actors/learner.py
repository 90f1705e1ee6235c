"""The learner's loop: lease, step, apply, publish; and the next lease while the weights are on their way.

    python -m actors.learner RECIPE --run-id R --queue ADDRESS --publisher ADDRESS --ready-fd N

The only place where the training engine meets the algorithms: it hands the engine the loss function.
"""

import argparse
import asyncio
import logging
import math
import os
import pathlib
import time

import numpy as np

from algorithms.advantages import get_advantage
from algorithms.denominators import TokenKinds, loss_weights
from algorithms.losses import make_loss
from engines.megatron.learner import MegatronLearner
from engines.weights import fingerprint
from engines.weights.chain import snapshot_parts
from stream_rl import config, runtime
from stream_rl.errors import WireError
from stream_rl.messages import (
    Applied,
    Committed,
    Done,
    Hello,
    LearnerDone,
    Lease,
    LeaseRequest,
    Snapshot,
    SnapshotTaken,
    Welcome,
)
from stream_rl.transport import Dealer
from stream_rl.types import TrainingBatch, Version

log = logging.getLogger(__name__)
NAME = "learner-0"
SNAPSHOTS_AHEAD = 1
"""Versions that may wait for the publisher while the learner trains on.  Each is a full copy of the weights; with
one waiting and one being sent the learner never waits for a publisher that keeps up."""


def training_batch(lease: Lease, algorithm: config.Algorithm, max_token_age: int, temperature: float) -> TrainingBatch:
    """A lease with its advantages and loss weights.

    Raises WireError if the queue broke its contract: an age beyond the bound on a trainable token, an age that its
    version does not give, a trainable token that was not sampled.
    """
    sampled, trainable = lease.sampled.astype(bool), lease.trainable.astype(bool)
    # a token of this history has exactly this age; one of a dead history counts from the fork and can only be older
    same_history = sampled & (lease.histories == lease.step.history)
    wrong = same_history & (lease.ages != lease.step.step - lease.steps)
    if wrong.any() or (lease.ages < 0).any() or (trainable & ~sampled).any():
        raise WireError(
            "lease_ages", f"lease of step {lease.step} has tokens whose age does not follow from its version"
        )
    if max_token_age >= 0 and (lease.ages[trainable] > max_token_age).any():
        oldest = int(lease.ages[trainable].max())
        raise WireError("lease_too_old", f"lease of step {lease.step} trains a token of age {oldest} > {max_token_age}")
    of_sequence = np.repeat(np.arange(len(lease.lengths)), lease.lengths)
    advantage_S = get_advantage(algorithm.advantage)(lease.rewards, lease.groups)
    kinds = TokenKinds(lengths=lease.lengths, sampled=sampled, trainable=trainable)
    return TrainingBatch(
        token_ids=lease.token_ids,
        lengths=lease.lengths,
        behavior_logprobs=np.where(sampled, lease.logprobs, np.float32(0)),
        advantages=np.where(sampled, advantage_S[of_sequence], 0).astype(np.float32),
        loss_weights=loss_weights(algorithm.aggregation, kinds, algorithm.constant),
        temperature=temperature,
    )


class LearnerLoop:
    """The two loops of a learner process."""

    def __init__(
        self, recipe: config.Recipe, run: str, queue: Dealer, publisher: Dealer, engine: MegatronLearner
    ) -> None:
        self._recipe, self._run = recipe, run
        self._queue, self._publisher, self._engine = queue, publisher, engine
        self._loss = make_loss(recipe.algorithm.loss, recipe.algorithm)
        self._outgoing: asyncio.Queue[list[Snapshot] | LearnerDone] = asyncio.Queue(SNAPSHOTS_AHEAD)

    async def train(self) -> None:
        """Consumes: leases.  Waits for: the queue to fill one.  Produces: steps, versions, the final checkpoint.
        Unblocked by: engines and rewards, through the queue."""
        recipe, timeout = self._recipe, self._recipe.supervise.peer_timeout_s
        version = Version(0, 0)
        await self._hand_over(version)
        waited, busy, settled = 0.0, 0.0, 0.0
        patience = recipe.queue.lease_timeout_s + recipe.engine.start_timeout_s  # the first lease waits for engines too
        for step in range(recipe.run.steps):
            version = Version(0, step)
            asked = time.perf_counter()
            lease = await self._queue.request(LeaseRequest(step=version), Lease, patience)
            patience = recipe.queue.lease_timeout_s
            leased = time.perf_counter()
            waited += leased - asked
            settled = settled or leased  # waiting for engines to start is not idleness
            batch = training_batch(lease, recipe.algorithm, recipe.queue.max_token_age, recipe.rollout.temperature)
            metrics = await asyncio.to_thread(self._engine.train_step, batch, self._loss)
            trained = time.perf_counter()
            busy += trained - leased
            metrics |= {
                "wait_seconds": leased - asked,
                "busy_seconds": trained - leased,
                "wall_seconds": trained - settled,
                "tokens": float(len(lease.token_ids)),
                "trained_tokens": float(lease.trainable.sum()),
            }
            settled = trained
            outcome = "skipped" if metrics.get("skipped") else "trained"
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            # the queue must know that a version exists before an engine can sample with it
            await self._queue.request(Applied(step=version, outcome=outcome, metrics=metrics), Done, timeout)
            version = Version(0, step + 1)
            await self._hand_over(version)
            every = recipe.learner.checkpoint_every
            if every and (step + 1) % every == 0 and step + 1 < recipe.run.steps:
                await self._checkpoint(version)
        await self._checkpoint(version)
        weights_hash = fingerprint.text(fingerprint.model_sum(self._engine.named_weights()))
        done = LearnerDone(final=version, weights_hash=weights_hash)
        await self._outgoing.put(done)
        await self._queue.request(done, Done, timeout)
        await self._outgoing.join()
        log.info("took %d steps; waited %.1f s for leases, computed %.1f s", recipe.run.steps, waited, busy)

    async def publish(self) -> None:
        """Consumes: snapshots.  Waits for: the next one, and the publisher's acknowledgement.  Produces: versions.
        Unblocked by: `train`, the publisher."""
        while True:
            item = await self._outgoing.get()
            if isinstance(item, LearnerDone):
                await self._publisher.send(item)
            else:
                for part in item[:-1]:
                    await self._publisher.send(part)
                await self._publisher.request(item[-1], SnapshotTaken, self._recipe.supervise.peer_timeout_s)
            self._outgoing.task_done()

    async def _hand_over(self, version: Version) -> None:
        """Copy the weights now, send them while the next step runs."""
        parts = snapshot_parts(self._run, version, self._engine.named_weights(), self._recipe.weights.part_bytes)
        await self._outgoing.put(parts)

    async def _checkpoint(self, version: Version) -> None:
        directory = checkpoint_directory(self._recipe, version)
        await asyncio.to_thread(self._engine.save, directory)
        await self._queue.request(Committed(step=version), Done, self._recipe.supervise.peer_timeout_s)


def checkpoint_directory(recipe: config.Recipe, version: Version) -> pathlib.Path:
    """Where the checkpoint of a version lies: the last step's is `final`."""
    name = "final" if version.step == recipe.run.steps else f"step-{version.step}"
    return recipe.run_directory / "checkpoints" / name


async def main(options: argparse.Namespace) -> None:
    recipe = config.load(options.recipe)
    engine = await asyncio.to_thread(MegatronLearner, recipe.model.path, recipe.learner, recipe.run.seed)
    async with (
        Dealer.connect(options.queue, f"{NAME}@{options.incarnation}") as queue,
        Dealer.connect(options.publisher, f"{NAME}@{options.incarnation}") as publisher,
    ):
        hello = Hello(run=options.run_id, role="learner", name=NAME, incarnation=options.incarnation, pid=os.getpid())
        await queue.request(hello, Welcome, recipe.supervise.peer_timeout_s)
        loop = LearnerLoop(recipe, options.run_id, queue, publisher, engine)
        runtime.report_ready(options.ready_fd)
        await runtime.supervise(train=loop.train(), publish=loop.publish())


if __name__ == "__main__":
    runtime.execute("learner", main, runtime.arguments(__doc__, "queue", "publisher").parse_args())
