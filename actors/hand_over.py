"""Handing the learner's versions to the publisher: what changed, or all weights to one that does not hold the base.

What changed while the publisher was busy or away is put together: one update is under way, one waits, and the learner
trains on.  Each second the newest version is offered: a publisher that has it says VersionTaken, one that has not
VersionWanted, and whether it needs all of it.  What travels on one connection keeps its order, so after the parts were
sent a VersionWanted is the late answer to an earlier offer.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from engines.weights.codes.payload import Code
from engines.weights.parts import Line, Piece, compose, cut, relabelled
from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import LearnerDone, Refused, UpdatePart, VersionOffer, VersionTaken, VersionWanted
from stream_rl.transport import Dealer
from stream_rl.types import Version

log = logging.getLogger(__name__)
OFFER_SECONDS = 1.0
CHANGES_AHEAD = 2
"""Versions whose changes may wait to be sorted into the checkpoint's tensors; that hangs on nobody but this process."""

Changes = Callable[[], list[Piece]]
"""What one version changed of the one before it; work for a thread."""
Anchor = Callable[[], Awaitable[tuple[Version, list[UpdatePart]]]]
"""All weights, as parts, and the version that they are: the newest one that was put, or one that is about to be."""


class HandOver:
    """`begin` with the first version, `put` the others as they come, `finish` after the last; `run` is one of the
    process's loops."""

    def __init__(
        self, publisher: Dealer, run: str, weights: config.Weights, supervise: config.Supervise, anchor: Anchor
    ) -> None:
        """anchor: asked when the publisher needs all weights; may take as long as a training step."""
        self._publisher, self._run_id, self._weights, self._supervise = publisher, run, weights, supervise
        self._anchor = anchor
        self._coming: asyncio.Queue[tuple[Version, Changes] | LearnerDone] = asyncio.Queue(CHANGES_AHEAD)
        self._composing = asyncio.Lock()
        """Around whatever reads or replaces the three that follow and takes its time."""
        self._waiting: list[Piece] | None = None
        """What changed from `_target` to `_newest`; None if they are the same."""
        self._newest = self._base = self._target = Version(0, 0)
        """The update that is under way, or was last, leads from `_base` to `_target`."""
        self._parts: list[UpdatePart] = []
        """Of that update; none once it is taken, and none before the publisher asked for all weights."""
        self._news = asyncio.Event()
        self._done: LearnerDone | None = None
        self._done_said = False
        """To the publisher that holds the newest version."""

    def begin(self, version: Version) -> None:
        """The first version: there is nothing before it, so the publisher will ask for all of it."""
        self._newest = self._base = self._target = version
        self._news.set()

    async def put(self, version: Version, changes: Changes) -> None:
        """The newest version.  Waits for no peer."""
        await self._coming.put((version, changes))

    async def finish(self, done: LearnerDone) -> None:
        """There is no version after the one that was put last."""
        await self._coming.put(done)

    async def run(self) -> None:
        """Both loops.  Never returns.  Raises PeerTimeout if the publisher says nothing for supervise.peer_timeout_s.

        That comes in a group."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._collect())
            tasks.create_task(self._deliver())

    async def _collect(self) -> None:
        """Consumes: versions.  Waits for: the next one.  Produces: the update that waits.  Unblocked by: the learner.

        A version that an anchor has already brought is dropped."""
        while True:
            item = await self._coming.get()
            if isinstance(item, LearnerDone):
                self._done = item
            else:
                version, changes = item
                pieces = await asyncio.to_thread(changes)
                async with self._composing:
                    if version > self._newest:
                        if self._waiting:
                            pieces = await asyncio.to_thread(compose, self._waiting, pieces)
                        self._waiting, self._newest = pieces, version
            self._news.set()

    async def _deliver(self) -> None:
        """Consumes: the update that waits.  Waits for: one, a second at most, and the publisher's answers.  Produces:
        the newest version in the publisher's hands.  Unblocked by: `_collect`, the publisher."""
        await self._news.wait()
        while True:
            self._news.clear()
            await self._encode()
            await self._hand_over()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OFFER_SECONDS):
                    await self._news.wait()

    async def _encode(self) -> None:
        """Make what waits the update that is under way."""
        async with self._composing:
            if self._waiting is None:
                return
            start = time.perf_counter()
            line = Line(self._run_id, self._target, self._newest, False)
            part_bytes = self._weights.part_bytes
            self._parts = await asyncio.to_thread(cut, self._waiting, line, Code.FAST, part_bytes)
            changed = sum(piece.change.changed for piece in self._waiting)
            self._waiting, self._base, self._target = None, line.base, line.target
        size = sum(part.payload.size for part in self._parts)
        seconds = time.perf_counter() - start
        log.info("%s to %s: %d changed, %d bytes, encoded in %.3f s", line.base, line.target, changed, size, seconds)

    async def _hand_over(self) -> None:
        """Return when the publisher has the target, and knows it to be the last if it is."""
        timeout = self._supervise.peer_timeout_s
        try:
            async with asyncio.timeout(timeout) as patience:
                while True:
                    await self._publisher.send(VersionOffer(base=self._base, target=self._target))
                    answer = await self._answer(VersionTaken, VersionWanted)
                    if isinstance(answer, VersionWanted):
                        log.info("the publisher wants version %s%s", answer.target, ", all of it" * answer.anchor)
                        patience.reschedule(None)  # all weights may have to wait for the end of a step
                        await self._send(answer.anchor)
                        patience.reschedule(asyncio.get_running_loop().time() + timeout)
                        answer = await self._answer(VersionTaken)
                    if answer is not None:
                        patience.reschedule(asyncio.get_running_loop().time() + timeout)
                    if isinstance(answer, VersionTaken):
                        break
                self._parts, self._base = [], self._target
                last = self._done is not None and self._done.final == self._target
                if self._done is not None and last and not self._done_said:
                    await self._publisher.send(self._done)
                    self._done_said = True
        except TimeoutError:
            raise PeerTimeout(
                f"the publisher at {self._publisher.address} did not take version {self._target} and said nothing for "
                f"{timeout} s"
            ) from None

    async def _send(self, anchor: bool) -> None:
        """All parts of the update, of all weights if the publisher wants them or there is nothing else."""
        self._done_said = False
        if not self._parts or (anchor and not self._parts[0].anchor):
            async with self._composing:
                self._parts = []
                version, self._parts = await self._anchor()
                # what waits led to this version at most: the learner cannot have put a later one before the copy
                self._waiting, self._newest = None, version
                self._base = self._target = version
        for part in self._parts:
            await self._publisher.send(part)

    async def _answer(self, *kinds: type[Any]) -> VersionTaken | VersionWanted | None:
        """The first answer of these kinds that is about the target; None if nothing comes for supervise.retry_s."""
        with contextlib.suppress(PeerTimeout):
            while True:
                match message := await self._publisher.receive(self._supervise.retry_s):
                    case Refused():
                        raise StreamRLError(f"the publisher refused the learner: {message.reason}: {message.detail}")
                    case VersionTaken() | VersionWanted():
                        if message.target == self._target and type(message) in kinds:
                            return message
        return None


def anchor_parts(pieces: Iterable[Piece], line: Line, part_bytes: int) -> list[UpdatePart]:
    """As `cut`, of all weights: encoded as they come, so that there is never more than one copy of them."""
    made: list[UpdatePart] = []
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.change.elements * piece.change.dtype.itemsize
        if size >= part_bytes:
            made += cut(group, line, Code.FAST, size + 1)
            group, size = [], 0
    if group or not made:
        made += cut(group, line, Code.FAST, size + 1)
    return [relabelled(part, number, len(made), "") for number, part in enumerate(made)]
