"""The endpoint: OpenAI's and Anthropic's APIs over the episodes that are played here.

    agent's SDK ──HTTP──▶ Endpoint ──▶ Session (continue, branch, or asked before?) ──▶ Episode.turn
                ◀──────── Answer ◀── parsed by an engine ◀──────── sampled tokens ◀────────┘

An API key names an episode; it is its `Model.key`, and with the episode it ends.  A turn belongs to the endpoint, not
to the connection that asked for it: if that breaks, the turn goes on, and its answer is kept for who asks again.
Streamed answers are sent when their turn is whole, with keep-alives until then: only what the queue holds is true, and
an engine that dies may have said what nobody has.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from actors.chat import ChatFormat
from actors.chat_parsing import Engines
from actors.endpoint.answer import Answer
from actors.endpoint.api import Api, openai_error
from actors.endpoint.asking import ApiError, Ask, refuse
from actors.endpoint.completions import COMPLETIONS
from actors.endpoint.messages import MESSAGES, read_for_count
from actors.endpoint.options import EndpointOptions
from actors.endpoint.responses import RESPONSES
from actors.endpoint.sessions import Exchange, Session, Sessions
from actors.endpoint.turns import Turns
from actors.episodes import Episode, Episodes

log = logging.getLogger(__name__)
APIS = (COMPLETIONS, RESPONSES, MESSAGES)
MAX_OPEN = 64
"""Turns of one episode under way at once; more are asked to come again."""
RETRY_AFTER_SECONDS = 1
STARTED, STARTED_AT = 1_700_000_000, "2023-11-14T22:13:20Z"
"""When the model was made, for lists of models; nobody reads it."""


class Endpoint:
    """`async with Endpoint(...) as endpoint`: served at `endpoint.address` until it is left, which ends all turns."""

    def __init__(
        self,
        episodes: Episodes,
        chat: ChatFormat,
        engines: Engines,
        options: EndpointOptions | None = None,
        counts: Counter[str] | None = None,
    ) -> None:
        """counts: where to count what happens, under names that begin with "endpoint."."""
        self._episodes, self._options = episodes, options or EndpointOptions()
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.sessions = Sessions()
        self._turns = Turns(chat, engines, self._options, self.counts)
        self._open: set[asyncio.Task[None]] = set()
        self.address = ""

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._answer_errors], client_max_size=self._options.max_body_bytes)
        for api in APIS:
            app.router.add_post(api.path, self._ask(api))
        app.router.add_post(MESSAGES.path + "/count_tokens", self._count_tokens)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._models)
        async with contextlib.AsyncExitStack() as stack:
            self._tasks: asyncio.TaskGroup = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(self._end_turns)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            self.address = f"http://{host}:{port}"
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def _end_turns(self) -> None:
        for task in self._open:
            task.cancel()

    # -- turns -------------------------------------------------------------------------------------------------

    def _ask(self, api: Api) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            episode, session = self._session(request)
            raw = await self._read(request)
            self.counts["endpoint.requests"] += 1
            exchange = self._repeated(request, api, session, raw)
            if exchange is None:
                exchange = self._begin(request, api, episode, session, raw)
            return await self._deliver(request, api, exchange)

        return handle

    def _repeated(self, request: web.Request, api: Api, session: Session, raw: bytes) -> Exchange | None:
        key, body = request.headers.get("Idempotency-Key"), _digest(api, raw)
        retry = request.headers.get("x-stainless-retry-count", "0") != "0"
        exchange = session.asked_before(body, key, retry)
        if exchange is None:
            return None
        if exchange.body != body:
            raise refuse(f"Idempotency-Key {key!r} came before with another body", code="idempotency_key_reused")
        self.counts["endpoint.asked_again"] += 1
        exchange.client_gone = False
        return exchange

    def _begin(self, request: web.Request, api: Api, episode: Episode, session: Session, raw: bytes) -> Exchange:
        ask = api.read(_parsed(raw), session.stored)
        if session.num_open >= MAX_OPEN:
            raise ApiError(429, f"{MAX_OPEN} turns of this episode are under way; come again", retry=True)
        for name in ask.not_applied:
            self.counts[f"endpoint.not_applied.{name}"] += 1
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # its client may be gone
        exchange = Exchange(_digest(api, raw), request.headers.get("Idempotency-Key"), ask, answer)
        session.begin(exchange)
        task = self._tasks.create_task(self._turn(api, episode, session, exchange))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return exchange

    async def _turn(self, api: Api, episode: Episode, session: Session, exchange: Exchange) -> None:
        try:
            answer = await self._turns.take(episode, session, exchange.ask)
        except ApiError as error:
            session.forget(exchange)
            exchange.answer.set_exception(error)
        except BaseException:
            exchange.answer.cancel()
            raise
        else:
            if api is RESPONSES and exchange.ask.echo.get("store") is not False:
                session.store(api.answer_id(answer), exchange.ask, answer.said)
            # answers are kept by the dozen, and each request has the whole conversation
            exchange.ask = dataclasses.replace(exchange.ask, messages=[])
            exchange.answer.set_result(answer)

    async def _deliver(self, request: web.Request, api: Api, exchange: Exchange) -> web.StreamResponse:
        try:
            if exchange.ask.stream:
                return await self._stream(request, api, exchange)
            answer = await asyncio.shield(exchange.answer)
            response = _json(api.whole(exchange.ask, answer), headers=_headers(exchange.ask))
            await response.prepare(request)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            if not exchange.client_gone:
                exchange.client_gone = True
                self.counts["endpoint.client_gone"] += 1
            raise
        return response

    async def _stream(self, request: web.Request, api: Api, exchange: Exchange) -> web.StreamResponse:
        """Errors that come before the first sign of life have their own status."""
        response: web.StreamResponse | None = None
        while True:
            await asyncio.wait({exchange.answer}, timeout=self._options.keep_alive_s)
            if exchange.answer.done():
                break
            response = response or await _open_stream(request, exchange.ask)
            await response.write(b": keep-alive\n\n")
        try:
            answer = await exchange.answer
        except ApiError as error:
            if response is None:
                raise
            for event in api.error_events(error):
                await response.write(event)
        else:
            response = response or await _open_stream(request, exchange.ask)
            await response.write(b"".join(api.events(exchange.ask, answer)))
        await response.write_eof()
        return response

    # -- the rest ----------------------------------------------------------------------------------------------

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        _, session = self._session(request)
        ask = read_for_count(_parsed(await self._read(request)))
        return _json({"input_tokens": await self._turns.count(session, ask)})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._session(request)
        name, asked = self._options.model, request.match_info.get("model")
        if _speaks_anthropic(request):
            one: dict[str, Any] = {
                "type": "model",
                "id": asked or name,
                "display_name": name,
                "created_at": STARTED_AT,
            }
            return _json(one if asked else {"data": [one], "first_id": name, "has_more": False, "last_id": name})
        one = {"id": asked or name, "object": "model", "owned_by": "stream-rl", "created": STARTED}
        return _json(one if asked else {"object": "list", "data": [one]})

    def _session(self, request: web.Request) -> tuple[Episode, Session]:
        key = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        episode = self._episodes.by_key(key)
        if episode is None:
            raise ApiError(
                401,
                "no episode has this API key: give the episode's own (model.key); with its episode it ends",
                code="invalid_api_key",
            )
        return episode, self.sessions.of(episode)

    async def _read(self, request: web.Request) -> bytes:
        most = self._options.max_body_bytes
        try:
            if (request.content_length or 0) > most:
                raise web.HTTPRequestEntityTooLarge(most, request.content_length or 0)
            async with asyncio.timeout(self._options.body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"the request is too large: {most} bytes at most", code="request_too_large") from None
        except TimeoutError:
            raise ApiError(408, f"the request took more than {self._options.body_timeout_s} s to come") from None
        except (web.RequestPayloadError, ValueError) as error:  # cut short, or not in the encoding that it says
            raise refuse(f"the body cannot be read: {error}") from error

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            found = error
        except web.HTTPException as error:
            if error.status < 400:
                raise
            found = ApiError(error.status, f"{request.method} {request.path}: {error.reason}")
        except ConnectionError:  # nobody reads what is answered
            return web.Response(status=499, reason="Client Closed Request")
        except Exception as error:  # a request is data: its client hears of it, other sessions go on
            log.exception("%s %s", request.method, request.path)
            found = ApiError(500, f"internal error: {type(error).__name__}: {error}", code="internal_error")
        self.counts[f"endpoint.refused.{found.code or found.status}"] += 1
        body = MESSAGES.error(found) if _speaks_anthropic(request) else openai_error(found)
        headers = {"x-should-retry": "true" if found.retry else "false"}
        if found.status == 429:
            headers["retry-after"] = str(RETRY_AFTER_SECONDS)
        return _json(body, status=found.status, headers=headers)


def _speaks_anthropic(request: web.Request) -> bool:
    return request.path.startswith(MESSAGES.path) or "anthropic-version" in request.headers


def _digest(api: Api, raw: bytes) -> bytes:
    return hashlib.blake2b(api.path.encode() + b"\n" + raw, digest_size=16).digest()


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise refuse(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise refuse("the body must be a JSON object")
    return body


def _headers(ask: Ask) -> dict[str, str]:
    name = f"req_{secrets.token_hex(8)}"
    headers = {"x-request-id": name, "request-id": name}
    if ask.not_applied:
        headers["x-stream-rl-not-applied"] = ",".join(ask.not_applied)
    return headers


def _json(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


async def _open_stream(request: web.Request, ask: Ask) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", **_headers(ask)}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    return response
