"""The engines that take requests, as the queue says, with a connection pool to each."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from engines.sglang.client import EngineClient
from stream_rl.errors import EngineError
from stream_rl.messages import Engines

ABORT_SECONDS = 5.0
"""Longest that an engine may take to hear an abort; one that hangs is restarted anyway, with all that it was doing."""
PROBE_SECONDS = 0.5
"""Between two looks at engines that are not up; also how long an answer may take at first."""
MOST_PROBE_SECONDS = 4.0
"""An engine on a crowded machine answers late, and each new question would find it as late: patience doubles."""
OVERLOAD = 8
"""Requests.  Below this a prefix that is there is worth more than an even load."""


class EnginePool:
    """`async with EnginePool(...)`: leaving closes every connection."""

    def __init__(self, request_timeout_s: float) -> None:
        self._request_timeout_s = request_timeout_s
        self._open: dict[tuple[str, int], EngineClient] = {}
        """By name and incarnation: the usable ones, and those that still have requests of ours."""
        self._usable: list[EngineClient] = []
        self._doubted: set[EngineClient] = set()
        """New, or not reached lately: nothing is sent to one before it has answered."""
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._open.values():
            await client.__aexit__(None, None, None)
        self._open.clear()

    async def update(self, engines: Engines) -> None:
        """Ask these from now on.  Requests at the others go on until their actor ends them."""
        keys = list(zip(engines.names, engines.incarnations, strict=True))
        for (name, incarnation), address in zip(keys, engines.addresses, strict=True):
            if (name, incarnation) not in self._open:
                client = self._open[name, incarnation] = EngineClient(name, address, self._request_timeout_s)
                self._doubted.add(client)
        async with self._changed:
            self._usable = [self._open[key] for key in keys]
            self._changed.notify_all()
        for key, client in list(self._open.items()):
            if key not in keys and not client.in_flight:
                del self._open[key]
                self._doubted.discard(client)
                await client.__aexit__(None, None, None)

    async def run(self) -> None:
        """Consumes: engines that are new or could not be reached.  Waits for: one, then for its answer.  Produces:
        engines that are up.  Unblocked by: the queue's list, `doubt`."""
        patience = PROBE_SECONDS
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: any(client in self._doubted for client in self._usable))
            asked = [client for client in self._usable if client in self._doubted]
            await asyncio.gather(*(self._ask(client, patience) for client in asked))
            if self._doubted.isdisjoint(asked):
                patience = PROBE_SECONDS
            else:
                patience = min(2 * patience, MOST_PROBE_SECONDS)
                await asyncio.sleep(PROBE_SECONDS)

    async def _ask(self, client: EngineClient, patience: float) -> None:
        if await client.answers(patience):
            async with self._changed:
                self._doubted.discard(client)
                self._changed.notify_all()

    async def pick(self, prefer: EngineClient | None = None) -> EngineClient:
        """The engine with the fewest of our requests that is up.  Waits while there is none, for as long as the
        supervisor lets a run stand still.

        prefer: has the prefix; taken unless it is not up, or overloaded: with more than twice the fewest and
        `OVERLOAD` more.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._trusted))
        fewest = min(self._trusted, key=lambda client: client.in_flight)
        if prefer in self._trusted and prefer.in_flight <= 2 * fewest.in_flight + OVERLOAD:
            return prefer
        return fewest

    async def doubt(self, client: EngineClient) -> None:
        """It could not be reached just now."""
        async with self._changed:
            self._doubted.add(client)
            self._changed.notify_all()

    @property
    def _trusted(self) -> list[EngineClient]:
        return [client for client in self._usable if client not in self._doubted]

    async def abort(self, client: EngineClient, rid: str) -> None:
        """Ask the engine to end a request, if it can be reached."""
        if client in self._open.values():
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(ABORT_SECONDS):
                    await client.abort(rid)
