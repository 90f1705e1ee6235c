"""One rank's side of its conversation with the publisher: which weights it holds, updates staged, commits reported.

The publisher may be restarted at any time, and knows nothing then: it answers whatever it hears with `unknown_engine`,
and hears EngineHello again.  A hello begins anew: what was staged before it is forgotten, for who sent it is gone.
What was already ordered to become live becomes live first, so that a hello never states weights that are about to
change.  Runs in the plugin's thread; only the commit itself runs in the scheduler's.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from engines.sglang.plugin import PluginSettings
from engines.sglang.queue_conversation import HELLO_SECONDS, RefusedForGood
from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    Alive,
    CommitOrder,
    EngineHello,
    HashOrder,
    HashReport,
    Live,
    Refused,
    Staged,
    UpdatePart,
)
from stream_rl.session import FOR_GOOD
from stream_rl.types import Version

log = logging.getLogger("stream_rl.plugin")
ALIVE_SECONDS = 1.0


class PublisherConversation:
    """At most one update is under way: the publisher sends the next after it heard `Live`."""

    def __init__(
        self,
        settings: PluginSettings,
        rank: int,
        ranks: int,
        weights: LiveWeights,
        send: Callable[[Any], bool],
        order: Callable[[Version], None],
    ) -> None:
        """`send` never blocks, and says whether the message left; `order` asks the scheduler to make what is staged
        live, which it reports by `live`."""
        self._settings, self._ranks, self._weights, self._send, self._order = settings, ranks, weights, send, order
        self._me: dict[str, Any] = {"engine": settings.engine, "incarnation": settings.incarnation, "rank": rank}
        self._ordered = False
        """The scheduler is making the staged update live."""
        self._deferred: deque[Any] = deque()
        """What came meanwhile: at most one update, since the publisher waits for its answer."""
        self._greet = True
        self._hello_due = self._alive_due = 0.0

    def handle(self, message: Any, now: float) -> None:
        """What the publisher says.  Raises RefusedForGood."""
        match message:
            case Refused(reason="unknown_engine"):
                # the answer to all that was said before the last hello; if that was lost, Alive will bring another
                self._greet = self._greet or now >= self._hello_due
            case Refused() if message.reason in FOR_GOOD:
                raise RefusedForGood(f"the publisher refused this engine: {message.reason}: {message.detail}")
            case Refused():
                log.error("the publisher refused: %s: %s", message.reason, message.detail)
            case UpdatePart() | CommitOrder() | HashOrder():
                self._deferred.append(message)
                self._obey()
            case _:
                log.warning("the publisher sent a %s, which an engine has no use for", type(message).__name__)

    def live(self, target: Version, stall_seconds: float, problem: str) -> None:
        """The scheduler has made `target` live, or could not."""
        self._ordered = False
        self._send(
            Live(
                target=target,
                weights_hash=fingerprint.text(self._weights.fingerprint),
                stage_seconds=self._weights.stage_seconds,
                stall_seconds=stall_seconds,
                problem=problem,
                **self._me,
            )
        )
        self._obey()

    def tick(self, now: float) -> float:
        """Say what is due.  Returns when to call again, at the latest."""
        if self._greet and not self._ordered and now >= self._hello_due:
            self._weights.forget_staged()
            self._hello_due = now + HELLO_SECONDS
            self._greet = not self._send(self._hello())
        if now >= self._alive_due:
            self._alive_due = now + ALIVE_SECONDS
            self._send(Alive())
        return self._alive_due

    def _obey(self) -> None:
        """Carry out what the publisher said, but nothing while a commit is on its way through the scheduler."""
        while self._deferred and not self._ordered:
            match message := self._deferred.popleft():
                case UpdatePart():
                    self._stage(message)
                case CommitOrder() if self._weights.staged == message.target:
                    self._ordered = True
                    self._order(message.target)
                case HashOrder():
                    self._report_hash()

    def _stage(self, part: UpdatePart) -> None:
        problem, target = "", None
        try:
            target = self._weights.receive(part)
        except WeightsError as error:
            log.warning("update to version %s: %s", part.target, error)
            problem, target = str(error), part.target
        if target is not None:
            self._send(Staged(target=target, attempt=part.attempt, problem=problem, **self._me))

    def _report_hash(self) -> None:
        """Nothing is under way, or the publisher would not have asked; no commit can come while this reads."""
        self._weights.forget_staged()
        try:
            weights_hash = fingerprint.text(self._weights.recompute())
        except WeightsError as error:
            weights_hash = str(error)
        self._send(HashReport(version=self._weights.version, weights_hash=weights_hash, **self._me))

    def _hello(self) -> EngineHello:
        return EngineHello(
            run=self._settings.run,
            ranks=self._ranks,
            version=self._weights.version,
            weights_hash=fingerprint.text(self._weights.fingerprint),
            **self._me,
        )
