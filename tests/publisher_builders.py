"""A publisher in the test's process on real sockets, and what talks to it: a learner that is scripted, the queue."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from fake_queue import FakeQueue
from update_builders import anchor_parts, dtypes_of, flat
from weights_builders import FIRST, RUN, Tensors, perturbed

from actors.hand_over import HandOver
from engines.weights.chain import differences
from engines.weights.parts import Piece
from engines.weights.publisher import Publisher
from stream_rl import config
from stream_rl.messages import (
    EngineVerified,
    Hello,
    UpdatePart,
    VersionOffer,
    VersionReport,
    VersionTaken,
    VersionWanted,
)
from stream_rl.session import Session
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

PART_BYTES = 60


def make_recipe(**weights: Any) -> config.Recipe:
    return config.Recipe(
        run=config.Run(name=RUN, steps=1),
        model=config.Model(path=""),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=1, max_tokens=1),
        weights=config.Weights(**{"verify_every": 0, "part_bytes": PART_BYTES, "parts_ahead": 2, **weights}),
        supervise=config.Supervise(retry_s=0.2),
    )


class Publishing:
    """A publisher in this process that can be killed, and comes back at the same address knowing nothing."""

    def __init__(self, queue: FakeQueue, recipe: config.Recipe) -> None:
        self._queue, self._recipe, self._incarnation = queue, recipe, 0
        self.address = "tcp://127.0.0.1:0"

    async def start(self) -> None:
        self._incarnation += 1
        self._router = Router.bind(self.address)
        self.address = self._router.address
        self._dealer = Dealer.connect(self._queue.address, f"publisher-0@{self._incarnation}")
        hello = Hello(run=RUN, role="publisher", name="publisher-0", incarnation=self._incarnation, pid=1)
        session = Session(self._dealer, hello, self._recipe.supervise)
        await session.start()
        publisher = Publisher(self._recipe, RUN, self._incarnation, self._router, session)
        self._loops = [asyncio.create_task(loop) for loop in (publisher.run(), session.run())]

    async def kill(self) -> None:
        for loop in self._loops:
            loop.cancel()
        ends = await asyncio.gather(*self._loops, return_exceptions=True)
        self._router.close()
        self._dealer.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


class FakeLearner:
    """A line of versions, and the hand-over of the newest."""

    def __init__(self, dealer: Dealer, tensors: Tensors) -> None:
        self.line, self.history, self.anchors = [tensors], 0, 0
        self.hand_over = HandOver(dealer, RUN, make_recipe().weights, make_recipe().supervise, self.anchor)
        self.hand_over.begin(FIRST)

    @property
    def version(self) -> Version:
        return Version(self.history, len(self.line) - 1)

    async def anchor(self) -> tuple[Version, list[UpdatePart]]:
        self.anchors += 1
        return self.version, anchor_parts(self.line[-1], self.version, PART_BYTES)

    async def step(self, rng: np.random.Generator, share: float = 0.2) -> None:
        self.line.append(perturbed(self.line[-1], rng, share))
        await self.hand_over.put(self.version, changes_of(*self.line[-2:]))


def changes_of(old: Tensors, new: Tensors) -> Callable[[], list[Piece]]:
    return lambda: differences(flat(old), flat(new), dtypes_of(new))


@contextlib.asynccontextmanager
async def publishing(**weights: Any) -> AsyncIterator[tuple[FakeQueue, Publishing, Dealer]]:
    """A queue, a publisher, and the learner's end of a conversation with it."""
    async with FakeQueue() as queue:
        publisher = Publishing(queue, make_recipe(**weights))
        await publisher.start()
        async with Dealer.connect(publisher.address, "learner-0@1") as learner:
            yield queue, publisher, learner
        await publisher.kill()


@contextlib.asynccontextmanager
async def learning(dealer: Dealer, tensors: Tensors) -> AsyncIterator[FakeLearner]:
    learner = FakeLearner(dealer, tensors)
    running = asyncio.create_task(learner.hand_over.run())
    yield learner
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def ask(learner: Dealer, *messages: Any) -> Any:
    """The answer to the last of these."""
    for message in messages:
        await learner.send(message)
    return await learner.receive(10)


async def offer(learner: Dealer, target: Version, base: Version | None = None) -> Any:
    return await ask(learner, VersionOffer(base=target if base is None else base, target=target))


async def assert_takes(learner: Dealer, version: Version, tensors: Tensors) -> None:
    """All of it, which a publisher that does not hold its base asks for."""
    wanted = await offer(learner, version)
    assert isinstance(wanted, VersionWanted) and (wanted.target, wanted.anchor) == (version, True)
    taken = await ask(learner, *anchor_parts(tensors, version, PART_BYTES))
    assert isinstance(taken, VersionTaken) and taken.target == version


def verified(queue: FakeQueue, version: Version) -> set[str]:
    return {report.engine for report in queue.of(EngineVerified) if report.version == version}


def live(queue: FakeQueue, engine: str = "engine-0") -> list[VersionReport]:
    return [report for report in queue.of(VersionReport) if report.engine == engine]
