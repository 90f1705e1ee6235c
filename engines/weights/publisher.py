"""The publisher process: takes snapshots from the learner, keeps one host copy, brings every engine up to date.

    python -m engines.weights.publisher RECIPE --run-id R --queue ADDRESS --bind ADDRESS --ready-fd N

The decisions are `Chain`'s (what an update is) and `Delivery`'s (who gets which when); this is the shell around them.
It keeps nothing on disk.  A restarted one asks the learner for its newest version and the engines for what they hold.
"""

import argparse
import asyncio
import logging
import os
import time

import torch

from engines.weights.chain import Chain, snapshot_tensors
from engines.weights.delivery import Delivery, Outgoing
from stream_rl import config, runtime
from stream_rl.errors import StreamRLError, WeightsError
from stream_rl.messages import (
    Alive,
    EngineHello,
    HashReport,
    Hello,
    LearnerDone,
    Live,
    Refused,
    Snapshot,
    SnapshotOffer,
    SnapshotTaken,
    SnapshotWanted,
    Staged,
    Welcome,
)
from stream_rl.session import Session
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

log = logging.getLogger(__name__)
NAME = "publisher-0"


class Publisher:
    """The shell around `Chain` and `Delivery`: one loop over the messages of the learner and the engines, one over
    those of the queue."""

    def __init__(self, recipe: config.Recipe, run: str, incarnation: int, router: Router, queue: Session) -> None:
        self._run, self._router, self._queue = run, router, queue
        weights, silence = recipe.weights, recipe.supervise.silence_timeout_s
        self._chain = Chain(run, weights.part_bytes, weights.keep_deltas)
        self._delivery = Delivery(run, incarnation, self._chain, weights.verify_every, silence, time.monotonic)
        self._incoming: dict[int, Snapshot] = {}
        self._incoming_version: Version | None = None

    async def serve(self) -> None:
        """Consumes: messages to the router.  Waits for: the next one.  Produces: updates for the engines, reports for
        the queue.  Unblocked by: learner and engines."""
        while True:
            peer, message = await self._router.receive()
            match message:
                case SnapshotOffer():
                    await self._send([self._offered(peer, message.version)])
                case Snapshot():
                    await self._send(await self._snapshot(peer, message))
                case LearnerDone():
                    await self._send(self._delivery.finish(message.final))
                case EngineHello() | Alive() | Staged() | Live() | HashReport():
                    await self._send(self._delivery.handle(peer, message))
                case _:
                    detail = f"the publisher has no use for a {type(message).__name__}"
                    await self._send([(peer, Refused(reason="unexpected", detail=detail))])
            for report in self._delivery.reports:
                await self._queue.send(report)
            self._delivery.reports.clear()

    async def listen(self) -> None:
        """Consumes: what the queue says.  Waits for: the next.  Produces: once more, to a queue that was restarted,
        what the end of the run hangs on.  Unblocked by: the queue."""
        while True:
            match message := await self._queue.receive():
                case Welcome():
                    for report in self._delivery.final_reports.values():
                        await self._queue.send(report)
                case Refused():
                    raise StreamRLError(f"the queue refused the publisher: {message.reason}: {message.detail}")
                case _:
                    log.warning("the queue sent a %s, which the publisher has no use for", type(message).__name__)

    def _offered(self, peer: bytes, version: Version) -> tuple[bytes, SnapshotTaken | SnapshotWanted | Refused]:
        if self._chain.has(version):
            return peer, SnapshotTaken(version=version)
        return peer, self._old_history(version) or SnapshotWanted(version=version)

    async def _snapshot(self, peer: bytes, part: Snapshot) -> Outgoing:
        if part.run != self._run:
            detail = f"this publisher serves run {self._run!r}, the snapshot is of {part.run!r}"
            return [(peer, Refused(reason="other_run", detail=detail))]
        if not 0 <= part.part < part.parts:
            return [(peer, Refused(reason="bad_part", detail=f"part {part.part} of {part.parts}"))]
        if refused := self._old_history(part.version):
            return [(peer, refused)]
        if self._chain.has(part.version):  # sent again by a learner that did not hear the answer
            return [(peer, SnapshotTaken(version=part.version))] if part.part == part.parts - 1 else []
        if part.version != self._incoming_version:
            self._incoming, self._incoming_version = {}, part.version
        self._incoming[part.part] = part
        if len(self._incoming) < part.parts:
            return []
        parts = [self._incoming[i] for i in range(part.parts)]
        self._incoming, self._incoming_version = {}, None
        try:
            tensors = await asyncio.to_thread(_tensors, parts)
            self._chain.check(part.version, tensors)
        except WeightsError as error:
            return [(peer, Refused(reason="bad_snapshot", detail=str(error)))]
        # it is in our hands: the learner need not wait for the difference to be found
        await self._send([(peer, SnapshotTaken(version=part.version))])
        await asyncio.to_thread(self._chain.advance, part.version, tensors)
        return self._delivery.advance()

    def _old_history(self, version: Version) -> Refused | None:
        """The answer to a learner that another one has taken the place of."""
        newest = self._chain.version if self._incoming_version is None else self._incoming_version
        if newest is None or version.history >= newest.history:
            return None
        detail = f"version {version} is of a line of training that has ended; the newest is {newest}"
        return Refused(reason="old_history", detail=detail)

    async def _send(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if not await self._router.send(peer, message):
                self._delivery.unreachable(peer)


def _tensors(parts: list[Snapshot]) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    tensors: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
    for part in parts:
        tensors |= snapshot_tensors(part)
    return tensors


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    recipe = config.load(options.recipe)
    async with (
        Router.bind(options.bind) as router,
        Dealer.connect(options.queue, f"{NAME}@{options.incarnation}") as dealer,
    ):
        hello = Hello(
            run=options.run_id,
            role="publisher",
            name=NAME,
            incarnation=options.incarnation,
            pid=os.getpid(),
            address=router.address,
        )
        queue = Session(dealer, hello, recipe.supervise)
        await queue.start()
        publisher = Publisher(recipe, options.run_id, options.incarnation, router, queue)
        runtime.report_ready(options.ready_fd, address=router.address)
        await runtime.supervise(serve=publisher.serve(), queue=queue.run(), listen=publisher.listen())


if __name__ == "__main__":
    parser = runtime.arguments(__doc__, "queue")
    parser.add_argument("--bind", default="tcp://127.0.0.1:0", metavar="ADDRESS", help="the same after a restart")
    runtime.execute("publisher", main, parser.parse_args())
