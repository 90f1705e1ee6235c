"""Versions on their way to a publisher that is slow, away, or gone for good."""

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator

import pytest
import torch
from learner_peers import RUN, FakePublisher, run

from actors.hand_over import HandOver
from engines.weights.chain import snapshot_parts
from stream_rl import config
from stream_rl import messages as m
from stream_rl.errors import PeerTimeout
from stream_rl.transport import Dealer
from stream_rl.types import Version


def test_offers_that_piled_up_are_answered_with_one_transfer(tmp_path: pathlib.Path) -> None:
    """What was said to a publisher that was away reaches it all at once."""

    async def test() -> None:
        publisher = FakePublisher()
        async with hand_over_to(publisher, peer_timeout_s=20.0) as hand_over:
            await hand_over.put(some_parts(0))
            await asyncio.sleep(1.0)  # five offers, and nobody reads them
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(publisher.serve())
                await publisher.until(lambda: len(publisher.all(m.SnapshotOffer)) > 6)
                serving.cancel()
            assert publisher.taken == [(0, 0)]
            assert [part.part for part in publisher.all(m.Snapshot)] == [0, 1, 2]

    run(test())


def some_parts(step: int) -> list[m.Snapshot]:
    return snapshot_parts(RUN, Version(0, step), [(name, torch.full((8,), float(step))) for name in "abc"], 16)


@contextlib.asynccontextmanager
async def hand_over_to(publisher: FakePublisher, peer_timeout_s: float) -> AsyncIterator[HandOver]:
    async with Dealer.connect(publisher.address, "learner-0@1") as dealer, asyncio.TaskGroup() as group:
        hand_over = HandOver(dealer, config.Supervise(retry_s=0.2, peer_timeout_s=peer_timeout_s))
        running = group.create_task(hand_over.run())
        yield hand_over
        running.cancel()
    publisher.router.close()


def test_a_publisher_that_is_away_holds_the_learner_back_after_two_versions(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with hand_over_to(FakePublisher(), peer_timeout_s=20.0) as hand_over:
            await hand_over.put(some_parts(0))
            await hand_over.put(some_parts(1))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(hand_over.put(some_parts(2)), 0.5)

    run(test())


def test_a_publisher_that_stays_away_ends_the_learner_by_name() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with Dealer.connect(publisher.address, "learner-0@1") as dealer:
            hand_over = HandOver(dealer, config.Supervise(retry_s=0.2, peer_timeout_s=0.5))
            await hand_over.put(some_parts(3))
            with pytest.raises(PeerTimeout, match=r"did not take version 0\.3 and said nothing for 0\.5 s"):
                await hand_over.run()
        publisher.router.close()

    run(test())
