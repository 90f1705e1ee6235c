"""A scheduler in the test's event loop with the real plugin thread beside it: real sockets, no SGLang."""

import asyncio
import contextlib
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from engine_builders import plugin_settings
from fake_queue import PATIENCE
from streaming_builders import Reason, Request
from weights_builders import FIRST, RUN, Tensors, commit, make_live, make_tensors

from engines.sglang.counters import Counters
from engines.sglang.plugin_thread import PluginThread
from engines.sglang.streaming import ChunkStream
from stream_rl.messages import Chunks
from stream_rl.types import Version, make_rid

NOBODY = "tcp://127.0.0.1:9"
"""An address at which nobody listens."""


class Left(BaseException):
    """The host was left: no Exception, which the thread would count as its own fault."""


class PluginHost:
    """`async with PluginHost(...)`: the scheduler turns until it is left; requests grow by a token a turn."""

    def __init__(
        self, queue_address: str, publisher_address: str = NOBODY, *, tensors: Tensors | None = None, **changes: Any
    ) -> None:
        # stands for SGLang's main process; killed by the plugin where that would be
        self.launcher = subprocess.Popen(["bash", "-c", "ulimit -c 0; exec sleep 600"])
        self.settings = plugin_settings(
            queue_address=queue_address,
            publisher_address=publisher_address,
            launcher_pid=self.launcher.pid,
            **{"resend_seconds": 0.2, "chunk_seconds": 0.02, **changes},
        )
        self.weights, self.model = make_live(tensors or make_tensors(0), FIRST)
        self.counters = Counters()
        self.thread = PluginThread(self.settings, 0, 1, torch.device("cpu"), self.weights, self.counters)
        self.thread._thread = threading.Thread(target=self._run_thread, daemon=True)
        self.stream = ChunkStream(RUN, 4, self.settings.chunk_seconds, self.thread.post_rows, self.thread.is_full)
        self.requests: list[Request] = []
        self.turns = 0
        self._turned = asyncio.Condition()
        self.committing = True
        """False while the scheduler is busy elsewhere and takes no order."""

    def _run_thread(self) -> None:
        with contextlib.suppress(Left):
            self.thread._run()

    async def __aenter__(self) -> Self:
        self.thread.start()
        self._scheduler = asyncio.create_task(self._schedule())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._scheduler
        await asyncio.to_thread(self._end_thread)
        self.launcher.kill()
        self.launcher.wait()

    def _end_thread(self) -> None:
        """In an engine it lives as long as its process.  Here it would knock at the ports of tests that are over, and
        others' peers may have got them."""

        def leave(*arguments: object) -> float:
            raise Left

        self.thread._tick = leave  # type: ignore[method-assign]
        if self.thread._hub is not None:  # or else its first turn is still to come
            self.thread._hub.wake()
        self.thread._thread.join(60)
        assert not self.thread._thread.is_alive(), "the plugin's thread has not turned for 60 s"
        if self.thread._hub is not None:
            self.thread._hub.close()

    def add(self, count: int) -> list[Request]:
        first = len(self.requests)
        self.requests += [Request(make_rid(RUN, 0, first + i, 0)) for i in range(count)]
        return self.requests[first:]

    async def until(self, reached: Callable[[], object]) -> None:
        """Wait for the scheduler's turns to have made it so."""
        async with asyncio.timeout(PATIENCE), self._turned:
            await self._turned.wait_for(reached)

    async def after(self, turns: int) -> None:
        end = self.turns + turns
        await self.until(lambda: self.turns >= end)

    def finish(self) -> None:
        """All requests end with their next token."""
        for request in self.requests:
            request.finished_reason = request.finished_reason or Reason("stop")

    @property
    def tokens(self) -> int:
        """Sampled so far."""
        return sum(len(request.output_ids) for request in self.requests)

    async def _schedule(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.stream.flush_overdue(now)
            order = self.thread.take_commit_order() if self.committing else None
            if order is not None:
                commit(self.weights, *order)
                self.thread.post_live(*order, 0.0, self.turns, "")
            running = [request for request in self.requests if not request.finished_output]
            for request in running:
                request.sample(1, self.weights.version, now)
            self.stream.observe(running, self.weights.version, now)
            for request in running:
                request.finished_output = request.finished()
            self.turns += 1
            async with self._turned:
                self._turned.notify_all()


def assert_streamed(messages: list[Chunks], requests: list[Request]) -> None:
    """Taken together the messages are exactly what the requests sampled, each token once, in order."""
    tokens: dict[str, list[int]] = {request.rid: [] for request in requests}
    versions: dict[str, list[Version]] = {request.rid: [] for request in requests}
    finishes: dict[str, str] = {}
    for message in messages:
        offset = 0
        for i, rid in enumerate(message.rids):
            assert message.starts[i] == len(tokens[rid]) and rid not in finishes
            count = int(message.counts[i])
            tokens[rid] += message.token_ids[offset : offset + count].tolist()
            for _, history, step, n in message.spans[message.spans[:, 0] == i].tolist():
                versions[rid] += [Version(history, step)] * n
            if message.finishes[i]:
                finishes[rid] = message.finishes[i]
            offset += count
    for request in requests:
        assert tokens[request.rid] == request.output_ids
        assert versions[request.rid] == request.versions
        assert finishes[request.rid] == "stop"
