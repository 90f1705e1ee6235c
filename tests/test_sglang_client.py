"""The client tells an engine that is gone from one that refuses, whatever way it goes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from engines.sglang import server
from engines.sglang.client import EngineClient, EngineUnreachable, Generation
from stream_rl.errors import EngineError
from stream_rl.types import Finish

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def engine(answer: Answer, timeout: float = 10.0) -> AsyncIterator[EngineClient]:
    """A client of a server that reads one whole request and then does `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        await reader.readexactly(length)
        await answer(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with EngineClient("engine-0", f"http://127.0.0.1:{port}", timeout) as client:
            yield client


def says(status: str, body: object, cut: int = 0) -> Answer:
    """An HTTP answer, of which the last `cut` bytes never come."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        raw = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}"
        writer.write(raw.encode()[: len(raw) - cut])
        await writer.drain()

    return answer


async def resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def generate(answer: Answer) -> Generation:
    async def ask() -> Generation:
        async with engine(answer) as client:
            try:
                return await client.generate("r/0/0/0.", [1], {})
            finally:
                assert client.in_flight == 0

    return asyncio.run(ask())


WHOLE = {"output_ids": [5, 6], "meta_info": {"finish_reason": {"type": "abort"}}}
WHOLE["meta_info"]["output_token_logprobs"] = [[-0.5, 5, None], [-1, 6, None]]


def test_an_answer_is_a_generation() -> None:
    assert generate(says("200 OK", WHOLE)) == Generation([5, 6], [-0.5, -1.0], Finish.ABORT)


@pytest.mark.parametrize(
    "answer",
    [
        resets,
        says("200 OK", WHOLE, cut=5),
        says("200 OK", "", cut=20),
        says("503 Service Unavailable", {"error": "queue is full"}),
        says("500 Internal Server Error", "scheduler is gone"),
        says("502 Bad Gateway", ""),
        says("500 Internal Server Error", "x" * 99, cut=50),
    ],
)
def test_an_engine_that_goes_away_before_it_has_answered_is_unreachable(answer: Answer) -> None:
    with pytest.raises(EngineUnreachable, match="engine-0"):
        generate(answer)


@pytest.mark.parametrize(
    "answer",
    [
        says("400 Bad Request", {"error": {"message": "the prompt is too long"}}),
        says("404 Not Found", "no such thing"),
        says("200 OK", "no json"),
        says("200 OK", "[]"),
        says("200 OK", {"meta_info": {}}),
        says("200 OK", WHOLE | {"meta_info": {"finish_reason": None}}),
        says("200 OK", WHOLE | {"meta_info": {"finish_reason": {"type": "boredom"}}}),
    ],
)
def test_an_engine_that_answers_otherwise_has_refused(answer: Answer) -> None:
    with pytest.raises(EngineError, match="engine-0 answered") as caught:
        generate(answer)
    assert not isinstance(caught.value, EngineUnreachable)


def test_nobody_listening_is_unreachable_for_requests_and_aborts() -> None:
    async def ask() -> None:
        async with EngineClient("engine-0", "http://127.0.0.1:9", 10.0) as client:
            with pytest.raises(EngineUnreachable, match="cannot be reached"):
                await client.generate("r/0/0/0.", [1], {})
            with pytest.raises(EngineUnreachable, match="cannot be reached"):
                await client.abort("r/0/0/0.")

    asyncio.run(ask())


def test_an_engine_that_hangs_is_neither() -> None:
    async def ask() -> None:
        async def hangs(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read()

        async with engine(hangs, timeout=0.1) as client:
            with pytest.raises(TimeoutError) as caught:
                await client.generate("r/0/0/0.", [1], {})
            assert not isinstance(caught.value, EngineError)

    asyncio.run(ask())


def test_a_cancelled_request_closes_its_connection() -> None:
    async def ask() -> None:
        arrived, closed = asyncio.Event(), asyncio.Event()

        async def hangs(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            arrived.set()
            with suppress(ConnectionError):
                await reader.read()
            closed.set()

        async with engine(hangs) as client, asyncio.timeout(10), asyncio.TaskGroup() as group:
            request = group.create_task(client.generate("r/0/0/0.", [1], {}))
            await arrived.wait()
            assert client.in_flight == 1 and not closed.is_set()
            request.cancel()
            await closed.wait()
            assert client.in_flight == 0

    asyncio.run(ask())


def test_sglang_has_room_for_its_other_port() -> None:
    assert max(server.free_port() for _ in range(200)) <= 55_535
