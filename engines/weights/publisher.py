"""The publisher's process: takes versions from the learner, keeps one host copy, brings every engine up to date.

    python -m engines.weights.publisher RECIPE --run-id R --queue ADDRESS --bind ADDRESS --ready-fd N

The decisions are `Chain`'s (what an update is) and `Delivery`'s (who gets which when); this is the shell around them.
It keeps nothing on disk.  A restarted one asks the learner for all weights and the engines for what they hold.
"""

import argparse
import asyncio
import logging
import os
import time
from collections import deque
from contextlib import AsyncExitStack

import torch

from engines.weights.chain import Chain
from engines.weights.codes import payload
from engines.weights.delivery import Delivery, Outgoing
from engines.weights.outbox import Outbox
from engines.weights.stock_fleet import StockFleet
from stream_rl import config, runtime
from stream_rl.errors import StreamRLError, WeightsError
from stream_rl.messages import (
    Alive,
    EngineHello,
    HashReport,
    Hello,
    LearnerDone,
    Live,
    PartTaken,
    Refused,
    UpdatePart,
    VersionOffer,
    VersionTaken,
    VersionWanted,
    Welcome,
)
from stream_rl.session import Session
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

log = logging.getLogger(__name__)
NAME = "publisher-0"


class Publisher:
    """The shell around `Chain` and `Delivery`: one loop over what learner and engines say, one in which versions are
    taken and updates prepared while the first goes on, one that reminds."""

    def __init__(self, recipe: config.Recipe, run: str, incarnation: int, router: Router, queue: Session) -> None:
        self._run, self._router, self._queue, self._supervise = run, router, queue, recipe.supervise
        weights, supervise = recipe.weights, recipe.supervise
        self._chain = Chain(run, weights.part_bytes, weights.keep_deltas)
        self._delivery = Delivery(
            run, incarnation, self._chain, weights, supervise.retry_s, supervise.silence_timeout_s, time.monotonic
        )
        self._outbox = Outbox.of(recipe, run)
        self._filed = asyncio.Event()
        self._fleet = StockFleet(recipe)
        self._reloads = weights.delivery == "reload"
        self._parts: dict[tuple[int, int], UpdatePart] = {}
        """Of the version that is coming, by source and number."""
        self._in_hand: Version | None = None
        """The newest version of which every part is here; it may not have been taken yet."""
        self._arrived: deque[tuple[bytes, list[UpdatePart]]] = deque()
        """At most two: the learner sends the next when it has heard VersionTaken."""
        self._work = asyncio.Event()

    async def run(self) -> None:
        """All loops of this process but the session's."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self.serve(), self.work(), self.remind(), self.listen(), self._fleet.run(self._queue.send)):
                tasks.create_task(loop)
            if self._outbox is not None:
                tasks.create_task(self.file(self._outbox))

    async def serve(self) -> None:
        """Consumes: messages to the router.  Waits for: the next one.  Produces: updates for the engines, reports for
        the queue.  Unblocked by: learner and engines."""
        while True:
            peer, message = await self._router.receive()
            match message:
                case VersionOffer():
                    await self._say([(peer, answer) for answer in self._offered(message)])
                case UpdatePart():
                    await self._say([(peer, answer) for answer in self._part(peer, message)])
                case LearnerDone():
                    await self._say(self._delivery.finish(message.final))
                case EngineHello() if message.run == self._run and self._reloads and message.rank == 0:
                    await self._fleet.serve(message.engine, message.address, message.incarnation)
                    await self._say(self._delivery.handle(peer, message))
                case EngineHello() | Alive() | PartTaken() | Live() | HashReport():
                    await self._say(self._delivery.handle(peer, message))
                case _:
                    detail = f"the publisher has no use for a {type(message).__name__}"
                    await self._say([(peer, Refused(reason="unexpected", detail=detail))])

    async def work(self) -> None:
        """Consumes: versions of which all parts are here, and wishes for updates.  Waits for: the next.  Produces:
        the chain's newest version, prepared updates.  Unblocked by: `serve`."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._arrived or self._delivery.wanted:
                if self._arrived:
                    await self._take(*self._arrived.popleft())
                else:
                    await asyncio.to_thread(self._chain.prepare, self._delivery.wanted.pop())
                    await self._say(self._delivery.advance())

    async def remind(self) -> None:
        """Consumes: time.  Waits for: half of supervise.retry_s.  Produces: what has had no answer, once more.
        Unblocked by: the clock."""
        while True:
            await asyncio.sleep(self._supervise.retry_s / 2)
            await self._say(self._delivery.remind())

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

    async def file(self, outbox: Outbox) -> None:
        """Consumes: files that wait to be written.  Waits for: the next.  Produces: the directory.  Unblocked by:
        `work`.  At the end it writes what still waits, if the process is given the time."""
        try:
            while True:
                await self._filed.wait()
                self._filed.clear()
                await asyncio.to_thread(outbox.flush)
        finally:
            await asyncio.to_thread(outbox.flush)

    # -- the learner's side ------------------------------------------------------------------------------------

    def _offered(self, offer: VersionOffer) -> list[VersionTaken | VersionWanted | Refused]:
        if self._chain.has(offer.target):
            return [VersionTaken(target=offer.target)]
        if (refused := self._old_history(offer.target)) is not None:
            return [refused]
        newest = self._newest()
        if newest is not None and newest.history == offer.target.history and offer.target <= newest:
            return []  # being read; the answer comes when that is done
        return [VersionWanted(target=offer.target, anchor=offer.base == offer.target or offer.base != newest)]

    def _part(self, peer: bytes, part: UpdatePart) -> list[VersionTaken | Refused]:
        if part.run != self._run:
            detail = f"this publisher serves run {self._run!r}, the update is of {part.run!r}"
            return [Refused(reason="other_run", detail=detail)]
        if not 0 <= part.part < part.parts or not 0 <= part.source < part.sources:
            return [Refused(reason="bad_part", detail=f"part {part.part} of {part.parts}, source {part.source}")]
        if (refused := self._old_history(part.target)) is not None:
            return [refused]
        if self._chain.has(part.target):  # sent again by a learner that did not hear the answer
            return [VersionTaken(target=part.target)] if part.part == part.parts - 1 else []
        if part.target == self._in_hand:
            return []
        if self._parts and _line(part) != _line(next(iter(self._parts.values()))):
            self._parts.clear()
        self._parts[part.source, part.part] = part
        counts = {source: each.parts for (source, _), each in self._parts.items()}
        if len(counts) == part.sources and len(self._parts) == sum(counts.values()):
            self._arrived.append((peer, [self._parts[key] for key in sorted(self._parts)]))
            self._in_hand = part.target
            self._parts.clear()
            self._work.set()
        return []

    async def _take(self, peer: bytes, parts: list[UpdatePart]) -> None:
        target = parts[0].target
        try:
            arrival = await asyncio.to_thread(self._chain.arrive, parts)
        except WeightsError as error:
            self._in_hand = None
            await self._say([(peer, Refused(reason="bad_update", detail=str(error)))])
            return
        # it is in our hands: the learner need not wait for the rest
        await self._say([(peer, VersionTaken(target=target))])
        await asyncio.to_thread(self._chain.take, arrival, self._outbox.write if self._outbox else None)
        await self._say(self._delivery.advance())
        if self._outbox is not None:
            await asyncio.to_thread(self._outbox.settle, self._chain)
            self._filed.set()
        await self._fleet.offer(self._chain)

    def _newest(self) -> Version | None:
        return self._in_hand or self._chain.version

    def _old_history(self, version: Version) -> Refused | None:
        """The answer to a learner that another one has taken the place of."""
        newest = self._newest()
        if newest is None or version.history >= newest.history:
            return None
        detail = f"version {version} is of a line of training that has ended; the newest is {newest}"
        return Refused(reason="old_history", detail=detail)

    async def _say(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if not await self._router.send(peer, message):
                self._delivery.unreachable(peer)
        reports, self._delivery.reports = self._delivery.reports, []
        for report in reports:
            await self._queue.send(report)
        if self._delivery.wanted:
            self._work.set()


def _line(part: UpdatePart) -> tuple[object, ...]:
    return part.base, part.target, part.anchor, part.sources


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    recipe = config.load(options.recipe)
    payload.prepare()
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(Router.bind(options.bind))
        dealer = await stack.enter_async_context(Dealer.connect(options.queue, f"{NAME}@{options.incarnation}"))
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
        await runtime.supervise(publisher=publisher.run(), queue=queue.run())


if __name__ == "__main__":
    parser = runtime.arguments(__doc__, "queue")
    parser.add_argument("--bind", default="tcp://127.0.0.1:0", metavar="ADDRESS", help="the same after a restart")
    runtime.execute("publisher", main, parser.parse_args())
