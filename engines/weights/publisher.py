"""The publisher process: takes snapshots from the learner, keeps one host copy, brings every engine up to date.

    python -m engines.weights.publisher RECIPE --run-id R --queue ADDRESS --ready-fd N

The decisions are `Chain`'s (what an update is) and `Delivery`'s (who gets which when); this is the shell around them.
"""

import argparse
import asyncio
import os
import time
from typing import Any

import torch

from engines.weights.chain import Chain, snapshot_tensors
from engines.weights.delivery import Delivery, Outgoing
from stream_rl import config, runtime
from stream_rl.errors import StreamRLError
from stream_rl.messages import (
    EngineHello,
    HashReport,
    Hello,
    LearnerDone,
    Live,
    Refused,
    Snapshot,
    SnapshotTaken,
    Staged,
)
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

NAME = "publisher-0"


class Publisher:
    """The shell around `Chain` and `Delivery`: one loop over the messages of the learner and the engines."""

    def __init__(self, recipe: config.Recipe, run: str, router: Router, queue: Dealer) -> None:
        self._run, self._router, self._queue = run, router, queue
        self._chain = Chain(run, recipe.weights.part_bytes, recipe.weights.keep_deltas)
        self._delivery = Delivery(run, self._chain, recipe.weights.verify_every, time.monotonic)
        self._incoming: dict[int, Snapshot] = {}
        self._incoming_version: Version | None = None

    async def serve(self) -> None:
        """Consumes: messages to the router.  Waits for: the next one.  Produces: updates for the engines, reports for
        the queue.  Unblocked by: learner and engines."""
        while True:
            peer, message = await self._router.receive()
            match message:
                case Snapshot():
                    await self._send(await self._snapshot(peer, message))
                case LearnerDone():
                    self._delivery.final = message.final
                    await self._send(self._delivery.advance())
                case EngineHello() | Staged() | Live() | HashReport():
                    await self._send(self._delivery.handle(peer, message))
                case _:
                    detail = f"the publisher has no use for a {type(message).__name__}"
                    await self._router.send(peer, Refused(reason="unexpected", detail=detail))
            for report in self._delivery.reports:
                await self._queue.send(report)
            self._delivery.reports.clear()

    async def _snapshot(self, peer: bytes, part: Snapshot) -> Outgoing:
        if part.run != self._run:
            detail = f"this publisher serves run {self._run!r}, the snapshot is of {part.run!r}"
            return [(peer, Refused(reason="other_run", detail=detail))]
        if not 0 <= part.part < part.parts:
            return [(peer, Refused(reason="bad_part", detail=f"part {part.part} of {part.parts}"))]
        if part.version != self._incoming_version:
            self._incoming, self._incoming_version = {}, part.version
        self._incoming[part.part] = part
        if len(self._incoming) < part.parts:
            return []
        parts = [self._incoming[i] for i in range(part.parts)]
        self._incoming, self._incoming_version = {}, None
        await self._router.send(peer, SnapshotTaken(version=part.version))
        await asyncio.to_thread(self._advance, parts)
        return self._delivery.advance()

    def _advance(self, parts: list[Snapshot]) -> None:
        tensors: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
        for part in parts:
            tensors |= snapshot_tensors(part)
        self._chain.advance(parts[0].version, tensors)

    async def _send(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if not await self._router.send(peer, message):
                self._delivery.unreachable(peer)


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    recipe = config.load(options.recipe)
    async with (
        Router.bind("tcp://127.0.0.1:0") as router,
        Dealer.connect(options.queue, f"{NAME}@{options.incarnation}") as queue,
    ):
        await queue.send(
            Hello(
                run=options.run_id,
                role="publisher",
                name=NAME,
                incarnation=options.incarnation,
                pid=os.getpid(),
                address=router.address,
            )
        )
        publisher = Publisher(recipe, options.run_id, router, queue)
        runtime.report_ready(options.ready_fd, address=router.address)

        async def listen() -> None:
            """Consumes: what the queue says.  It only ever refuses, and that ends this process by name."""
            while True:
                message: Any = await queue.receive()
                if isinstance(message, Refused):
                    raise StreamRLError(f"the queue refused the publisher: {message.reason}: {message.detail}")

        await runtime.supervise(serve=publisher.serve(), listen=listen())


if __name__ == "__main__":
    runtime.execute("publisher", main, runtime.arguments(__doc__, "queue").parse_args())
