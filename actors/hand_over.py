"""Handing the learner's versions to the publisher: each once, and the newest again to a publisher that was restarted.

Each second the newest version is offered: a publisher that has it says SnapshotTaken, one that was restarted
SnapshotWanted.  What travels on one connection keeps its order, so after the parts were sent a SnapshotWanted is the
late answer to an earlier offer.
"""

import asyncio
import contextlib
import logging
from typing import Any

from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import LearnerDone, Refused, Snapshot, SnapshotOffer, SnapshotTaken, SnapshotWanted
from stream_rl.transport import Dealer
from stream_rl.types import Version

log = logging.getLogger(__name__)
OFFER_SECONDS = 1.0
SNAPSHOTS_AHEAD = 1
"""Versions that may wait for the publisher while the learner trains on.  Each is a full copy of the weights; with one
waiting and the newest that was sent being kept, the learner never waits for a publisher that keeps up."""


class HandOver:
    """`put` versions as they come, `finish` after the last; `run` is one of the process's loops."""

    def __init__(self, publisher: Dealer, supervise: config.Supervise) -> None:
        self._publisher, self._supervise = publisher, supervise
        self._coming: asyncio.Queue[list[Snapshot] | LearnerDone] = asyncio.Queue(SNAPSHOTS_AHEAD)
        self._newest: list[Snapshot] = []
        """All parts of the newest version that was taken from `_coming`, kept for a publisher that asks again."""
        self._done: LearnerDone | None = None
        self._done_said = False
        """To the publisher that holds the newest version."""

    async def put(self, parts: list[Snapshot]) -> None:
        """The newest version, all of it.  Waits while the one before it waits."""
        await self._coming.put(parts)

    async def finish(self, done: LearnerDone) -> None:
        """There is no version after the one that was put last."""
        await self._coming.put(done)

    async def run(self) -> None:
        """Consumes: versions.  Waits for: the next one, a second at most, and the publisher's answers.  Produces: the
        newest version in the publisher's hands.  Unblocked by: the learner, the publisher.

        Never returns.  Raises PeerTimeout if the publisher says nothing for supervise.peer_timeout_s.
        """
        await self._take()
        while True:
            await self._deliver()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OFFER_SECONDS):
                    await self._take()

    async def _take(self) -> None:
        match item := await self._coming.get():
            case LearnerDone():
                self._done = item
            case _:
                self._newest = item

    async def _deliver(self) -> None:
        """Return when the publisher has the newest version, and knows it to be the last if it is."""
        version, timeout = self._newest[0].version, self._supervise.peer_timeout_s
        taken = False
        try:
            async with asyncio.timeout(timeout) as patience:
                while not taken:
                    await self._publisher.send(SnapshotOffer(version=version))
                    answer = await self._answer(version, SnapshotTaken, SnapshotWanted)
                    if isinstance(answer, SnapshotWanted):
                        log.info("the publisher wants version %s", version)
                        for part in self._newest:
                            await self._publisher.send(part)
                        self._done_said = False
                        answer = await self._answer(version, SnapshotTaken)
                    if answer is not None:
                        patience.reschedule(asyncio.get_running_loop().time() + timeout)
                    taken = isinstance(answer, SnapshotTaken)
                if self._done is not None and not self._done_said:
                    await self._publisher.send(self._done)
                    self._done_said = True
        except TimeoutError:
            raise PeerTimeout(
                f"the publisher at {self._publisher.address} did not take version {version} and said nothing for "
                f"{timeout} s"
            ) from None

    async def _answer(self, version: Version, *kinds: type[Any]) -> SnapshotTaken | SnapshotWanted | None:
        """The first answer of these kinds that is about `version`; None if nothing comes for supervise.retry_s."""
        with contextlib.suppress(PeerTimeout):
            while True:
                match message := await self._publisher.receive(self._supervise.retry_s):
                    case Refused():
                        raise StreamRLError(f"the publisher refused the learner: {message.reason}: {message.detail}")
                    case SnapshotTaken() | SnapshotWanted() if message.version == version and type(message) in kinds:
                        return message
        return None
