"""The queue as a peer sees it, on a real socket, with faults on demand.

`taken` is its journal: it alone survives `kill`.  While `holding`, numbered messages are heard and neither journaled
nor acknowledged, as between two group commits.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from stream_rl import config
from stream_rl.messages import Ack, Admit, Hello, OpenGroup, Refused, Welcome
from stream_rl.session import Session
from stream_rl.transport import Dealer, Router

M = TypeVar("M")
PATIENCE = 60.0
RETRY = 0.05
HELLO = Hello(run="r", role="actor", name="actor-0", incarnation=1, pid=1)


class FakeQueue:
    def __init__(self) -> None:
        self.address = "tcp://127.0.0.1:0"
        self.taken: list[Any] = []
        self.heard: list[Any] = []
        """Everything that has no number, Hello among it."""
        self.holding = False
        self.answer: Callable[[Any], list[Any]] = lambda message: []
        """What to say to a message without a number, beside Welcome."""
        self.after_welcome: Callable[[Hello, bool], list[Any]] = lambda hello, new: []
        self.welcome: Callable[[Hello], dict[str, Any]] = lambda hello: {}
        self.fault: Callable[[Any], str] = lambda message: ""
        """For a numbered message: lose, twice, late (after the next), silent (no Ack), old (an Ack of the past too)."""
        self._counts: Counter[bytes] = Counter()
        self._names: dict[str, int] = {}
        self._peers: dict[str, bytes] = {}
        self._late: list[tuple[bytes, Any]] = []
        self._admitted: dict[int, None] = {}
        """Said to be, since the start: a Hello may come twice, and its second Welcome must not take them back."""
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def start(self) -> None:
        """On the same port as before."""
        self.router = Router.bind(self.address)
        self.address = self.router.address
        self._serving = asyncio.create_task(self._serve())

    async def kill(self) -> None:
        """Everything but the journal is lost, connections among it."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self.router.close()
        self._peers.clear()
        self._late.clear()
        self._admitted.clear()

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    async def say(self, *messages: Any) -> None:
        """To the newest incarnation of everyone."""
        for message in messages:
            if isinstance(message, Admit):
                self._admitted |= dict.fromkeys(message.groups)
            for peer in self._peers.values():
                assert await self.router.send(peer, message)

    async def until(self, reached: Callable[[], Any]) -> None:
        """Wait for messages to have made it so."""
        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(reached)
        except TimeoutError:
            raise AssertionError(f"not reached; taken: {self.taken}; heard: {self.heard[-5:]}") from None

    async def nth(self, kind: type[M], count: int = 1) -> M:
        """The count-th journaled message of a type, when it is there."""
        await self.until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in [*self.taken, *self.heard] if isinstance(message, kind)]

    async def _serve(self) -> None:
        while True:
            peer, message = await self.router.receive()
            await self._take(peer, message)
            async with self._changed:
                self._changed.notify_all()

    async def _take(self, peer: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            await self.greet(peer, message)
        elif peer not in self._peers.values():
            await self.router.send(peer, Refused(reason="not_registered", detail="say Hello"))
        elif hasattr(message, "sequence"):
            await self._number(peer, message, self.fault(message))
        else:
            self.heard.append(message)
            for answer in self.answer(message):
                await self.router.send(peer, answer)

    async def greet(self, peer: bytes, hello: Hello) -> None:
        """What Hello leads to; a test may put another answer in its place."""
        self.heard.append(hello)
        self._peers[hello.name] = peer
        new = self._names.get(hello.name, 0) < hello.incarnation
        self._names[hello.name] = hello.incarnation
        if new:
            self._admitted.clear()
        opened = {opening.group for opening in self.of(OpenGroup)}
        admitted = [group for group in self._admitted if group not in opened]
        known = {"run": hello.run, "next_sequence": self._counts[peer], "admitted": admitted}
        fields = known | self.welcome(hello)
        for message in [Welcome(**fields), *self.after_welcome(hello, new)]:
            await self.router.send(peer, message)

    async def _number(self, peer: bytes, message: Any, fault: str) -> None:
        if self.holding or fault == "lose":
            return
        if fault == "late":
            self._late.append((peer, message))
            return
        ahead = message.sequence > self._counts[peer]
        if message.sequence == self._counts[peer]:
            self._counts[peer] += 1
            self.taken.append(message)
        acks = [Ack(next_sequence=self._counts[peer], resend=ahead)]
        if fault == "old":
            acks = [*acks, Ack(next_sequence=max(0, self._counts[peer] - 3)), *acks]
        for ack in acks if fault != "silent" else []:
            await self.router.send(peer, ack)
        if fault == "twice":
            await self._number(peer, message, "")
        for late in self._late[:1]:
            self._late.clear()
            await self._number(*late, "")


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene that must end; a hang is a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def talking(
    queue: FakeQueue, *, retry: float = RETRY, patience: float = 20.0, **options: Any
) -> AsyncIterator[Session]:
    """A session that has started and runs; what ends it is raised here."""
    supervise = config.Supervise(retry_s=retry, peer_timeout_s=patience)
    async with Dealer.connect(queue.address, "actor-0@1") as dealer:
        peer = Session(dealer, HELLO, supervise, **options)
        await peer.start()
        async with asyncio.TaskGroup() as loops:
            running = loops.create_task(peer.run())
            yield peer
            running.cancel()
