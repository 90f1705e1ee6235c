"""What a peer posts reaches a queue that is killed, loses, repeats and reorders."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fake_queue import HELLO, RETRY, FakeQueue, play, talking
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_rl import config, session
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import Ack, Admit, Alive, CloseTrajectory, Done, Hello, Refused, Status, StatusRequest, Welcome
from stream_rl.session import FOR_GOOD, MAX_UNACKNOWLEDGED, Session
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version


def close(member: int) -> Callable[[int], CloseTrajectory]:
    """The message number `member` of a test."""
    return lambda sequence: CloseTrajectory(sequence=sequence, group=0, member=member, status="done")


def order(queue: FakeQueue) -> list[tuple[int, int]]:
    return [(message.sequence, message.member) for message in queue.taken]


FAULTS = ["", "", "lose", "twice", "late", "silent", "old", "hold", "restart"]


@settings(max_examples=30, deadline=None)
@given(faults=st.lists(st.sampled_from(FAULTS), max_size=40), waits=st.lists(st.integers(0, 40), max_size=5))
def test_every_posted_message_is_taken_once_and_in_order(faults: list[str], waits: list[int]) -> None:
    async def scene() -> None:
        async with FakeQueue() as queue:
            schedule = iter(faults)
            restarts: asyncio.Queue[None] = asyncio.Queue()

            def fault(message: Any) -> str:
                kind = next(schedule, "")
                if kind in ("hold", "restart"):  # from here on nothing is journaled, until the restart
                    queue.holding = True
                    restarts.put_nowait(None)
                    return "lose"
                return kind

            async def restart() -> None:
                while True:
                    await restarts.get()
                    await queue.kill()
                    queue.holding = False
                    await queue.start()

            queue.fault = fault
            async with talking(queue) as peer, asyncio.TaskGroup() as tasks:
                restarting = tasks.create_task(restart())
                for number in range(50):
                    if number in waits:
                        await peer.drained()
                    await peer.post(close(number))
                await peer.drained()
                restarting.cancel()
            assert order(queue) == [(number, number) for number in range(50)]

    play(scene)


def test_the_fake_queue_does_lose_what_a_peer_does_not_repeat() -> None:
    """Planted: without repetition the property above fails."""

    async def scene() -> None:
        async with FakeQueue() as queue, Dealer.connect(queue.address, "actor-0@1") as dealer:
            faults = iter(["", "lose"])
            queue.fault = lambda message: next(faults, "")
            await dealer.send(HELLO)
            for number in range(4):
                await dealer.send(close(number)(number))
            acks = [await dealer.receive(5.0) for _ in range(4)]
            assert order(queue) == [(0, 0)]
            assert [(ack.next_sequence, ack.resend) for ack in acks[1:]] == [(1, False), (1, True), (1, True)]

    play(scene)


def test_hello_is_repeated_until_there_is_a_queue() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue:
            await queue.kill()
            async with Dealer.connect(queue.address, "actor-0@1") as dealer:
                peer = Session(dealer, HELLO, config.Supervise(retry_s=RETRY, peer_timeout_s=20))
                queue.welcome = lambda hello: {"version": Version(2, 3), "admitted": [7]}
                starting = asyncio.create_task(peer.start())
                await asyncio.sleep(3 * RETRY)
                await queue.start()
                welcome = await starting
                assert peer.welcome is welcome
                assert (welcome.version, welcome.admitted) == ((2, 3), [7])

    play(scene)


def test_no_queue_at_all_is_said_after_the_timeout() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue:
            await queue.kill()
            with pytest.raises(PeerTimeout, match=r"no queue at .* welcomed actor-0"):
                async with talking(queue, patience=4 * RETRY):
                    pass
            await queue.start()

    play(scene)


@pytest.mark.parametrize("reason", sorted(FOR_GOOD))
def test_a_peer_that_is_refused_for_good_ends(reason: str) -> None:
    async def at_the_start() -> None:
        async with FakeQueue() as queue:

            async def refuse(connection: bytes, hello: Hello) -> None:
                await queue.router.send(connection, Refused(reason=reason, detail="no"))

            queue.greet = refuse
            with pytest.raises(StreamRLError, match=f"{reason}: no"):
                async with talking(queue):
                    pass

    async def later() -> None:
        async with FakeQueue() as queue:
            with pytest.RaisesGroup(pytest.RaisesExc(StreamRLError, match=reason)):
                async with talking(queue) as peer:
                    await queue.say(Refused(reason=reason, detail="no"))
                    await peer.receive()

    play(at_the_start)
    play(later)


def test_a_restarted_queue_is_noticed_by_the_heartbeat_alone() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:
            queue.welcome = lambda hello: {"admitted": [5]}
            await queue.restart()
            assert (await peer.receive()).admitted == [5]
            assert peer.welcome.admitted == [5]
            assert len(queue.of(Hello)) == 2

    play(scene)


def test_without_a_heartbeat_the_session_says_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ALIVE_SECONDS", RETRY / 5)

    async def scene(heartbeat: bool) -> bool:
        async with FakeQueue() as queue, talking(queue, heartbeat=heartbeat) as peer:
            queue.answer = lambda message: [Status(fields={}, texts={}, finished=False)]
            await asyncio.sleep(RETRY)
            await peer.request(StatusRequest(), Status)
            return bool(queue.of(Alive))

    assert asyncio.run(scene(True))
    assert not asyncio.run(scene(False))


def test_a_flood_of_not_registered_is_answered_by_one_hello() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:
            await queue.say(*[Refused(reason="not_registered", detail="")] * 100)
            await queue.until(lambda: len(queue.of(Hello)) == 2)
            assert isinstance(await peer.receive(), Welcome)
            await queue.say(Admit(groups=[]))
            await peer.receive()
            assert len(queue.of(Hello)) == 2
            await queue.say(Refused(reason="not_registered", detail=""))
            await queue.until(lambda: len(queue.of(Hello)) == 3)

    play(scene)


def test_a_lost_message_among_many_does_not_multiply_them() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=5.0) as peer:
            numbered = 0

            def fault(message: Any) -> str:
                nonlocal numbered
                numbered += 1
                return "lose" if numbered == 1 else ""

            queue.fault = fault
            for number in range(500):
                await peer.post(close(number))
            await peer.drained()
            assert order(queue) == [(number, number) for number in range(500)]
            assert numbered < 3 * 500

    play(scene)


def test_posting_waits_when_too_much_is_unacknowledged_and_goes_on_afterwards() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue) as peer:
            queue.holding = True
            for number in range(MAX_UNACKNOWLEDGED):
                await peer.post(close(number))
            more = asyncio.create_task(peer.post(close(MAX_UNACKNOWLEDGED)))
            await asyncio.sleep(RETRY)
            assert not more.done()
            queue.holding = False
            assert await more == MAX_UNACKNOWLEDGED
            await peer.drained()
            assert len(queue.taken) == MAX_UNACKNOWLEDGED + 1

    play(scene)


def test_a_message_that_cannot_be_made_takes_no_number() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue) as peer:
            with pytest.raises(ZeroDivisionError):
                await peer.post(lambda sequence: sequence // 0)
            await peer.post(close(0))
            await peer.drained()
            assert order(queue) == [(0, 0)]

    play(scene)


def test_acknowledged_waits_for_its_message_and_for_no_later_one() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=30.0) as peer:
            first = await peer.post(close(0))
            await peer.acknowledged(first)
            queue.holding = True
            second = await peer.post(close(1))
            waiting = asyncio.create_task(peer.acknowledged(second))
            await peer.acknowledged(first)
            await asyncio.sleep(RETRY)
            assert not waiting.done()
            queue.holding = False
            await queue.restart()
            async with asyncio.timeout(10):  # at once, not when it is sent again
                await waiting

    play(scene)


def test_nothing_is_posted_to_a_queue_that_does_not_know_this_peer_yet() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, retry=30.0) as peer:
            greet, hellos = queue.greet, asyncio.Event()

            async def deaf(connection: bytes, hello: Hello) -> None:
                hellos.set()

            queue.greet = deaf
            await queue.say(Refused(reason="not_registered", detail=""))
            await hellos.wait()
            numbered = 0

            def fault(message: Any) -> str:
                nonlocal numbered
                numbered += 1
                return ""

            queue.fault = fault
            for number in range(3):
                await peer.post(close(number))
            queue.answer = lambda message: [Status(fields={}, texts={}, finished=False)]
            await peer.request(StatusRequest(), Status)
            assert numbered == 0
            await greet(b"actor-0@1", HELLO)
            await peer.drained()
            assert order(queue) == [(0, 0), (1, 1), (2, 2)]

    play(scene)


def test_drained_says_how_much_is_left_after_the_timeout() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, talking(queue, patience=20 * RETRY) as peer:
            await peer.drained()
            queue.holding = True
            await peer.post(close(0))
            with pytest.raises(PeerTimeout, match="1 messages unacknowledged"):
                await peer.drained()

    play(scene)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (Ack(next_sequence=3), "another process has used this incarnation"),
        (Welcome(run="r", next_sequence=3), "another process has used this incarnation"),
        (Welcome(run="r", next_sequence=0), "its journal was lost"),
    ],
)
def test_counts_that_cannot_be_end_the_peer(event: Any, says: str) -> None:
    async def scene() -> None:
        async with FakeQueue() as queue:
            with pytest.RaisesGroup(pytest.RaisesExc(StreamRLError, match=says)):
                async with talking(queue) as peer:
                    await peer.post(close(0))
                    await peer.drained()
                    await queue.say(event)
                    await peer.receive()

    play(scene)


def test_a_second_process_of_the_same_incarnation_does_not_start() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue:
            async with talking(queue) as peer:
                await peer.post(close(0))
                await peer.drained()
            with pytest.raises(StreamRLError, match="start it with a higher one"):
                async with talking(queue):
                    pass

    play(scene)


def test_a_dealer_finds_a_router_that_comes_back_to_its_address_and_brings_what_was_sent_meanwhile() -> None:
    async def scene() -> None:
        async with Router.bind("tcp://127.0.0.1:0") as router:
            address = router.address
            dealer = Dealer.connect(address, "engine-0")
            await dealer.send(Done(what="before"))
            await router.receive()
        async with dealer:
            with pytest.raises(PeerTimeout):
                await dealer.receive(0.1)
            for n in range(100):
                await dealer.send(Done(what=str(n)))
            async with Router.bind(address) as router:
                for n in range(100):
                    peer, message = await router.receive()
                    assert (peer, message.what) == (b"engine-0", str(n))
                assert await router.send(b"engine-0", Done(what="back"))
                assert (await dealer.receive(20)).what == "back"

    play(scene)
