"""The plugin's own thread: sockets, resends, staging.  It shares the GIL with the scheduler, so it sleeps in `poll`
unless there is something to do, and hands big tensor work to torch, which lets go of the GIL."""

import logging
import os
import threading
import time
from collections import deque
from typing import Any

import torch

from engines.sglang.counters import Counters
from engines.sglang.outbox import Outbox
from engines.sglang.plugin import PluginSettings
from engines.sglang.staging import LiveWeights
from engines.sglang.streaming import Row
from engines.weights import fingerprint
from stream_rl.errors import WeightsError
from stream_rl.messages import (
    ChunksAck,
    CommitOrder,
    EngineHello,
    EngineStats,
    HashOrder,
    HashReport,
    Hello,
    Live,
    Refused,
    Staged,
    UpdatePart,
    Welcome,
)
from stream_rl.transport import ThreadHub, Wakeup
from stream_rl.types import Version

log = logging.getLogger("stream_rl.plugin")
QUEUE, PUBLISHER = "queue", "publisher"
STATS_SECONDS = 0.5


class PluginThread:
    """Mailboxes for the scheduler's thread on one side, ZeroMQ conversations on the other."""

    def __init__(
        self,
        settings: PluginSettings,
        rank: int,
        ranks: int,
        device: torch.device,
        weights: LiveWeights,
        counters: Counters,
    ) -> None:
        self._device = device
        self._settings, self._rank, self._ranks = settings, rank, ranks
        self._weights, self._counters = weights, counters
        self._outbox = Outbox(settings.run, settings.engine, settings.incarnation, settings.resend_seconds)
        self._rows: deque[list[Row]] = deque()
        self._live: deque[tuple[Version, float, str]] = deque()
        self._order: Version | None = None
        self._hash_asked = False
        self._welcome = False
        self.commit_wakeup = Wakeup()
        """In the idle sleeper's poll set: an order wakes a sleeping scheduler."""
        self._hub: ThreadHub | None = None
        self._thread = threading.Thread(target=self._run, name="stream_rl", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- the scheduler's thread ------------------------------------------------------------------------------

    def post_rows(self, rows: list[Row]) -> None:
        """Hand chunks over; never blocks."""
        self._rows.append(rows)
        if self._hub is not None:
            self._hub.wake()

    def is_full(self) -> bool:
        """True while as many chunks are unacknowledged as the buffer may hold."""
        return self._outbox.bytes >= self._settings.buffer_bytes

    def take_commit_order(self) -> Version | None:
        """The version to make live now, once."""
        if self._order is None:
            return None
        order, self._order = self._order, None
        self.commit_wakeup.clear()
        return order

    def post_live(self, target: Version, stall_seconds: float, problem: str) -> None:
        """A commit has run."""
        self._live.append((target, stall_seconds, problem))
        if self._hub is not None:
            self._hub.wake()

    # -- the plugin's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:  # a guest must not end its host; counted as a fault, which ends the run by name
            log.exception("the plugin's thread failed; streaming and updates stop, the engine goes on")
            self._counters.faults += 1
            if self._hub is not None:
                self._send_stats(self._hub)

    def _loop(self) -> None:
        s = self._settings
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # this thread's work must not queue behind forward passes
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        self._hub = hub = ThreadHub()
        if self._rank == 0:
            hub.connect(QUEUE, s.queue_address, f"{s.engine}@{s.incarnation}")
            hub.send(QUEUE, self._hello())
        hub.connect(PUBLISHER, s.publisher_address, f"{s.engine}/{self._rank}@{s.incarnation}")
        hub.send(PUBLISHER, self._engine_hello())
        next_stats = 0.0
        while True:
            now = time.perf_counter()
            for source, message in hub.poll(max(0.0, next_stats - now)):
                self._handle(hub, source, message)
            now = time.perf_counter()
            self._send_chunks(hub, now)
            self._report_live(hub)
            if now >= next_stats:
                next_stats = now + STATS_SECONDS
                self._counters.thread_cpu_seconds = time.thread_time()
                if self._rank == 0:
                    self._send_stats(hub)

    def _handle(self, hub: ThreadHub, source: str, message: Any) -> None:
        match message:
            case ChunksAck():
                self._outbox.acknowledge(message.next_sequence, message.resend, time.perf_counter())
            case UpdatePart():
                self._stage(hub, message)
            case CommitOrder():
                if self._weights.staged == message.target:
                    # in this order: a scheduler that takes the order finds the wake-up set and clears it
                    self.commit_wakeup.set()
                    self._order = message.target
            case HashOrder():
                self._hash_asked = True
                self._answer_hash(hub)
            case Welcome():
                self._welcome = True
                self._outbox.acknowledge(message.next_sequence, True, time.perf_counter())
            case Refused():
                log.error("%s refused this engine: %s: %s", source, message.reason, message.detail)
            case _:
                log.warning("%s sent a %s, which an engine has no use for", source, type(message).__name__)

    def _stage(self, hub: ThreadHub, part: UpdatePart) -> None:
        problem, target = "", None
        try:
            target = self._weights.receive(part)
        except WeightsError as error:
            log.warning("update to version %s: %s", part.target, error)
            problem, target = str(error), part.target
        if target is not None:
            s = self._settings
            hub.send(
                PUBLISHER,
                Staged(
                    engine=s.engine,
                    incarnation=s.incarnation,
                    rank=self._rank,
                    target=target,
                    attempt=part.attempt,
                    problem=problem,
                ),
            )

    def _report_live(self, hub: ThreadHub) -> None:
        while self._live:
            target, stall, problem = self._live.popleft()
            hub.send(
                PUBLISHER,
                Live(
                    engine=self._settings.engine,
                    incarnation=self._settings.incarnation,
                    rank=self._rank,
                    target=target,
                    weights_hash=fingerprint.text(self._weights.fingerprint),
                    stage_seconds=self._weights.stage_seconds,
                    stall_seconds=stall,
                    problem=problem,
                ),
            )
        self._answer_hash(hub)

    def _answer_hash(self, hub: ThreadHub) -> None:
        """Recompute while no commit can come: none is staged, and staging is this thread's own work."""
        if not self._hash_asked or self._weights.staged is not None:
            return
        self._hash_asked = False
        try:
            weights_hash = fingerprint.text(self._weights.recompute())
        except WeightsError as error:
            weights_hash = str(error)
        hub.send(
            PUBLISHER,
            HashReport(
                engine=self._settings.engine,
                incarnation=self._settings.incarnation,
                rank=self._rank,
                version=self._weights.version,
                weights_hash=weights_hash,
            ),
        )

    def _send_chunks(self, hub: ThreadHub, now: float) -> None:
        rows: list[Row] = []
        while self._rows:
            rows += self._rows.popleft()
        if rows:
            self._outbox.add(rows, now)
        if not self._welcome:
            return
        self._outbox.resend_overdue(now)
        while (message := self._outbox.next_to_send()) is not None and hub.send(QUEUE, message):
            self._outbox.sent()

    def _send_stats(self, hub: ThreadHub) -> None:
        hub.send(
            QUEUE,
            EngineStats(
                engine=self._settings.engine,
                incarnation=self._settings.incarnation,
                version=self._weights.version,
                counters=self._counters.values(),
                histograms={"decode_step_seconds": self._counters.decode_step_seconds.counts()},
            ),
        )

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

    def _engine_hello(self) -> EngineHello:
        s = self._settings
        return EngineHello(
            run=s.run,
            engine=s.engine,
            incarnation=s.incarnation,
            rank=self._rank,
            ranks=self._ranks,
            version=self._weights.version,
            weights_hash=fingerprint.text(self._weights.fingerprint),
        )
