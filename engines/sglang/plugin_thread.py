"""The plugin's own thread: sockets, resends, staging.  It shares the GIL with the scheduler, so it sleeps in `poll`
unless there is something to do, and hands big tensor work to torch, which lets go of the GIL."""

import logging
import os
import signal
import threading
import time
from collections import deque
from functools import partial

import torch

from engines.sglang.counters import Counters
from engines.sglang.plugin import PluginSettings
from engines.sglang.publisher_conversation import PublisherConversation
from engines.sglang.queue_conversation import QueueConversation, RefusedForGood
from engines.sglang.staging import LiveWeights
from engines.sglang.streaming import Row
from engines.weights.codes import payload
from stream_rl.messages import EngineStats
from stream_rl.transport import ThreadHub, Wakeup
from stream_rl.types import Version

log = logging.getLogger("stream_rl.plugin")
QUEUE, PUBLISHER = "queue", "publisher"


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
        self._rows: deque[list[Row]] = deque()
        self._live: deque[tuple[Version, int, float, int, str]] = deque()
        self._reloaded = False
        """All weights were replaced by SGLang itself, and the publisher has not heard it."""
        self._order: tuple[Version, int] | None = None
        self._unacknowledged_bytes = 0
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
        return self._unacknowledged_bytes >= self._settings.buffer_bytes

    def take_commit_order(self) -> tuple[Version, int] | None:
        """Target and attempt of what is to be made live now, once."""
        if self._order is None:
            return None
        order, self._order = self._order, None
        self.commit_wakeup.clear()
        return order

    def post_live(self, target: Version, attempt: int, stall_seconds: float, forward_count: int, problem: str) -> None:
        """A commit has run."""
        self._live.append((target, attempt, stall_seconds, forward_count, problem))
        if self._hub is not None:
            self._hub.wake()

    def post_reloaded(self) -> None:
        """SGLang has replaced all weights by itself."""
        self._reloaded = True
        if self._hub is not None:
            self._hub.wake()

    # -- the plugin's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except RefusedForGood as refused:
            log.error("%s: %s; this engine ends", self._settings.engine, refused)
            # with SIGTERM SGLang would first finish its requests, which are of no use to anybody any more; with this
            # one, by which its processes report that they failed, the whole tree ends at once
            os.kill(self._settings.launcher_pid, signal.SIGQUIT)
        except Exception:  # a guest must not end its host; counted as a fault, which ends the run by name
            log.exception("the plugin's thread failed; streaming and updates stop, the engine goes on")
            self._counters.faults += 1
            if self._hub is not None and self._rank == 0:
                self._hub.send(QUEUE, self._stats())

    def _loop(self) -> None:
        s = self._settings
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # this thread's work must not queue behind forward passes
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        payload.prepare()
        self._weights.prepare()
        self._hub = hub = ThreadHub()
        hub.connect(PUBLISHER, s.publisher_address, f"{s.engine}/{self._rank}@{s.incarnation}")
        publisher = PublisherConversation(
            s, self._rank, self._ranks, self._weights, partial(hub.send, PUBLISHER), self._give_order
        )
        queue = None
        if self._rank == 0:
            hub.connect(QUEUE, s.queue_address, f"{s.engine}@{s.incarnation}")
            queue = QueueConversation(s, partial(hub.send, QUEUE), self._stats)
        due = 0.0
        while True:
            for source, message in hub.poll(max(0.0, due - time.perf_counter())):
                conversation = publisher if source == PUBLISHER else queue
                assert conversation is not None
                conversation.handle(message, time.perf_counter())
                self._tick(publisher, queue)  # an update has many parts, and each takes a while
            due = self._tick(publisher, queue)

    def _tick(self, publisher: PublisherConversation, queue: QueueConversation | None) -> float:
        """Hand on what the scheduler's thread has posted, and say what is due.  Returns when to do so again."""
        while self._live:
            publisher.live(*self._live.popleft())
        if self._reloaded:
            self._reloaded = False
            publisher.reloaded()
        due = publisher.tick(time.perf_counter())
        return due if queue is None else min(due, self._tick_queue(queue))

    def _tick_queue(self, queue: QueueConversation) -> float:
        now = time.perf_counter()
        rows: list[Row] = []
        while self._rows:
            rows += self._rows.popleft()
        if rows:
            queue.add(rows, now)
        self._counters.thread_cpu_seconds = time.thread_time()
        due = queue.tick(now)
        self._unacknowledged_bytes = queue.unacknowledged_bytes
        return due

    def _give_order(self, target: Version, attempt: int) -> None:
        # in this order: a scheduler that takes the order finds the wake-up set and clears it
        self.commit_wakeup.set()
        self._order = target, attempt

    def _stats(self) -> EngineStats:
        return EngineStats(
            engine=self._settings.engine,
            incarnation=self._settings.incarnation,
            version=self._weights.version,
            counters=self._counters.values(),
            histograms={"decode_step_seconds": self._counters.decode_step_seconds.counts()},
        )
