"""Sockets against their contract: what is bad is counted and passed over, what is gone is said, nothing blocks."""

import asyncio
import pathlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from stream_rl import wire
from stream_rl.errors import ConfigError, PeerTimeout, WireError
from stream_rl.messages import Admit, Done, Refused
from stream_rl.transport import HIGH_WATER_MARK, Dealer, Router, ThreadHub, Wakeup, check_address

LOOPBACK = "tcp://127.0.0.1:0"
PATIENCE = 10.0


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene that must end; a hang is a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(4 * PATIENCE):
            await scene()

    asyncio.run(bounded())


@contextmanager
def raw_dealer(address: str, identity: bytes = b"raw", receive_mark: int = 0) -> Iterator["zmq.Socket[bytes]"]:
    """A socket that sends whatever it likes."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RCVHWM, receive_mark)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


@contextmanager
def raw_router() -> Iterator[tuple["zmq.Socket[bytes]", str]]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    try:
        yield socket, f"tcp://127.0.0.1:{port}"
    finally:
        socket.close()
        context.term()


@contextmanager
def open_hub() -> Iterator[ThreadHub]:
    hub = ThreadHub()
    try:
        yield hub
    finally:
        hub.close()


def drain(hub: ThreadHub, count: int) -> list[tuple[str, object]]:
    """At least `count` messages of a hub."""
    got: list[tuple[str, object]] = []
    end = time.monotonic() + PATIENCE
    while len(got) < count and time.monotonic() < end:
        got += hub.poll(0.2)
    return got


BAD = [
    [b""],
    [b"\xc1"],
    [b"\x94\x02\xa4Done\x81\xa4what\xa1x\x90"],
    [b"\x94\x01\xa4Gone\x80\x90"],
    [b"\x94\x01\xa4Done\x80\x90"],
    [b"\x94\x01\xa4Done\x81\xa4what\xa1x\x90", b"more"],
    [b"x"] * 64,
    [b"\x91" * 5000],
]
BAD_REASONS = {
    "not_msgpack": 3,
    "wire_version": 1,
    "unknown_type": 1,
    "field_type": 1,
    "array_count": 1,
    "frame_count": 1,
}


def test_messages_go_both_ways_in_order_and_the_router_knows_who_sent_them() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router, Dealer.connect(router.address, "engine-0") as dealer:
            for n in range(100):
                await dealer.send(Admit(groups=[n]))
            for n in range(100):
                peer, message = await router.receive()
                assert (peer, message.groups) == (b"engine-0", [n])
            assert await router.send(b"engine-0", Done(what="all"))
            assert (await dealer.receive(PATIENCE)).what == "all"

    play(scene)


def test_port_zero_binds_a_free_port_and_says_which() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as first, Router.bind(LOOPBACK) as second:
            assert first.address != second.address
            assert all(int(router.address.rpartition(":")[2]) > 0 for router in (first, second))
            assert all(router.address.startswith("tcp://127.0.0.1:") for router in (first, second))

    play(scene)


def test_a_router_counts_bad_frames_and_still_hears_the_next_good_message() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router:
            with raw_dealer(router.address) as raw:
                for frames in BAD:
                    raw.send_multipart(frames)
                raw.send_multipart(wire.encode(Done(what="good")))
                peer, message = await router.receive()
            assert (peer, message.what) == (b"raw", "good")
            assert router.refused == BAD_REASONS

    play(scene)


def test_a_dealer_counts_bad_frames_and_never_answers_them() -> None:
    async def scene() -> None:
        with raw_router() as (raw, address):
            async with Dealer.connect(address, "actor-0") as dealer:
                await dealer.send(Done(what="hello"))
                assert raw.recv_multipart()[0] == b"actor-0"
                for frames in BAD:
                    raw.send_multipart([b"actor-0", *frames])
                raw.send_multipart([b"actor-0", *wire.encode(Done(what="good"))])
                assert (await dealer.receive(PATIENCE)).what == "good"
                assert dealer.refused == BAD_REASONS
                assert raw.poll(50) == 0

    play(scene)


def test_a_hub_counts_bad_frames_and_still_hears_the_next_good_message() -> None:
    with raw_router() as (raw, address), open_hub() as hub:
        hub.connect("queue", address, "engine-0")
        assert hub.send("queue", Done(what="hello"))
        raw.recv_multipart()
        for frames in BAD:
            raw.send_multipart([b"engine-0", *frames])
        raw.send_multipart([b"engine-0", *wire.encode(Done(what="good"))])
        [(name, message)] = drain(hub, 1)
        assert (name, message.what) == ("queue", "good")  # type: ignore[attr-defined]
        assert hub.refused == BAD_REASONS


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:0",
        "tcp://*:0",
        "tcp://*:5555",
        "tcp://[::]:0",
        "tcp://192.168.1.7:5555",
        "tcp://10.0.0.1:0",
        "tcp://eth0:0",
        "tcp://host.example:1",
        "TCP://127.0.0.1:0",
        "udp://127.0.0.1:1",
        "127.0.0.1:5555",
        "",
    ],
)
def test_an_address_that_others_can_reach_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="keys"):
        check_address(address)

    async def scene() -> None:
        with pytest.raises(ConfigError):
            Router.bind(address)

    play(scene)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1", "tcp://127.0.0.1:port", "tcp://127.evil.example:0", "ipc:///no/such/folder/x"]
)
def test_an_address_that_cannot_be_bound_is_a_configuration_error_that_names_it(address: str) -> None:
    async def scene() -> None:
        with pytest.raises(ConfigError, match=address):
            Router.bind(address)

    play(scene)


def test_a_port_above_65535_is_refused_and_not_folded_into_another() -> None:
    async def scene() -> None:
        with pytest.raises(ConfigError, match="99999"):
            Router.bind("tcp://127.0.0.1:99999").close()

    play(scene)


def test_a_port_in_use_is_a_configuration_error() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router:
            with pytest.raises(ConfigError, match="another port"):
                Router.bind(router.address)
            async with Dealer.connect(router.address, "a") as dealer:
                await dealer.send(Done(what="unharmed"))
                assert (await router.receive())[1].what == "unharmed"

    play(scene)


def test_an_ipc_address_needs_no_port(tmp_path: pathlib.Path) -> None:
    async def scene() -> None:
        address = f"ipc://{tmp_path}/s"
        async with Router.bind(address) as router, Dealer.connect(address, "a") as dealer:
            await dealer.send(Done(what="x"))
            assert (await router.receive())[0] == b"a"

    play(scene)


def test_sending_to_a_peer_that_never_was_or_is_gone_says_so() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router:
            assert not await router.send(b"nobody", Done(what="x"))
            async with Dealer.connect(router.address, "short") as dealer:
                await dealer.send(Done(what="x"))
                await router.receive()
                assert await router.send(b"short", Done(what="x"))
            end = time.monotonic() + PATIENCE
            while await router.send(b"short", Done(what="x")):
                assert time.monotonic() < end
                await asyncio.sleep(0.01)

    play(scene)


def test_a_restarted_peer_takes_its_name_over() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router, Dealer.connect(router.address, "engine-0") as old:
            await old.send(Done(what="old"))
            assert (await router.receive())[1].what == "old"
            async with Dealer.connect(router.address, "engine-0") as new:
                await new.send(Done(what="new"))
                assert (await router.receive())[1].what == "new"
                assert await router.send(b"engine-0", Done(what="to the new one"))
                assert (await new.receive(PATIENCE)).what == "to the new one"
                with pytest.raises(PeerTimeout):
                    await old.receive(0.1)

    play(scene)


def test_a_silent_peer_ends_in_a_timeout_that_names_it() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router, Dealer.connect(router.address, "a") as dealer:
            start = time.monotonic()
            with pytest.raises(PeerTimeout, match=router.address):
                await dealer.receive(0.1)
            assert 0.05 < time.monotonic() - start < PATIENCE
            await dealer.send(Done(what="x"))
            await router.receive()
            assert await router.send(b"a", Done(what="later"))
            assert (await dealer.receive(PATIENCE)).what == "later"

    play(scene)


def test_a_peer_that_sends_only_garbage_is_a_silent_peer() -> None:
    async def scene() -> None:
        with raw_router() as (raw, address):
            async with Dealer.connect(address, "a") as dealer:
                await dealer.send(Done(what="x"))
                raw.recv_multipart()
                for _ in range(50):
                    raw.send_multipart([b"a", b"\xc1"])
                with pytest.raises(PeerTimeout):
                    await dealer.receive(0.3)
                assert dealer.refused["not_msgpack"] == 50

    play(scene)


def test_a_request_gets_its_reply_or_says_what_came_instead_or_what_did_not() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router, Dealer.connect(router.address, "a") as dealer:

            async def answer(message: object) -> None:
                peer, _ = await router.receive()
                await router.send(peer, message)

            serving = asyncio.create_task(answer(Admit(groups=[3])))
            assert (await dealer.request(Done(what="x"), Admit, PATIENCE)).groups == [3]
            await serving
            serving = asyncio.create_task(answer(Refused(reason="fenced", detail="too old")))
            with pytest.raises(WireError, match="fenced") as caught:
                await dealer.request(Done(what="x"), Admit, PATIENCE)
            assert caught.value.reason == "unexpected_reply"
            await serving
            with pytest.raises(PeerTimeout, match="no Admit for Done"):
                await dealer.request(Done(what="x"), Admit, 0.05)

    play(scene)


def test_a_router_does_not_wait_for_a_peer_that_does_not_read() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router:
            with raw_dealer(router.address, b"slow", receive_mark=1) as raw:
                raw.send_multipart(wire.encode(Done(what="x")))
                await router.receive()
                message, sent = Done(what="x" * 16_000), 0
                while await router.send(b"slow", message):
                    sent += 1
                    assert sent < 20 * HIGH_WATER_MARK
                assert sent >= HIGH_WATER_MARK - 1
                async with Dealer.connect(router.address, "quick") as quick:
                    await quick.send(Done(what="x"))
                    await router.receive()
                    assert await router.send(b"quick", Done(what="not delayed"))
                    assert (await quick.receive(PATIENCE)).what == "not delayed"

    play(scene)


def test_a_hub_never_blocks_on_an_absent_peer() -> None:
    with open_hub() as hub:
        hub.connect("queue", "tcp://127.0.0.1:1", "engine-0")
        sent, start = 0, time.monotonic()
        while hub.send("queue", Done(what="x")):
            sent += 1
            assert sent <= HIGH_WATER_MARK
        assert sent == HIGH_WATER_MARK
        assert not hub.send("queue", Done(what="x"))
        assert time.monotonic() - start < PATIENCE


def test_what_a_hub_sent_before_its_peer_came_arrives_in_order(tmp_path: pathlib.Path) -> None:
    address = f"ipc://{tmp_path}/s"
    with open_hub() as hub, raw_router() as (router, _):
        hub.connect("queue", address, "engine-0")
        for n in range(20):
            assert hub.send("queue", Admit(groups=[n]))
        router.bind(address)
        assert [wire.decode(router.recv_multipart()[1:]).groups for _ in range(20)] == [[n] for n in range(20)]


def test_another_thread_wakes_a_hub_during_or_before_its_poll() -> None:
    with open_hub() as hub:
        start = time.monotonic()
        waker = threading.Timer(0.1, hub.wake)
        waker.start()
        assert list(hub.poll(PATIENCE)) == []
        assert 0.05 < time.monotonic() - start < PATIENCE / 2
        waker.join()
        hub.wake()
        hub.wake()
        assert list(hub.poll(PATIENCE)) == []
        assert time.monotonic() - start < PATIENCE / 2
        start = time.monotonic()
        assert list(hub.poll(0.1)) == []
        assert time.monotonic() - start >= 0.09


def test_a_hub_keeps_its_conversations_apart() -> None:
    with raw_router() as (queue, queue_address), raw_router() as (publisher, publisher_address), open_hub() as hub:
        hub.connect("queue", queue_address, "engine-0")
        hub.connect("publisher", publisher_address, "engine-0/0")
        hub.send("queue", Done(what="q"))
        hub.send("publisher", Done(what="p"))
        assert queue.recv_multipart()[0] == b"engine-0"
        assert publisher.recv_multipart()[0] == b"engine-0/0"
        queue.send_multipart([b"engine-0", *wire.encode(Admit(groups=[1]))])
        publisher.send_multipart([b"engine-0/0", *wire.encode(Admit(groups=[2]))])
        got = drain(hub, 2)
        assert {(name, *message.groups) for name, message in got} == {("queue", 1), ("publisher", 2)}  # type: ignore[attr-defined]


def test_a_wakeup_is_set_once_however_often_and_cleared_once() -> None:
    wakeup = Wakeup()
    assert not wakeup.clear()
    for _ in range(1000):
        wakeup.set()
    assert wakeup.clear()
    assert not wakeup.clear()


def test_a_flood_of_messages_does_not_starve_the_other_loops_of_a_process() -> None:
    async def scene() -> None:
        async with Router.bind(LOOPBACK) as router:
            stop = threading.Event()

            def flood() -> None:
                frames = wire.encode(Done(what="x"))
                with raw_dealer(router.address) as raw:
                    raw.setsockopt(zmq.SNDTIMEO, 50)
                    while not stop.is_set():
                        try:
                            raw.send_multipart(frames)
                        except zmq.Again:
                            continue

            flooding = threading.Thread(target=flood)
            flooding.start()
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.005)
                    ticks += 1

            ticking = asyncio.create_task(tick())
            try:
                await router.receive()
                await asyncio.sleep(0.2)
                ticks, received, end = 0, 0, time.monotonic() + 0.7
                while time.monotonic() < end:
                    await router.receive()
                    received += 1
            finally:
                stop.set()
                flooding.join()
                ticking.cancel()
            assert received > 100
            assert ticks > 10, f"{received} messages were taken while a loop that ticks every 5 ms ran {ticks} times"

    play(scene)
