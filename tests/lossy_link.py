"""A network between engines and their publisher that loses, repeats, reorders and corrupts what is on the way."""

import asyncio
import random
from collections import Counter
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

Frames = list[bytes]
FAULTS = ("lost", "repeated", "late", "corrupt")
LATE_SECONDS = 0.05


class LossyLink:
    """Engines connect to `address`; each gets a connection of its own, under its own name, to the publisher.

    Corruption only meets parts of updates, since everything else is short and left to TCP's checksum.
    """

    def __init__(self, publisher: str, seed: int, share: float) -> None:
        """share: of all messages, that each fault meets."""
        self._publisher, self._random, self._share = publisher, random.Random(seed), share
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind("tcp://127.0.0.1:0")
        self.address: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._dealers: dict[bytes, zmq.asyncio.Socket] = {}
        self.met: Counter[str] = Counter()
        """Messages by what happened to them."""

    async def __aenter__(self) -> Self:
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._loops = [self._tasks.create_task(self._up())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loop in self._loops:
            loop.cancel()
        await self._tasks.__aexit__(None, None, None)
        for socket in (self._router, *self._dealers.values()):
            socket.close(0)
        self._context.term()

    async def _up(self) -> None:
        while True:
            peer, *frames = await self._router.recv_multipart()
            if peer not in self._dealers:
                dealer = self._dealers[peer] = self._context.socket(zmq.DEALER)
                dealer.setsockopt(zmq.IDENTITY, peer)
                dealer.setsockopt(zmq.LINGER, 0)
                dealer.connect(self._publisher)
                self._loops.append(self._tasks.create_task(self._down(peer)))
            self._pass(self._dealers[peer], [], frames)

    async def _down(self, peer: bytes) -> None:
        while True:
            self._pass(self._router, [peer], await self._dealers[peer].recv_multipart())

    def _pass(self, socket: "zmq.asyncio.Socket", to: Frames, frames: Frames) -> None:
        fault = next((name for name in FAULTS if self._random.random() < self._share), "")
        if fault == "corrupt" and b"UpdatePart" not in frames[0][:64]:
            fault = ""
        self.met[fault or "passed"] += 1
        if fault == "lost":
            return
        if fault == "corrupt":
            frames = self._corrupted(frames)
        if fault == "late":
            asyncio.get_running_loop().call_later(self._random.random() * LATE_SECONDS, self._send, socket, to + frames)
            return
        for _ in range(2 if fault == "repeated" else 1):
            self._send(socket, to + frames)

    def _send(self, socket: "zmq.asyncio.Socket", frames: Frames) -> None:
        if socket.closed:
            return
        try:
            socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError:  # nobody is there at this moment
            self.met["nobody"] += 1

    def _corrupted(self, frames: Frames) -> Frames:
        which = max(range(len(frames)), key=lambda i: len(frames[i])) if self._random.random() < 0.8 else 0
        changed = bytearray(frames[which])
        if changed:
            changed[self._random.randrange(len(changed))] ^= self._random.randrange(1, 256)
        return [*frames[:which], bytes(changed), *frames[which + 1 :]]
