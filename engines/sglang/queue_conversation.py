"""An engine's side of its conversation with the queue: who it is, its chunks until the queue has them, its counters.

The queue may be restarted at any time: whatever it hears it then answers with `not_registered`, hears Hello again, and
says in its Welcome from which chunk message to go on.  Until that Welcome nothing but Hello is said, so that what waits
in the socket for a queue that is away stays small.  Pure: messages and times in, messages out through `send`.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from engines.sglang.outbox import Outbox
from engines.sglang.plugin import PluginSettings
from engines.sglang.streaming import Row
from stream_rl.errors import EngineError
from stream_rl.messages import Ack, EngineStats, Hello, Refused, Welcome
from stream_rl.session import FOR_GOOD

log = logging.getLogger("stream_rl.plugin")
HELLO_SECONDS = 1.0
STATS_SECONDS = 0.5


class RefusedForGood(EngineError):
    """The run goes on without this process, which must end."""


class QueueConversation:
    """Rank 0 of an engine speaks for all of it."""

    def __init__(self, settings: PluginSettings, send: Callable[[Any], bool], stats: Callable[[], EngineStats]) -> None:
        """`send` never blocks, and says whether the message left; `stats` reads the counters."""
        self._settings, self._send, self._stats = settings, send, stats
        self._outbox = Outbox(settings.run, settings.engine, settings.incarnation, settings.resend_seconds)
        self._welcome = False
        self._hello_due = self._stats_due = 0.0

    @property
    def unacknowledged_bytes(self) -> int:
        """Size of the chunks that the queue does not have, about."""
        return self._outbox.bytes

    def add(self, rows: list[Row], now: float) -> None:
        """Chunks to send, in order."""
        self._outbox.add(rows, now)

    def handle(self, message: Any, now: float) -> None:
        """What the queue says.  Raises RefusedForGood; EngineError if what it says cannot be."""
        match message:
            case Ack():
                self._outbox.acknowledge(message.next_sequence, message.resend, now)
            case Welcome():
                self._outbox.welcome(message.next_sequence, now)
                self._welcome = True
            case Refused(reason="not_registered"):
                self._welcome = False
            case Refused() if message.reason in FOR_GOOD:
                raise RefusedForGood(f"the queue refused this engine: {message.reason}: {message.detail}")
            case Refused():
                log.error("the queue refused: %s: %s", message.reason, message.detail)
            case _:
                log.warning("the queue sent a %s, which an engine has no use for", type(message).__name__)

    def tick(self, now: float) -> float:
        """Say what is due.  Returns when to call again, at the latest."""
        if not self._welcome:
            if now >= self._hello_due:
                self._hello_due = now + HELLO_SECONDS
                self._send(self._hello())
            return self._hello_due
        self._outbox.resend_overdue(now)
        while (message := self._outbox.next_to_send()) is not None and self._send(message):
            self._outbox.sent()
        if now >= self._stats_due:
            self._stats_due = now + STATS_SECONDS
            self._send(self._stats())
        return self._stats_due

    def _hello(self) -> Hello:
        s = self._settings
        return Hello(
            run=s.run,
            role="engine",
            name=s.engine,
            incarnation=s.incarnation,
            pid=os.getpid(),
            address=s.http_address,
        )
