"""Everyone that a queue process talks to, played by this process: an engine, an actor, a learner, an observer.

They speak as the real ones do: numbered messages that are kept until they are acknowledged, and no more of them on
their way than an engine's buffer holds.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from engines.sglang.outbox import BYTES_PER_TOKEN, ROW_OVERHEAD_BYTES
from scripts.bench.traffic import CHUNK_TOKENS, ENGINE, RUN, Interval, close_member, members, open_group
from stream_rl import config
from stream_rl.errors import StreamRLError
from stream_rl.messages import (
    Admit,
    Applied,
    Chunks,
    Committed,
    Done,
    EngineStats,
    Hello,
    Lease,
    LeaseRequest,
    Refused,
    Status,
    StatusRequest,
)
from stream_rl.metrics import unflatten
from stream_rl.session import Session
from stream_rl.transport import Dealer
from stream_rl.types import Version

ROW_BYTES = CHUNK_TOKENS * BYTES_PER_TOKEN + ROW_OVERHEAD_BYTES
"""Of a chunk, as the engine's buffer counts it."""
NAMES = {"engine": ENGINE, "actor": "actor-0", "learner": "learner-0", "observer": "observer-0"}


class Peers:
    """`connected` makes it."""

    def __init__(self, recipe: config.Recipe, sessions: dict[str, Session]) -> None:
        self._recipe = recipe
        self._engine, self._actor = sessions["engine"], sessions["actor"]
        self._learner, self._observer = sessions["learner"], sessions["observer"]
        self._admitted = 0
        self._more = asyncio.Condition()
        self.version = Version(0, 0)
        """The newest; the learner asks for the step that follows it."""

    async def hear(self, session: Session) -> None:
        """Consumes: what the queue says unasked.  Waits for: the next.  Produces: admissions.  Unblocked by: the queue.
        Raises StreamRLError for a refusal, since nothing here may be refused."""
        while True:
            match message := await session.receive():
                case Admit():
                    async with self._more:
                        self._admitted = max(self._admitted, *(group + 1 for group in message.groups))
                        self._more.notify_all()
                case Refused():
                    raise StreamRLError(f"the queue refused traffic of its own making: {message}")

    async def admitted(self, groups: int) -> None:
        """Return when the first `groups` groups may be opened."""
        async with asyncio.timeout(self._recipe.supervise.peer_timeout_s), self._more:
            await self._more.wait_for(lambda: self._admitted >= groups)

    async def join(self) -> None:
        """Say that the engine has the first weights, so that it is one to use."""
        stats = EngineStats(engine=ENGINE, incarnation=1, version=Version(0, 0), counters={}, histograms={})
        await self._engine.send(stats)

    # -- engine and actor --------------------------------------------------------------------------------------

    async def flood(self, intervals: Sequence[Interval]) -> None:
        """As fast as the queue takes it, from the first group opened; returns when all of it is durable."""
        window = max(1, self._recipe.engine.buffer_bytes // (ROW_BYTES * max(map(_rows, intervals))))
        opened = {group: await self._open(group) for interval in intervals for group in interval.starting}
        for interval in intervals:
            if interval.starting:
                await self._actor.acknowledged(opened[interval.starting[-1]])
            await self._engine.acknowledged(interval.chunks.sequence - window)
            await self._engine.post(partial(_numbered, interval.chunks))
            await self._close(interval.ending)
        await self._engine.drained()
        await self._actor.drained()

    async def stream(self, intervals: Sequence[Interval], seconds: float, sent: dict[int, float]) -> list[float]:
        """One message each `seconds`, whether or not the queue keeps up; groups are closed a message before their last
        chunks.  Fills in when those were sent; returns by how many seconds each message was late."""
        opened = {group: await self._open(group) for interval in intervals for group in interval.starting}
        await self._actor.acknowledged(max(opened.values()))
        began, late = time.perf_counter() + seconds, []
        for number, (interval, following) in enumerate(zip(intervals, [*intervals[1:], None], strict=True)):
            due = began + number * seconds
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late.append(time.perf_counter() - due)
            sent |= dict.fromkeys(interval.ending, time.perf_counter())
            await self._engine.post(partial(_numbered, interval.chunks))
            await self._close(following.ending if following else ())
        return late

    async def _open(self, group: int) -> int:
        await self.admitted(group + 1)
        return await self._actor.post(partial(open_group, group=group))

    async def _close(self, groups: Sequence[int]) -> None:
        for group, member in members(groups):
            await self._actor.post(partial(close_member, group=group, member=member))

    # -- learner -----------------------------------------------------------------------------------------------

    async def learn(self, trajectories: int, leased: dict[int, float] | None = None) -> int:
        """Take leases and apply them until so many trajectories were leased, then commit.  Returns the sampled tokens;
        fills in when each group came."""
        tokens, timeout = 0, self._recipe.queue.lease_timeout_s
        while trajectories > 0:
            step = self.version
            lease = await self._learner.request(LeaseRequest(step=step), Lease, timeout)
            if leased is not None:
                leased |= dict.fromkeys(np.unique(lease.groups).tolist(), time.perf_counter())
            # Its answer is not awaited, so that the learner waits again at once; what follows cannot overtake it.
            await self._learner.send(Applied(step=step, outcome="trained", metrics={}))
            self.version = Version(step.history, step.step + 1)
            trajectories -= len(lease.lengths)
            tokens += int(np.count_nonzero(lease.sampled))
        await self._learner.request(Committed(step=self.version), Done)
        return tokens

    # -- observer ----------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The queue's summary and where everything is."""
        status = await self._observer.request(StatusRequest(), Status)
        return unflatten(status.fields, status.texts)


@contextlib.asynccontextmanager
async def connected(address: str, recipe: config.Recipe) -> AsyncIterator[Peers]:
    """Everyone registered with the queue at `address`, until the end of the block."""
    async with contextlib.AsyncExitStack() as sockets:
        sessions = {}
        for role, name in NAMES.items():
            dealer = await sockets.enter_async_context(Dealer.connect(address, f"{name}@1"))
            hello = Hello(run=RUN, role=role, name=name, incarnation=1, pid=os.getpid())
            sessions[role] = Session(dealer, hello, recipe.supervise)
            await sessions[role].start()
        peers = Peers(recipe, sessions)
        async with asyncio.TaskGroup() as talking:
            tasks = [talking.create_task(session.run()) for session in sessions.values()]
            tasks += [talking.create_task(peers.hear(session)) for session in sessions.values()]
            await peers.join()
            yield peers
            for task in tasks:
                task.cancel()


def _numbered(chunks: Chunks, sequence: int) -> Chunks:
    assert chunks.sequence == sequence, f"message {chunks.sequence} is sent as {sequence}"
    return chunks


def _rows(interval: Interval) -> int:
    return len(interval.chunks.rids)
