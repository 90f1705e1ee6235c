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
from engines.weights.parts import CorruptPart
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    Alive,
    CommitOrder,
    EngineHello,
    HashOrder,
    HashReport,
    Live,
    PartTaken,
    Refused,
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
        order: Callable[[Version, int], None],
    ) -> None:
        """`send` never blocks, and says whether the message left; `order` asks the scheduler to make what is staged
        live on all ranks (target, attempt), which each reports by `live`."""
        self._settings, self._ranks, self._weights, self._send, self._order = settings, ranks, weights, send, order
        self._rank = rank
        self._me: dict[str, Any] = {"engine": settings.engine, "incarnation": settings.incarnation, "rank": rank}
        self._ordered: tuple[Version, int] | None = None
        """What the scheduler is making live on this rank's order."""
        self._live: Live | None = None
        """What was said of the last commit, to be said again."""
        self._deferred: deque[Any] = deque()
        """What came meanwhile: at most one update and what is said again, since the publisher waits for its answer."""
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

    def live(self, target: Version, attempt: int, stall_seconds: float, forward_count: int, problem: str) -> None:
        """The scheduler has made `target` live, or could not: after so much of its time, and so many passes."""
        if self._weights.attempt != attempt:
            self._greet = True  # ordered for a publisher that is gone; the one that is there believes otherwise
        self._ordered = None
        self._live = Live(
            target=target,
            attempt=attempt,
            weights_hash=self._weights.weights_hash,
            replicas=self._weights.replicas,
            stage_seconds=self._weights.stage_seconds,
            stall_seconds=stall_seconds + (0.0 if problem else self._weights.write_seconds()),
            forward_count=forward_count,
            problem=problem,
            **self._me,
        )
        self._send(self._live)
        self._obey()

    def reloaded(self) -> None:
        """SGLang has replaced all weights by itself: say hello with what they are now."""
        if self._weights.recompute():
            self._greet, self._hello_due = True, 0.0

    def tick(self, now: float) -> float:
        """Say what is due.  Returns when to call again, at the latest."""
        if self._greet and self._ordered is None and now >= self._hello_due:
            self._weights.forget_staged()
            self._hello_due = now + HELLO_SECONDS
            self._greet = not self._send(self._hello())
        if now >= self._alive_due:
            self._alive_due = now + ALIVE_SECONDS
            self._send(Alive())
        return self._alive_due

    def _obey(self) -> None:
        """Carry out what the publisher said, but nothing while a commit is on its way through the scheduler."""
        while self._deferred and self._ordered is None:
            match message := self._deferred.popleft():
                case UpdatePart():
                    self._stage(message)
                case CommitOrder():
                    self._commit(message.target, message.attempt)
                case HashOrder():
                    self._report_hash()

    def _stage(self, part: UpdatePart) -> None:
        problem, corrupt = "", False
        try:
            if not self._weights.receive(part):
                return
        except CorruptPart as error:
            log.warning("%s", error)
            corrupt = True
        except WeightsError as error:
            log.warning("update to version %s: %s", part.target, error)
            problem = str(error)
        self._send(PartTaken(attempt=part.attempt, part=part.part, corrupt=corrupt, problem=problem, **self._me))

    def _commit(self, target: Version, attempt: int) -> None:
        """Only the first rank orders it, for all: through SGLang's own requests, which reach every rank in one turn."""
        if self._live is not None and (self._live.target, self._live.attempt) == (target, attempt):
            self._send(self._live)
        elif self._weights.staged == (target, attempt):
            if self._rank == 0:
                self._ordered = target, attempt
                self._order(target, attempt)
        elif attempt > self._last_live and attempt >= (self._weights.attempt or 0):
            self._greet = True  # it was forgotten, and the publisher has not heard the hello that said so

    @property
    def _last_live(self) -> int:
        """Attempt of the last commit, which the scheduler may not have reported yet."""
        return 0 if self._weights.live is None else self._weights.live[1]

    def _report_hash(self) -> None:
        """Nothing is under way, or the publisher would not have asked; it asks again if a commit came all the same."""
        self._weights.forget_staged()
        try:
            if not self._weights.recompute():
                return
            weights_hash = self._weights.weights_hash
        except WeightsError as error:
            weights_hash = str(error)
        replicas = self._weights.replicas
        self._send(HashReport(version=self._weights.version, weights_hash=weights_hash, replicas=replicas, **self._me))

    def _hello(self) -> EngineHello:
        return EngineHello(
            run=self._settings.run,
            ranks=self._ranks,
            version=self._weights.version,
            weights_hash=self._weights.weights_hash,
            replicas=self._weights.replicas,
            address=self._settings.http_address,
            **self._me,
        )
