"""The queue's process: sockets, the clock and the signals around `QueueCore`.

python -m queues.process RESOLVED_RECIPE.toml --run-id ID --ready-fd N
"""

import argparse
import asyncio
import logging
import time
from typing import Any

from queues.admission import check
from queues.core import REPLY, Gone, QueueCore, Tick
from queues.store import Settings
from stream_rl import config, runtime
from stream_rl.messages import Hello, Refused, Welcome
from stream_rl.transport import Router

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class QueueProcess:
    """Feeds a core with what comes and sends what it says; knows which connection is whose."""

    def __init__(self, core: QueueCore, router: Router) -> None:
        self._core = core
        self._router = router
        self._names: dict[bytes, str] = {}
        self._connections: dict[str, bytes] = {}

    async def serve(self) -> None:
        """Consumes: every peer's messages.  Waits for: the next one.  Produces: the core's answers.
        Unblocked by: any peer; ends when it is cancelled."""
        while True:
            connection, message = await self._router.receive()
            await self.take(connection, message)

    async def tick(self) -> None:
        """Consumes: the clock.  Waits for: the next second.  Produces: Status to every observer."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.take(b"", Tick())

    async def take(self, connection: bytes, event: Any) -> None:
        sender = self._names.get(connection, REPLY)
        # No await between the core's answer and the bindings: two events must not interleave here.
        actions = self._core.handle(time.monotonic(), sender, event)
        if isinstance(event, Hello) and any(isinstance(answer, Welcome) for _, answer in actions):
            self._bind(connection, event.name)
            log.info("%s %s joined: incarnation %d, pid %d", event.role, event.name, event.incarnation, event.pid)
        for recipient, message in actions:
            if isinstance(message, Refused):
                log.warning("refused %s of %s: %s: %s", type(event).__name__, sender, message.reason, message.detail)
            to = connection if recipient == REPLY else self._connections.get(recipient)
            if to is None or await self._router.send(to, message):
                continue
            log.warning("%s is gone: a %s did not reach it", recipient or "a peer", type(message).__name__)
            self._core.handle(time.monotonic(), REPLY, Gone(recipient))

    def _bind(self, connection: bytes, name: str) -> None:
        if (old := self._connections.get(name)) is not None:
            self._names.pop(old, None)
        if (former := self._names.get(connection)) is not None:
            self._connections.pop(former, None)
        self._names[connection] = name
        self._connections[name] = connection


async def main(options: argparse.Namespace) -> None:
    """Serve until SIGTERM.  Raises ConfigError for a recipe under which a step could wait for ever."""
    recipe = config.load(options.recipe)
    check(recipe.queue, recipe.rollout)
    core = QueueCore(Settings(run=options.run_id, queue=recipe.queue, max_new_tokens=recipe.rollout.max_new_tokens))
    async with Router.bind("tcp://127.0.0.1:0") as router:
        process = QueueProcess(core, router)
        runtime.report_ready(options.ready_fd, address=router.address)
        await runtime.supervise(serve=process.serve(), tick=process.tick())


if __name__ == "__main__":
    runtime.execute("queue", main, runtime.arguments(__doc__).parse_args())
