"""ZeroMQ: DEALER to ROUTER, asyncio on our side and one plain thread inside somebody else's process.

- Sockets are owned by one thread: the event loop's, or the `ThreadHub`'s.  Other threads only wake it.
- `LINGER` is 0 (a process ends at once; what must not be lost is acknowledged and resent), `ROUTER_MANDATORY` and
  `ROUTER_HANDOVER` are set (sending to a peer that is gone says so; a restarted peer takes its name over).
- Bad frames are refused and counted, never raised into a loop and never answered.
- Only loopback and ipc addresses are accepted: traffic is neither authenticated nor encrypted yet.
"""

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq
import zmq.asyncio

from stream_rl import wire
from stream_rl.errors import ConfigError, PeerTimeout, WireError

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 2048
"""Messages queued per peer and direction.  A peer this far behind is treated as gone (ROUTER) or slows its sender
(DEALER); at a few hundred kilobytes a message it bounds memory far below a machine's."""

YIELD_EVERY = 32
"""Messages received in a row before other loops get their turn: a few milliseconds' worth."""

M = TypeVar("M")


def check_address(address: str) -> None:
    """Raises ConfigError for an address that another machine could reach."""
    if address.startswith("tcp://") and not 0 <= _port(address) <= 65535:
        raise ConfigError(f"{address!r}: a port is a number from 0 (any free one) to 65535")
    if address.startswith(("ipc://", "inproc://", "tcp://127.", "tcp://localhost:")):
        return
    raise ConfigError(
        f"{address!r} can be reached from other machines, and this traffic has no keys (CURVE) yet; "
        "bind to tcp://127.0.0.1:PORT or ipc://PATH"
    )


def _port(address: str) -> int:
    """The port of a tcp address, -1 if it is no number; ZeroMQ itself folds 99999 into 34463."""
    text = address.rpartition(":")[2]
    return int(text) if text.isascii() and text.isdigit() else 0 if text == "*" else -1


def _prepare(socket: "zmq.Socket[Any]") -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_ARRAY_BYTES)


class _Context(zmq.Context[zmq.Socket[bytes]]):
    """One that was never closed is leaked when it is collected: pyzmq would wait there, with the whole process, until
    sockets are closed that are collected after it."""

    def __del__(self) -> None:
        pass


class _AsyncContext(zmq.asyncio.Context):
    """The same, of the running event loop."""

    def __del__(self) -> None:
        pass


class _AsyncSocket:
    """A socket of the running event loop, and the context that it lives in."""

    def __init__(self, kind: int) -> None:
        self._context = _AsyncContext()
        self._socket = self._context.socket(kind)
        _prepare(self._socket)
        self.refused: Counter[str] = Counter()
        self._received = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    async def _frames(self) -> list[bytes]:
        """A message that is already here is received without a turn of the event loop, so a flood of them would
        starve every other loop of the process: let the others run now and then."""
        self._received += 1
        if self._received % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        frames: list[bytes] = await self._socket.recv_multipart()
        return frames

    def _decoded(self, frames: list[bytes]) -> Any | None:
        try:
            return wire.decode(frames)
        except WireError as error:
            self.refused[error.reason] += 1
            log.warning("refused a message: %s", error)
            return None


class Router(_AsyncSocket):
    """The side that is bound and knows its peers by the identity that they chose."""

    def __init__(self, address: str) -> None:
        check_address(address)
        super().__init__(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind {address}: {error}; choose another port") from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @classmethod
    def bind(cls, address: str) -> Self:
        """Bind; port 0 means any free one, and `address` then holds the real one."""
        return cls(address)

    async def receive(self) -> tuple[bytes, Any]:
        """The next well-formed message and the identity of its sender."""
        peer, message, _ = await self.receive_raw()
        return peer, message

    async def receive_raw(self) -> tuple[bytes, Any, list[bytes]]:
        """As `receive`, and the frames that the message came in."""
        while True:
            peer, *frames = await self._frames()
            if (message := self._decoded(frames)) is not None:
                return peer, message, frames

    async def send(self, peer: bytes, message: Any) -> bool:
        """False if the peer is gone or hopelessly behind; the message is then dropped."""
        try:
            await self._socket.send_multipart([peer, *wire.encode(message)], flags=zmq.NOBLOCK)
        except zmq.Again:
            log.warning("peer %r is %d messages behind; dropped a %s", peer, HIGH_WATER_MARK, type(message).__name__)
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True


class Dealer(_AsyncSocket):
    """The side that connects.  One conversation with one Router."""

    def __init__(self, address: str, identity: str) -> None:
        super().__init__(zmq.DEALER)
        self.address = address
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.connect(address)

    @classmethod
    def connect(cls, address: str, identity: str) -> Self:
        return cls(address, identity)

    async def send(self, message: Any) -> None:
        """Waits while the Router is a full high-water mark behind."""
        await self._socket.send_multipart(wire.encode(message))

    async def receive(self, timeout: float | None = None) -> Any:
        """The next well-formed message.  Raises PeerTimeout after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    if (message := self._decoded(await self._frames())) is not None:
                        return message
        except TimeoutError:
            raise PeerTimeout(f"{self.address} sent nothing for {timeout} s") from None

    async def request(self, message: Any, reply: type[M], timeout: float) -> M:
        """Send, then wait for a `reply`.  For conversations in which nothing else can come."""
        try:
            async with asyncio.timeout(timeout):
                await self.send(message)
                answer = await self.receive()
        except TimeoutError:
            what = f"no {reply.__name__} for {type(message).__name__}"
            raise PeerTimeout(f"{what}: {self.address} sent nothing for {timeout} s") from None
        if not isinstance(answer, reply):
            raise WireError("unexpected_reply", f"expected {reply.__name__} from {self.address}, got {answer!r}")
        return answer


class Wakeup:
    """Wakes a thread that waits on file descriptors.  `set` may be called from any thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> bool:
        """True if it was set."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True


class ThreadHub:
    """DEALER sockets of one plain thread inside a process that is not ours.

    Make it, connect, poll and send from that one thread; `wake` from any.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._context = _Context()
        self._poller = zmq.Poller()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._wakeup = Wakeup()
        self._poller.register(self._wakeup.fileno(), zmq.POLLIN)
        self.refused: Counter[str] = Counter()

    def connect(self, name: str, address: str, identity: str) -> None:
        """Open the conversation `name`."""
        socket = self._context.socket(zmq.DEALER)
        _prepare(socket)
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.connect(address)
        self._poller.register(socket, zmq.POLLIN)
        self._sockets[name] = socket

    def wake(self) -> None:
        """Make the current or next `poll` return.  Any thread."""
        self._wakeup.set()

    def send(self, name: str, message: Any) -> bool:
        """False if the peer is a full high-water mark behind; never blocks."""
        assert threading.get_ident() == self._owner
        try:
            self._sockets[name].send_multipart(wire.encode(message), flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def poll(self, timeout: float) -> Iterator[tuple[str, Any]]:
        """Messages that are here, after waiting at most `timeout` seconds for the first or for a wake-up."""
        ready = dict(self._poller.poll(max(0, int(timeout * 1000))))
        self._wakeup.clear()
        for name, socket in self._sockets.items():
            if socket not in ready:
                continue
            while True:
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    yield name, wire.decode(frames)
                except WireError as error:
                    self.refused[error.reason] += 1
                    log.warning("refused a message from %s: %s", name, error)

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()
        self._context.term()
