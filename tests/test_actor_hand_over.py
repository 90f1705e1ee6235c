"""Versions on their way to a publisher that is slow, away, restarted, or gone for good."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learner_peers import RUN, FakePublisher, run

from actors.hand_over import HandOver, anchor_parts
from engines.weights import fingerprint
from engines.weights.codes import ulp
from engines.weights.codes.changes import Change
from engines.weights.parts import Line, Piece, dense_pieces
from stream_rl import config
from stream_rl import messages as m
from stream_rl.errors import PeerTimeout
from stream_rl.transport import Dealer
from stream_rl.types import Version

ELEMENTS = 40
PART_BYTES = 64
FIRST = Version(0, 0)


class FakeLearner:
    """Three tensors, of which each step changes some elements; and its hand-over."""

    def __init__(self, dealer: Dealer, peer_timeout_s: float = 20.0) -> None:
        self.bits = {name: torch.arange(ELEMENTS, dtype=torch.int16) for name in "abc"}
        self.version = FIRST
        self.training = asyncio.Lock()
        self.copies = 0
        supervise = config.Supervise(retry_s=0.2, peer_timeout_s=peer_timeout_s)
        self.hand_over = HandOver(dealer, RUN, config.Weights(part_bytes=PART_BYTES), supervise, self.anchor)
        self.hand_over.begin(self.version)

    async def anchor(self) -> tuple[Version, list[m.UpdatePart]]:
        async with self.training:
            self.copies += 1
            pieces = (piece for name, bits in self.bits.items() for piece in dense_pieces(name, torch.bfloat16, bits))
            return self.version, anchor_parts(pieces, Line(RUN, self.version, self.version, True), PART_BYTES)

    def change(self) -> Callable[[], list[Piece]]:
        chance = torch.Generator().manual_seed(self.version.step)
        pieces = []
        for name, bits in self.bits.items():
            new = bits.clone()
            new[torch.randint(0, ELEMENTS, (5,), generator=chance)] += 1
            delta = ulp.diff(bits, new)
            pieces.append(Piece(name, 0, Change(torch.bfloat16, delta)))
            self.bits[name] = new
        self.version = Version(0, self.version.step + 1)
        return lambda: pieces

    async def step(self) -> None:
        async with self.training:
            changes = self.change()
        await self.hand_over.put(self.version, changes)

    def weights_hash(self) -> str:
        total = sum(fingerprint.tensor_sum(name, bits) for name, bits in self.bits.items())
        return fingerprint.text(total % (1 << 64))


@contextlib.asynccontextmanager
async def learner_of(publisher: FakePublisher, serving: bool = True) -> AsyncIterator[FakeLearner]:
    async with Dealer.connect(publisher.address, "learner-0@1") as dealer, asyncio.TaskGroup() as group:
        learner = FakeLearner(dealer)
        running = [group.create_task(learner.hand_over.run())]
        running += [group.create_task(publisher.serve())] if serving else []
        yield learner
        for task in running:
            task.cancel()
    publisher.router.close()


def crash_soon(publisher: FakePublisher, messages: int = 1) -> Callable[[], bool]:
    """Killed by the so many-th message from here; what is returned says whether that has happened."""
    heard, crashes = len(publisher.heard), publisher.crashes
    publisher.crash_at = lambda _: publisher.crashes == crashes and len(publisher.heard) >= heard + messages
    return lambda: publisher.crashes > crashes


async def until_newest(publisher: FakePublisher, learner: FakeLearner) -> None:
    await publisher.until(lambda: publisher.version == learner.version)
    assert publisher.hashes[learner.version] == learner.weights_hash()


def test_the_first_version_goes_whole_and_the_others_as_what_changed() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher) as learner:
            await until_newest(publisher, learner)
            for _ in range(4):
                await learner.step()
                await until_newest(publisher, learner)
            assert publisher.taken == [(0, step) for step in range(5)]
            assert (publisher.anchors, learner.copies) == ([(0, 0)], 1)
            dense = 3 * 2 * ELEMENTS
            sizes = [part.payload.size for part in publisher.all(m.UpdatePart) if not part.anchor]
            assert sum(sizes) < 4 * dense / 2

    run(test())


def test_what_changed_while_the_publisher_was_away_comes_as_one_update() -> None:
    """And the learner did not wait."""

    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher, serving=False) as learner, asyncio.TaskGroup() as group:
            for _ in range(3):
                await asyncio.wait_for(learner.step(), 1.0)
            serving = group.create_task(publisher.serve())
            await until_newest(publisher, learner)
            assert publisher.taken == [(0, 3)], "all weights of the newest, not of the one that was offered"
            serving.cancel()
            for _ in range(5):
                await asyncio.wait_for(learner.step(), 1.0)
                await asyncio.sleep(0.01)
            serving = group.create_task(publisher.serve())
            await until_newest(publisher, learner)
            assert publisher.taken[0] == (0, 3) and publisher.taken[-1] == (0, 8) and len(publisher.taken) <= 3
            assert publisher.anchors == [(0, 3)]
            serving.cancel()

    run(test())


def test_offers_that_piled_up_are_answered_with_one_transfer() -> None:
    """What was said to a publisher that was away reaches it all at once."""

    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher, serving=False) as learner, asyncio.TaskGroup() as group:
            await asyncio.sleep(1.0)  # five offers, and nobody reads them
            serving = group.create_task(publisher.serve())
            await publisher.until(lambda: len(publisher.all(m.VersionOffer)) > 6)
            assert publisher.taken == [learner.version]
            assert [part.part for part in publisher.all(m.UpdatePart)] == [0, 1, 2]
            serving.cancel()

    run(test())


def test_a_restarted_publisher_gets_all_weights_while_the_learner_does_nothing() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher) as learner:
            await learner.step()
            await until_newest(publisher, learner)
            for copies in (2, 3):
                await publisher.until(crash_soon(publisher))
                await until_newest(publisher, learner)
                assert learner.copies == copies
            await learner.step()
            await until_newest(publisher, learner)
            assert publisher.anchors[1:] == [(0, 1), (0, 1)]

    run(test())


def test_all_weights_are_copied_between_two_steps_and_may_be_newer_than_what_was_wanted() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher) as learner:
            await until_newest(publisher, learner)
            await learner.training.acquire()
            await publisher.until(crash_soon(publisher))
            wanted = len(publisher.heard) + 1
            await publisher.until(lambda: len(publisher.heard) >= wanted)
            await asyncio.sleep(0.1)
            assert (learner.copies, publisher.version) == (1, None)
            changes = learner.change()
            learner.training.release()
            await until_newest(publisher, learner)
            await learner.hand_over.put(learner.version, changes)  # the copy had them already
            await learner.step()
            await until_newest(publisher, learner)
            assert publisher.taken == [(0, 0), (0, 1), (0, 2)]
            assert publisher.anchors == [(0, 0), (0, 1)]

    run(test())


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["step", "pause", 1, 2, 3]), min_size=1, max_size=12))
def test_any_order_of_steps_and_crashes_ends_with_the_learners_bits(events: list[Any]) -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher) as learner:
            for event in events:
                match event:
                    case "step":
                        await asyncio.wait_for(learner.step(), 5.0)
                    case "pause":
                        await asyncio.sleep(0.02)
                    case int():
                        crash_soon(publisher, event)
            await until_newest(publisher, learner)

    run(test())


def test_a_publisher_that_stays_away_ends_the_learner_by_name() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with Dealer.connect(publisher.address, "learner-0@1") as dealer:
            learner = FakeLearner(dealer, peer_timeout_s=0.5)
            with pytest.raises(ExceptionGroup) as raised:
                await learner.hand_over.run()
            assert raised.group_contains(PeerTimeout, match=r"not take version 0\.0 and said nothing for 0\.5 s")
        publisher.router.close()

    run(test())


def test_the_last_version_is_said_to_be_the_last_once_it_is_there() -> None:
    async def test() -> None:
        publisher = FakePublisher()
        async with learner_of(publisher) as learner:
            await until_newest(publisher, learner)
            await learner.step()
            done = m.LearnerDone(final=learner.version, weights_hash=learner.weights_hash())
            await learner.hand_over.finish(done)
            for _ in range(2):
                await publisher.until(lambda: repr(publisher.done) == repr(done))
                assert publisher.version == done.final
                await publisher.until(crash_soon(publisher))

    run(test())
