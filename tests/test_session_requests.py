"""What a peer asks a queue is answered once, whatever is lost, late or refused."""

import asyncio
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from fake_queue import RETRY, FakeQueue, play, talking

from stream_rl.errors import PeerTimeout, WireError
from stream_rl.messages import Admit, Applied, Done, Lease, LeaseRequest, Refused, Welcome
from stream_rl.types import Version


def lease(step: int) -> Lease:
    names = [field.name for field in dataclasses.fields(Lease)][1:]
    return Lease(step=Version(0, step), **{name: np.zeros(0) for name in names})


def test_a_request_is_repeated_until_it_is_answered_and_other_messages_pass() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue) as peer:
            asked = itertools.count()

            def answer(message: Any) -> list[Any]:
                if isinstance(message, LeaseRequest):
                    return [Admit(groups=[1])] if next(asked) < 3 else [lease(4)]
                return []

            queue.answer = answer
            got = await peer.request(LeaseRequest(step=Version(0, 4)), Lease)
            assert got.step == (0, 4)
            for _ in range(3):
                assert (await peer.receive()).groups == [1]

    play(scene)


def test_a_request_survives_a_restart_at_once() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=30.0) as peer:
            asking = asyncio.create_task(peer.request(LeaseRequest(step=Version(0, 4)), Lease))
            await queue.until(lambda: queue.of(LeaseRequest))
            queue.answer = lambda message: [lease(4)] if isinstance(message, LeaseRequest) else []
            await queue.restart()
            assert (await asking).step == (0, 4)
            assert isinstance(await peer.receive(), Welcome)

    play(scene)


def test_late_answers_to_an_earlier_request_are_not_taken_for_this_one() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:

            def answer(message: Any) -> list[Any]:
                match message:
                    case LeaseRequest():
                        return [lease(3), Done(what="Applied"), lease(4)]
                    case Applied():
                        return [lease(4), Done(what="Committed"), Done(what="Applied")]
                return []

            queue.answer = answer
            assert (await peer.request(LeaseRequest(step=Version(0, 4)), Lease)).step == (0, 4)
            applied = Applied(step=Version(0, 4), outcome="trained", metrics={})
            assert (await peer.request(applied, Done)).what == "Applied"
            await queue.say(lease(4), Done(what="Applied"), Admit(groups=[9]))
            assert (await peer.receive()).groups == [9], "a second answer is for nobody"

    play(scene)


def test_a_refused_request_fails_with_the_queue_s_reason_and_the_next_one_works() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:
            queue.answer = lambda message: [Refused(reason="run_ended", detail="over")]
            with pytest.raises(WireError, match="run_ended: over"):
                await peer.request(LeaseRequest(step=Version(0, 4)), Lease)
            queue.answer = lambda message: [lease(5)]
            assert (await peer.request(LeaseRequest(step=Version(0, 5)), Lease)).step == (0, 5)
            await queue.say(Refused(reason="bad_reward", detail="of something posted"))
            assert (await peer.receive()).reason == "bad_reward"

    play(scene)


def test_an_unanswered_request_says_what_was_missing_and_leaves_room_for_the_next() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue) as peer:
            with pytest.raises(PeerTimeout, match="no Lease for LeaseRequest"):
                await peer.request(LeaseRequest(step=Version(0, 4)), Lease, timeout=20 * RETRY)
            assert len(queue.of(LeaseRequest)) >= 2
            queue.answer = lambda message: [Done(what="Applied")] if isinstance(message, Applied) else []
            await peer.request(Applied(step=Version(0, 4), outcome="trained", metrics={}), Done)

    play(scene)


def test_two_requests_wait_for_each_other() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:
            queue.answer = lambda message: [lease(message.step.step)] if isinstance(message, LeaseRequest) else []
            wanted = [LeaseRequest(step=Version(0, step)) for step in range(5)]
            got = await asyncio.gather(*(peer.request(request, Lease) for request in wanted))
            assert [answer.step.step for answer in got] == [0, 1, 2, 3, 4]

    play(scene)
