"""The plugin's thread and its conversation with the queue, over real sockets: the queue is killed, and nothing is lost,
doubled or piled up; a queue that has no use for this engine any more ends it."""

import asyncio
import dataclasses
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from engine_builders import plugin_settings
from fake_queue import FakeQueue
from plugin_host import PluginHost, assert_streamed
from weights_builders import RUN

from engines.sglang.queue_conversation import HELLO_SECONDS, QueueConversation, RefusedForGood
from engines.sglang.streaming import Row
from stream_rl.errors import EngineError
from stream_rl.messages import Ack, Chunks, EngineStats, Hello, Refused, Welcome
from stream_rl.session import FOR_GOOD
from stream_rl.types import Finish, Version


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene that must end; a hang is a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(bounded())


def streamed(queue: FakeQueue, host: PluginHost) -> Callable[[], bool]:
    """Every request's last row is in."""
    return lambda: sum(bool(f) for chunks in queue.of(Chunks) for f in chunks.finishes) == len(host.requests)


def test_generation_goes_on_while_the_queue_is_away_until_the_buffer_is_full_and_nothing_is_lost() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, PluginHost(queue.address, buffer_bytes=8_000) as host:
            host.add(10)
            await queue.nth(Chunks, 5)
            await queue.kill()
            before = host.stream.tokens
            await host.until(host.thread.is_full)
            assert host.stream.tokens > before + 100, "it went on"
            await host.after(2)
            held, sampled = host.stream.tokens, host.tokens
            await host.after(100)
            assert host.thread.is_full() and host.stream.tokens == held, "tokens wait in their requests"
            assert host.tokens >= sampled + 1000, "and the engine goes on"
            await queue.start()
            await host.until(lambda: host.stream.tokens > held)
            host.finish()
            await queue.until(streamed(queue, host))
            assert_streamed(queue.of(Chunks), host.requests)
            assert host.counters.faults == 0

    play(scene)


@pytest.mark.parametrize("seed", range(3))
def test_a_queue_that_is_killed_again_and_again_and_loses_and_repeats_gets_every_token_once(seed: int) -> None:
    rng = random.Random(seed)

    async def scene() -> None:
        async with FakeQueue() as queue, PluginHost(queue.address, buffer_bytes=1 << 16) as host:
            queue.fault = lambda _: rng.choice(["", "", "", "lose", "twice", "late", "silent", "old"])
            for _ in range(6):
                host.add(3)
                await host.after(rng.randrange(60))
                queue.holding = rng.random() < 0.5
                await host.after(rng.randrange(60))
                await queue.kill()
                await host.after(rng.randrange(200))
                queue.holding = False
                await queue.start()
            host.finish()
            await queue.until(streamed(queue, host))
            assert_streamed(queue.of(Chunks), host.requests)
            assert [chunks.sequence for chunks in queue.of(Chunks)] == list(range(len(queue.of(Chunks))))
            assert host.counters.faults == 0

    play(scene)


def test_a_restarted_queue_hears_hello_soon_and_statistics_go_on() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, PluginHost(queue.address):
            await queue.nth(EngineStats, 2)
            await queue.restart()
            queue.heard.clear()
            async with asyncio.timeout(10):
                await queue.nth(Hello)
                await queue.nth(EngineStats, 2)
            assert queue.of(Hello)[0].incarnation == 1 and len(queue.of(Hello)) == 1

    play(scene)


@pytest.mark.parametrize("reason", ["fenced", "other_run"])
def test_an_engine_that_the_queue_refuses_for_good_ends_its_launcher(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, PluginHost(queue.address) as host:
            await queue.nth(EngineStats)
            await queue.say(Refused(reason="bad_stats", detail="no reason to end"))
            await queue.nth(EngineStats, 3)
            assert host.launcher.poll() is None
            await queue.say(Refused(reason=reason, detail="engine-0 is at incarnation 2"))
            assert await asyncio.to_thread(host.launcher.wait, 10) == -signal.SIGQUIT
            assert host.counters.faults == 0

    play(scene)
    [line] = [record for record in caplog.messages if "this engine ends" in record]
    assert reason in line and "engine-0 is at incarnation 2" in line


def test_a_queue_that_forgot_what_it_had_acknowledged_is_a_fault_that_is_said() -> None:
    async def scene() -> None:
        async with FakeQueue() as queue, PluginHost(queue.address) as host:
            host.add(2)
            await queue.nth(Chunks, 3)
            queue.welcome = lambda _: {"next_sequence": 0}
            await queue.restart()
            queue.heard.clear()
            await queue.until(lambda: any(stats.counters["faults"] == 1 for stats in queue.of(EngineStats)))
            assert host.counters.faults == 1 and host.launcher.poll() is None

    play(scene)


# -- the conversation alone --------------------------------------------------------------------------------------------


class Wire:
    """What an engine says, and time."""

    def __init__(self, **changes: Any) -> None:
        self.said: list[Any] = []
        self.open = True
        self.now = 100.0
        self.conversation = QueueConversation(plugin_settings(**changes), self._send, self._stats)

    def _send(self, message: Any) -> bool:
        if self.open:
            self.said.append(message)
        return self.open

    def _stats(self) -> EngineStats:
        return EngineStats(engine="engine-0", incarnation=1, version=Version(0, 0), counters={}, histograms={})

    def hear(self, *messages: Any) -> None:
        for message in messages:
            self.conversation.handle(message, self.now)

    def add(self, member: int = 0) -> None:
        self.conversation.add([Row(f"r/0/{member}/0.", 0, [1], [0.0], ((Version(0, 0), 1),), Finish.STOP)], self.now)

    def wait(self, seconds: float) -> list[str]:
        """Let time pass as the thread does; the types of what was said."""
        before, end = len(self.said), self.now + seconds
        while self.now < end:
            due = self.conversation.tick(self.now)
            assert due > self.now, "it would be called again at once, for ever"
            self.now = min(end, due)
        return [type(message).__name__ for message in self.said[before:]]


NOT_REGISTERED = Refused(reason="not_registered", detail="")


def welcome(next_sequence: int = 0) -> Welcome:
    return Welcome(run=RUN, next_sequence=next_sequence)


def test_hello_is_said_each_second_until_it_is_answered_and_nothing_else() -> None:
    wire = Wire()
    wire.add()
    assert wire.wait(3 * HELLO_SECONDS) == ["Hello"] * 3
    wire.hear(welcome())
    assert wire.wait(0.1) == ["Chunks", "EngineStats"]
    assert wire.said[0].address == "http://127.0.0.1:1"


def test_many_not_registered_are_one_hello() -> None:
    wire = Wire()
    wire.hear(welcome())
    wire.wait(1.0)
    wire.hear(*[NOT_REGISTERED] * 50)
    wire.add()
    assert wire.wait(0.5) == ["Hello"]
    wire.hear(*[NOT_REGISTERED] * 50)
    assert wire.wait(0.4) == []
    wire.hear(welcome())
    assert "Chunks" in wire.wait(0.1)


def test_everything_unacknowledged_is_sent_again_from_where_the_restarted_queue_goes_on() -> None:
    wire = Wire()
    wire.hear(welcome())
    for member in range(5):
        wire.add(member)
    wire.wait(0.1)
    wire.hear(Ack(next_sequence=2))
    wire.said.clear()
    wire.hear(NOT_REGISTERED)
    wire.wait(0.1)
    wire.hear(welcome(3))
    wire.wait(0.1)
    assert [message.sequence for message in wire.said if isinstance(message, Chunks)] == [3, 4]


def test_what_is_said_to_a_queue_that_is_away_stays_small_and_ends_where_the_socket_is_full() -> None:
    wire = Wire()
    wire.hear(welcome())
    for member in range(50):
        wire.add(member)
    said = wire.wait(60.0)
    assert said.count("Chunks") <= 50 + 60, "each once, then one a second"
    assert said.count("EngineStats") <= 121
    wire.open = False
    assert wire.wait(60.0) == []
    wire.open = True
    wire.hear(Ack(next_sequence=50))
    assert wire.conversation.unacknowledged_bytes == 0


@pytest.mark.parametrize("reason", sorted(FOR_GOOD))
def test_a_refusal_for_good_ends_the_conversation_and_no_other_does(reason: str) -> None:
    wire = Wire()
    wire.hear(Refused(reason="bad_stats", detail=""))
    with pytest.raises(RefusedForGood, match=reason):
        wire.hear(Refused(reason=reason, detail="why"))


def test_a_message_that_the_queue_has_no_business_sending_changes_nothing() -> None:
    wire = Wire()
    wire.hear(welcome())
    wire.hear(Hello(run=RUN, role="engine", name="engine-0", incarnation=1, pid=1))
    wire.add()
    assert "Chunks" in wire.wait(0.1)
    with pytest.raises(EngineError, match="was lost or replaced"):
        wire.hear(Ack(next_sequence=1), dataclasses.replace(welcome(), next_sequence=0))
