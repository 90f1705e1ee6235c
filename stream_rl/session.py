"""A peer's side of its conversation with the queue, over any number of restarts of the queue.

- Posted messages are numbered and kept until the queue has them in its journal; requests are repeated until they are
  answered; the rest is sent once.
- A restarted queue answers `not_registered`: it hears the same Hello again, its Welcome says from where to send again.
- A queue that refuses this peer for good (a newer incarnation runs, another run's queue answers) ends it.

What travels on one connection keeps its order, in both directions; everything here rests on that, and on the queue
taking a numbered message only when it has all before it.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError, WireError
from stream_rl.messages import Ack, Alive, Done, Hello, Lease, Refused, Welcome
from stream_rl.transport import Dealer

log = logging.getLogger(__name__)
ALIVE_SECONDS = 1.0
FOR_GOOD = frozenset({"fenced", "other_run", "unknown_role", "role_changed", "bad_name"})
"""Reasons to refuse a peer that no repetition changes."""
MAX_UNACKNOWLEDGED = 1024
"""Posted messages kept.  A fraction of the socket's high-water mark, so that all of them fit into it once more while
the queue is away; at a few hundred a second it is seconds of a queue that is away before `post` waits."""
MAX_UNRECEIVED = 1024
"""Messages that wait for `receive`; beyond, they wait in the socket and in the queue's."""

M = TypeVar("M")


class Session:
    """`await session.start()`, then give `run` to the process's loops; all else may be called from any of them."""

    welcome: Welcome
    """The last one."""

    def __init__(self, dealer: Dealer, hello: Hello, supervise: config.Supervise, *, heartbeat: bool = True) -> None:
        """Without `heartbeat` the peer has something of its own to say each second."""
        self._dealer, self._hello, self._supervise, self._heartbeat = dealer, hello, supervise, heartbeat
        self._greeted: float | None = None
        """When Hello was said, until Welcome comes."""
        self._outbox: deque[Any] = deque()
        """Posted and not acknowledged: sequences without gaps, up to the one before `_next`."""
        self._next = 0
        self._settled = asyncio.Condition()
        self._sent_again = (-1, 0.0)
        """From which sequence everything was sent again, and when."""
        self._inbox: asyncio.Queue[Any] = asyncio.Queue(MAX_UNRECEIVED)
        self._turn = asyncio.Lock()
        self._asked: tuple[Any, type[Any], asyncio.Future[Any]] | None = None
        """The request under way, the type of its reply, and where the reply goes."""

    async def start(self) -> Welcome:
        """Register.  Raises PeerTimeout if no queue answers, StreamRLError if it refuses this peer for good."""
        timeout = self._supervise.peer_timeout_s
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._dealer.send(self._hello)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._supervise.retry_s):
                            return await self._first_welcome()
        except TimeoutError:
            raise PeerTimeout(
                f"no queue at {self._dealer.address} welcomed {self._hello.name} in {timeout} s"
            ) from None

    async def run(self) -> None:
        """Consumes: everything that the queue says.  Waits for: the next message, and the clock.  Produces: replies to
        `request`, room for `post`, the rest for `receive`.  Unblocked by: the queue.

        Raises StreamRLError when the queue refuses this peer for good.
        """
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._listen(), name="listen")
                loops.create_task(self._send_again_when_stuck(), name="resend")
                if self._heartbeat:
                    loops.create_task(self._beat(), name="heartbeat")
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def receive(self) -> Any:
        """The next message that is neither an acknowledgement nor a reply; each Welcome after the first is one.

        Who receives must not wait for `post` or `request` before it receives again: their answers come the same way.
        """
        return await self._inbox.get()

    async def request(self, message: Any, reply: type[M], timeout: float | None = None) -> M:
        """Send until a `reply` comes, one request at a time.

        Raises PeerTimeout after `timeout` seconds (by default supervise.peer_timeout_s), WireError with the queue's
        reason if it refuses.
        """
        timeout = self._supervise.peer_timeout_s if timeout is None else timeout
        async with self._turn:
            answer: asyncio.Future[M] = asyncio.get_running_loop().create_future()
            self._asked = (message, reply, answer)
            try:
                async with asyncio.timeout(timeout):
                    while not answer.done():
                        await self._dealer.send(message)
                        await asyncio.wait([answer], timeout=self._supervise.retry_s)
            except TimeoutError:
                what = f"no {reply.__name__} for {type(message).__name__}"
                raise PeerTimeout(f"{what} from the queue at {self._dealer.address} in {timeout} s") from None
            finally:
                self._asked = None
            return answer.result()

    async def post(self, make: Callable[[int], Any]) -> int:
        """Number a message, keep it until the queue has it, and return its number.  Waits while too many are kept, for
        as long as the queue is away: how long that may be is the supervisor's to say."""
        async with self._settled:
            await self._settled.wait_for(lambda: len(self._outbox) < MAX_UNACKNOWLEDGED)
            sequence = self._next
            message = make(sequence)
            self._outbox.append(message)
            self._next += 1
        if self._greeted is None:  # or else Welcome is about to send all of them
            await self._dealer.send(message)
        return sequence

    async def acknowledged(self, sequence: int) -> None:
        """Return when the queue has the message that was posted under this number; waits as `post` does."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._first > sequence)

    async def send(self, message: Any) -> None:
        """Send once; lost if the queue is away."""
        await self._dealer.send(message)

    async def drained(self) -> None:
        """Return when the queue has everything that was posted.  Raises PeerTimeout after supervise.peer_timeout_s."""
        timeout = self._supervise.peer_timeout_s
        try:
            async with asyncio.timeout(timeout):
                await self.acknowledged(self._next - 1)
        except TimeoutError:
            raise PeerTimeout(f"the queue left {len(self._outbox)} messages unacknowledged for {timeout} s") from None

    @property
    def _first(self) -> int:
        """The first sequence that is not acknowledged."""
        return self._next - len(self._outbox)

    async def _first_welcome(self) -> Welcome:
        while True:
            match message := await self._dealer.receive():
                case Welcome():
                    await self._settle(message.next_sequence)
                    self.welcome = message
                    return message
                case Refused() if message.reason in FOR_GOOD:
                    raise self._refused(message)
                case Refused():
                    log.warning("the queue refused Hello: %s: %s", message.reason, message.detail)

    async def _listen(self) -> None:
        while True:
            match message := await self._dealer.receive():
                case Ack():
                    await self._settle(message.next_sequence)
                    if message.resend and self._may_send_again():
                        await self._send_all_again()
                case Welcome():
                    await self._welcomed(message)
                case Refused(reason="not_registered"):
                    await self._register()
                case Refused() if message.reason in FOR_GOOD:
                    raise self._refused(message)
                case Refused() if self._asked is not None and not self._asked[2].done():
                    self._asked[2].set_exception(WireError(message.reason, message.detail))
                case _ if self._asked is not None and _answers(message, *self._asked[:2]):
                    if not self._asked[2].done():
                        self._asked[2].set_result(message)
                case Done() | Lease():
                    pass  # the second answer to a request that was sent twice
                case _:
                    await self._inbox.put(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            await self._dealer.send(Alive())

    async def _send_again_when_stuck(self) -> None:
        """The newest tells most: if the queue misses one before it, it asks for all of them."""
        stuck = -1
        while True:
            await asyncio.sleep(self._supervise.retry_s)
            if self._outbox and self._first == stuck:
                await self._dealer.send(self._outbox[-1])
            stuck = self._first

    async def _register(self) -> None:
        """Everything that was on its way to a restarted queue is answered with `not_registered`: one Hello will do."""
        now = asyncio.get_running_loop().time()
        if self._greeted is None or now - self._greeted >= self._supervise.retry_s:
            log.info("the queue at %s has restarted; registering again", self._dealer.address)
            self._greeted = now
            await self._dealer.send(self._hello)

    async def _welcomed(self, welcome: Welcome) -> None:
        if welcome.next_sequence < self._first:
            raise StreamRLError(
                f"the queue had acknowledged {self._first} messages of {self._hello.name} and now has "
                f"{welcome.next_sequence}: its journal was lost or replaced; start the run again"
            )
        await self._settle(welcome.next_sequence)
        self.welcome, self._greeted = welcome, None
        await self._send_all_again()
        if self._asked is not None:
            await self._dealer.send(self._asked[0])
        await self._inbox.put(welcome)

    async def _settle(self, next_sequence: int) -> None:
        """Forget what the queue has."""
        if next_sequence > self._next:
            raise StreamRLError(
                f"the queue has {next_sequence} messages of {self._hello.name}@{self._hello.incarnation}, which posted "
                f"{self._next}: another process has used this incarnation; start it with a higher one"
            )
        async with self._settled:
            while self._first < next_sequence:
                self._outbox.popleft()
            self._settled.notify_all()

    def _may_send_again(self) -> bool:
        """Each message after a lost one asks for it again; one answer to all of them, or n messages would make n^2."""
        first, when = self._sent_again
        return first != self._first or asyncio.get_running_loop().time() - when >= self._supervise.retry_s

    async def _send_all_again(self) -> None:
        self._sent_again = (self._first, asyncio.get_running_loop().time())
        for message in list(self._outbox):
            await self._dealer.send(message)

    def _refused(self, refused: Refused) -> StreamRLError:
        who = f"{self._hello.role} {self._hello.name}, incarnation {self._hello.incarnation}"
        return StreamRLError(f"the queue refused this {who}: {refused.reason}: {refused.detail}")


def _answers(message: Any, request: Any, reply: type[Any]) -> bool:
    """Whether `message` is the reply to this request, and not a late one to an earlier request."""
    if type(message) is not reply:
        return False
    if isinstance(message, Done):
        return message.what == type(request).__name__
    step = getattr(message, "step", None)
    return step is None or bool(step == getattr(request, "step", step))
