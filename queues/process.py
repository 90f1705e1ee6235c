"""The queue's process: sockets, the clock, the journal and the signals around `QueueCore`.

python -m queues.process RESOLVED_RECIPE.toml --run-id ID --ready-fd N

What an event makes the core say leaves only when the journal holds that event and all before it.  Even what an event
says that changed nothing: the answer to a repeated message may rest on rows which are not durable yet.
"""

import argparse
import asyncio
import concurrent.futures
import dataclasses
import json
import logging
import os
import pathlib
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from queues import snapshot
from queues.admission import check
from queues.core import JOURNAL, REPLY, Gone, QueueCore, Recovered, Tick
from queues.journal import Journal, JournalError, recover_core
from queues.store import Settings
from stream_rl import config, runtime, wire
from stream_rl.messages import Committed, Hello, Refused, Status, StatusRequest, Welcome
from stream_rl.metrics import quantile
from stream_rl.transport import Router

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
MAX_HELD_BYTES = 64 << 20
"""Of events whose rows are not durable.  A second or two of the fastest ingest: longer stalls of the disk are felt by
the senders, who keep what is not acknowledged."""
HELD_BYTES = 1024
"""What an event that waits takes beside its frames."""
MAX_MESSAGE_BYTES = 64 << 20
"""Largest that is taken; a row of SQLite holds 1 GB.  Engines keep as much unacknowledged in all by default."""
SPACING_SECONDS = 0.005
"""A row that comes alone is written at once; commits follow each other no faster than this.  At 1,000 messages a second
it saves a quarter of the CPU time and costs 1 to 2 ms."""
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0
"""Pause after a commit that failed; doubles from the one to the other."""
SWITCH_SECONDS = 0.001
"""The journal's thread waits this long for the GIL, a few times a commit, while events are being handled."""


_Addressed = tuple[bytes | None, str, Any]
"""(connection, recipient, message).  The connection is that of the time of the event: what answers an engine's old
incarnation must not reach its new one."""


class _Held(NamedTuple):
    """What one event made the core say."""

    row: int
    """Of the journal; it and all before it must be durable first."""
    messages: Sequence[_Addressed]
    num_bytes: int


class QueueProcess:
    """Feeds a core with what comes and sends what it says; knows which connection is whose."""

    def __init__(self, core: QueueCore, router: Router, journal: Journal, queue: config.Queue) -> None:
        self._core = core
        self._router = router
        self._journal = journal
        self._queue = queue
        self._names: dict[bytes, str] = {}
        self._connections: dict[str, bytes] = {}
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._sending = asyncio.Lock()
        self._work = asyncio.Event()
        """There is something to commit, or to tidy."""
        self._moved = asyncio.Event()
        """A commit has ended, either way."""
        self._problem = ""
        """Why the last commit or snapshot failed."""
        self._failing = False
        """The last commit failed."""
        self._left: Counter[str] = Counter()
        """Messages that were not taken, by reason."""
        self._origin = time.monotonic() - core.now

    @property
    def now(self) -> float:
        """Time of the core: seconds that the run's queue has lived, over all its processes."""
        return time.monotonic() - self._origin

    # -- loops -------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Consumes: every peer's messages.  Waits for: the next one, and while too much is not durable, for the
        journal.  Produces: rows, and the core's answers.  Unblocked by: any peer; ends when it is cancelled."""
        while True:
            while self._is_full and not self._failing:
                self._moved.clear()
                await self._moved.wait()
            connection, message, frames = await self._router.receive_raw()
            size = sum(map(len, frames))
            if size > MAX_MESSAGE_BYTES:
                self._left["too_large"] += 1
                detail = f"a {type(message).__name__} of {size} bytes, at most {MAX_MESSAGE_BYTES} are taken"
                await self._router.send(connection, Refused(reason="too_large", detail=detail))
            elif self._is_full and not _observer(message, REPLY):
                # Left to its sender, who sends it again.  Only while the journal cannot be written: who asks how
                # things are comes through the same socket, and must be told.
                self._left["journal_failing"] += 1
            else:
                await self.take(connection, message, frames)

    async def commit(self) -> None:
        """Consumes: pending rows.  Waits for: the first, then the disk.  Produces: durable rows, and the messages that
        waited for them; snapshots, in pieces between commits.  Unblocked by: any event; a failure is tried again."""
        retry_s, next_at = FIRST_RETRY_S, 0.0
        # A thread of its own: the journal may be closed only when the last commit has ended.
        with concurrent.futures.ThreadPoolExecutor(1, "journal") as thread:
            while True:
                await self._work.wait()
                if (rest := next_at - time.monotonic()) > 0:
                    await asyncio.sleep(rest)
                next_at = time.monotonic() + min(self._queue.commit_seconds, SPACING_SECONDS)
                self._work.clear()
                self._failing = not await self._try(thread, self._journal.commit)
                self._moved.set()
                if self._failing:
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, LAST_RETRY_S)
                    self._work.set()
                    continue
                retry_s = FIRST_RETRY_S
                await self._deliver()
                self._moved.set()
                tidied = self._journal.is_tidy or await self._try(thread, self._journal.tidy)
                # What could not be tidied is tried again with the next row, a second later at most.
                if self._journal.pending_bytes or (tidied and not self._journal.is_tidy):
                    self._work.set()

    async def _try(self, thread: concurrent.futures.Executor, step: Callable[[], None]) -> bool:
        """Whether a step of the journal worked; one line in the log when that changes."""
        try:
            await asyncio.get_running_loop().run_in_executor(thread, step)
        except JournalError as error:
            if str(error) != self._problem:
                log.error("%s; nothing is acknowledged until it can be written, trying again", error)
            self._problem = str(error)
            return False
        if self._problem:
            log.info("the journal can be written again")
        self._problem = ""
        return True

    async def tick(self) -> None:
        """Consumes: the clock.  Waits for: the next second.  Produces: Tick to the core, Status to every observer."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if not self._is_full:  # the core's time stands still while it can hear nobody: it must not blame them
                await self.take(b"", Tick())
            status = self._core.status()
            for name in [peer.name for peer in self._core.registry.of_role("observer")]:
                await self._send(self._connections.get(name), name, status)

    # -- events ------------------------------------------------------------------------------------------------

    async def take(self, connection: bytes, event: Any, frames: Sequence[wire.Frame] = ()) -> None:
        """Give the core an event, and see to what it says."""
        # No await before everything is in line: two events must not interleave here.
        sender, now = self._names.get(connection, REPLY), self.now
        actions = self._core.handle(now, sender, event)
        durable = self._core.durable
        if isinstance(event, Hello) and any(isinstance(answer, Welcome) for _, answer in actions):
            self._bind(connection, event.name)
            log.info("%s %s joined: incarnation %d, pid %d", event.role, event.name, event.incarnation, event.pid)
        records: list[Any] = []
        messages: list[_Addressed] = []
        at_once: list[_Addressed] = []
        observer = _observer(event, sender)
        for recipient, message in actions:
            if recipient == JOURNAL:
                records.append(message)
                continue
            if isinstance(message, Refused):
                log.warning("refused %s of %s: %s: %s", type(event).__name__, sender, message.reason, message.detail)
            to = connection if recipient == REPLY else self._connections.get(recipient)
            (at_once if recipient in observer else messages).append((to, recipient, message))
        if durable:
            assert frames or isinstance(event, (Tick, Recovered)), f"a {type(event).__name__} has no frames"
            self._journal.append(now, sender, type(event).__name__, frames, records)
            self._work.set()
            self._snapshot_if_due(isinstance(event, Committed))
        if durable or messages:
            self._held.append(_Held(self._journal.appended, messages, sum(map(len, frames)) + HELD_BYTES))
            self._held_bytes += self._held[-1].num_bytes
        for each in at_once:
            await self._send(*each)
        if not durable:
            await self._deliver()

    async def recovered(self) -> None:
        """Tell the core that time has passed since its last row."""
        if self._journal.appended:
            await self.take(b"", Recovered())

    @property
    def _is_full(self) -> bool:
        return self._held_bytes > MAX_HELD_BYTES

    def _bind(self, connection: bytes, name: str) -> None:
        if (old := self._connections.get(name)) is not None:
            self._names.pop(old, None)
        if (former := self._names.get(connection)) is not None:
            self._connections.pop(former, None)
        self._names[connection] = name
        self._connections[name] = connection

    def _snapshot_if_due(self, committed: bool) -> None:
        """After so many bytes of journal, and already after a sixteenth of them when a checkpoint was committed: that
        makes most of the state superfluous, so the snapshot is small then."""
        enough = self._queue.snapshot_bytes // 16 if committed else self._queue.snapshot_bytes
        if self._journal.grown_bytes <= enough or self._journal.is_saving:
            return
        try:
            self._journal.snapshot(snapshot.dump(self._core))
        except snapshot.SnapshotError as error:
            # A fault of ours that costs nothing yet: every row is still there.
            self._journal.postpone_snapshot()
            log.error("no snapshot: %s; the journal keeps growing", error)

    # -- saying it ---------------------------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Send what is durable, in the order of the events."""
        async with self._sending:
            while self._held and self._held[0].row <= self._journal.committed:
                held = self._held.popleft()
                self._held_bytes -= held.num_bytes
                for to, recipient, message in held.messages:
                    await self._send(to, recipient, message)

    async def _send(self, to: bytes | None, recipient: str, message: Any) -> None:
        if isinstance(message, Status):
            message = self._with_journal(message)
        if to is not None and await self._router.send(to, message):
            return
        if self._connections.get(recipient) == to:  # no newer connection has taken its place
            log.warning("%s is gone: a %s did not reach it", recipient or "a peer", type(message).__name__)
            self._core.handle(self.now, REPLY, Gone(recipient))

    def _with_journal(self, status: Status) -> Status:
        """Add what only this process knows."""
        journal, fields = self._journal, dict(status.fields)
        for reason, count in (self._router.refused + self._left).items():
            fields[f"refused.{reason}"] = fields.get(f"refused.{reason}", 0.0) + count
        milliseconds = list(journal.commit_ms)
        fields |= {
            "journal_bytes": float(journal.bytes_on_disk),
            "queue.journal_bytes": float(journal.bytes_on_disk),
            "queue.journal_rows": float(journal.num_rows),
            "queue.journal_pending_bytes": float(journal.pending_bytes),
            "queue.commit_ms_p50": quantile(milliseconds, 0.5),
            "queue.commit_ms_p99": quantile(milliseconds, 0.99),
        }
        texts = status.texts | {"queue.journal": self._problem or "ok"}
        return dataclasses.replace(status, fields=fields, texts=texts)


def _observer(event: Any, sender: str) -> tuple[str, ...]:
    """The names of who only wants to know how things are.  What such a one hears promises nothing and leaves at once,
    also while the journal cannot be written."""
    if isinstance(event, StatusRequest):
        return REPLY, sender
    return (REPLY, event.name) if isinstance(event, Hello) and event.role == "observer" else ()


def arguments() -> argparse.ArgumentParser:
    parser = runtime.arguments(__doc__)
    parser.add_argument("--bind", default="tcp://127.0.0.1:0", metavar="ADDRESS", help="port 0: any free one")
    parser.add_argument("--journal", type=pathlib.Path, metavar="PATH", help="default: journal.db in the run's folder")
    return parser


async def main(options: argparse.Namespace) -> None:
    """Serve until SIGTERM.  Raises ConfigError for a recipe under which a step could wait for ever, JournalError for a
    journal that cannot be used."""
    recipe = config.load(options.recipe)
    check(recipe.queue, recipe.rollout)
    sys.setswitchinterval(SWITCH_SECONDS)
    settings = Settings.of(recipe, options.run_id)
    directory = recipe.run_directory
    with Journal.open(
        options.journal or directory / "journal.db",
        options.run_id,
        dataclasses.asdict(settings),
        fsync=recipe.queue.fsync,
        keep=recipe.queue.keep_journal,
    ) as journal:
        core = recover_core(journal, settings)
        async with Router.bind(options.bind) as router:
            process = QueueProcess(core, router, journal, recipe.queue)
            await process.recovered()
            _say_where(directory / "queue.json", router.address, options.run_id)

            async def ready() -> None:  # among the loops, since these are started when signals are already heard
                runtime.report_ready(options.ready_fd, address=router.address)

            await runtime.supervise(serve=process.serve(), commit=process.commit(), tick=process.tick(), ready=ready())


def _say_where(path: pathlib.Path, address: str, run: str) -> None:
    """Let `stream-rl queue` find this process."""
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"address": address, "run": run, "pid": os.getpid()}) + "\n")
        new.replace(path)
    except OSError as error:  # a full disk must not keep the queue from coming back
        log.warning("cannot write %s: %s; `stream-rl queue` will not find this process", path, error.strerror)


if __name__ == "__main__":
    runtime.execute("queue", main, arguments().parse_args())
