"""SGLang's HTTP API as the actor uses it, with every answer in the test's hands."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

PATIENCE = 60.0


class FakeEngine:
    """Answers with `answer(body)` = (token ids, finish), or keeps the request until `finish` or an abort ends it."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[list[int], str] | None] = lambda body: None) -> None:
        self.answer = answer
        self.status = 200
        self.parse: Callable[[str, dict[str, Any]], tuple[int, bytes]] = lambda path, body: (404, b"")
        """What its parsers of tool calls and reasoning answer: status and body."""
        self.deaf = 0
        """Aborts that are lost, as those that overtake their request are."""
        self.requests: list[dict[str, Any]] = []
        self.aborts: list[str] = []
        self.partial: list[int] = []
        """What an aborted request had sampled."""
        self._open: dict[str, asyncio.Future[tuple[list[int], str]]] = {}
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/parse_function_call", self._parse)
        app.router.add_post("/separate_reasoning", self._parse)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.address = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Every connection breaks; nobody listens any more."""
        await self._runner.cleanup()

    async def until(self, reached: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(reached)
        except TimeoutError:
            raise AssertionError(f"not reached; requests: {self.rids}; aborts: {self.aborts}") from None

    async def nth(self, count: int = 1) -> dict[str, Any]:
        """The count-th request, when it is there."""
        await self.until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    @property
    def rids(self) -> list[str]:
        return [body["rid"] for body in self.requests]

    @property
    def open(self) -> set[str]:
        """Requests that wait for their answer."""
        return set(self._open)

    def finish(self, rid: str, token_ids: list[int], finish: str = "stop") -> None:
        self._open[rid].set_result((token_ids, finish))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        rid = body["rid"]
        self._open[rid] = asyncio.get_running_loop().create_future()
        await self._notify()
        try:
            if self.status != 200:
                return web.Response(status=self.status, text="the engine says no")
            token_ids, finish = self.answer(body) or await self._open[rid]
        finally:
            del self._open[rid]
            await self._notify()
        logprobs = [[-token_id / 8, token_id, None] for token_id in token_ids]
        meta = {"finish_reason": {"type": finish}, "output_token_logprobs": logprobs}
        return web.json_response({"output_ids": token_ids, "meta_info": meta})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        await self._notify()
        if self.deaf:
            self.deaf -= 1
        elif rid in self._open and not self._open[rid].done():
            self._open[rid].set_result((self.partial, "abort"))
        return web.Response()

    async def _parse(self, request: web.Request) -> web.Response:
        status, body = self.parse(request.path, await request.json())
        return web.Response(status=status, body=body, content_type="application/json")
