"""Engines whose parsers of tool calls and reasoning answer oddly: who asked hears it, and no sampled token is lost."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import environment_world
import httpx
import pytest
from actor_world import usable
from chat_builders import chat
from endpoint_world import World, play
from fake_engine import FakeEngine
from test_endpoint_sdks import CHAT_TOOLS

from actors.engine_pool import EnginePool

CALLS, REASONING = "/parse_function_call", "/separate_reasoning"
ODD: list[tuple[str, int, bytes]] = [
    (CALLS, 200, b'{"normal_text": "ok"}'),
    (CALLS, 200, b'{"normal_text": "ok", "calls": null}'),
    (CALLS, 200, b'{"normal_text": "ok", "calls": {"name": "add"}}'),
    (CALLS, 200, b'{"normal_text": "ok", "calls": [{"name": "add"}]}'),
    (CALLS, 200, b'{"normal_text": 7, "calls": []}'),
    (CALLS, 200, b"[]"),
    (CALLS, 200, b"<html>"),
    (CALLS, 200, b"\xff"),
    (CALLS, 200, b""),
    (CALLS, 400, b"unknown parser"),
    (CALLS, 422, b"\xff"),
    (CALLS, 500, b"Internal Server Error"),
    (REASONING, 200, b'{"reasoning_text": ["hm"], "text": "ok"}'),
    (REASONING, 200, b'{"reasoning_text": "", "text": {}}'),
    (REASONING, 200, b"no"),
    (REASONING, 503, b""),
]


def well(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """What parsers answer that find nothing."""
    text = body["text"]
    said = {"reasoning_text": "", "text": text} if path == REASONING else {"normal_text": text, "calls": []}
    return 200, json.dumps(said).encode()


def oddly(engine: FakeEngine, where: str, status: int, body: bytes, times: int = 1000) -> None:
    """From now on, for so many questions."""
    left = iter(range(times))

    def parse(path: str, asked: dict[str, Any]) -> tuple[int, bytes]:
        odd = path == where and next(left, None) is not None
        return (status, body) if odd else well(path, asked)

    engine.parse = parse


@contextlib.asynccontextmanager
async def pool_of(engine: FakeEngine) -> AsyncIterator[EnginePool]:
    async with engine, EnginePool(5.0) as pool, asyncio.TaskGroup() as loops:
        running = loops.create_task(pool.run())
        await pool.update(usable(engine))
        yield pool
        running.cancel()


class Talk:
    """One episode's session with tools, over the endpoint and a real pool of one engine."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}]

    async def ask(self) -> httpx.Response:
        asked = {"model": "m", "messages": self._messages, "tools": CHAT_TOOLS}
        return await self._http.post("/v1/chat/completions", json=asked)

    async def hear(self, said: str) -> None:
        """It is answered so, and the next question is behind it."""
        answer = await self.ask()
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        assert message["content"] == said
        self._messages += [message, {"role": "user", "content": "b"}]


@contextlib.asynccontextmanager
async def talk(world: World, engine: FakeEngine) -> AsyncIterator[Talk]:
    async with pool_of(engine) as pool:
        world.engines.pick, world.engines.doubt = pool.pick, pool.doubt  # type: ignore[method-assign]
        yield Talk(await world.http(world.episode().key))


@pytest.mark.parametrize(("where", "status", "body"), ODD)
def test_a_parser_that_answers_oddly_is_an_error_to_ask_again_after(where: str, status: int, body: bytes) -> None:
    async def scene(world: World) -> None:
        world.says("one", "two")
        engine = FakeEngine()
        async with talk(world, engine) as t:
            oddly(engine, where, status, body)
            answer = await t.ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
            assert answer.headers["x-should-retry"] == "true"
            engine.parse = well
            await t.hear("one")
            await t.hear("two")
        (first, before, sampled), (second, behind, _) = world.course.turns
        assert (first, second) == (0, 0), "one trajectory"
        assert behind[: len(before) + len(sampled)] == before + sampled

    counts = play(scene, format={"reasoning": "qwen3"}).counts
    assert (counts["endpoint.engine_error"], counts["endpoint.internal_error"]) == (1, 0)


def test_an_engine_that_fails_to_parse_a_turn_once_is_nothing_that_its_client_hears_of() -> None:
    async def scene(world: World) -> None:
        world.says("one", "two")
        engine = FakeEngine()
        async with talk(world, engine) as t:
            oddly(engine, CALLS, 500, b"", times=1)
            await t.hear("one")
            await t.hear("two")
        assert [member for member, _, _ in world.course.turns] == [0, 0]

    assert not play(scene).counts["endpoint.engine_error"]


# -- an environment process ----------------------------------------------------------------------------------

TASK = """
import pathlib
from stream_rl.episode import EpisodeFailed

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]

class Game:
    def prompts(self, split, seed):
        yield from ()

    async def play(self, prompt, model):
        try:
            await model.turn([{"role": "user", "content": "a"}], tools=TOOLS)
        except EpisodeFailed as failure:
            assert failure.reason == "not_parsed"
            turn = await model.turn([{"role": "user", "content": "b"}])
            return float(turn.text == "two")
        return -1.0
"""


@pytest.mark.parametrize(("where", "status", "body"), [one for one in ODD if one[0] == CALLS])
def test_a_turn_that_is_not_parsed_is_a_failure_that_play_may_go_on_from(where: str, status: int, body: bytes) -> None:
    engine = FakeEngine()
    oddly(engine, where, status, body)
    format = chat()

    async def scene(world: environment_world.World) -> None:
        said = iter(["one", "two"])
        world.course.say = lambda before: format._encode(next(said))
        world.begin()
        await world.ended(0)
        assert world.course.ends[0] == (1.0, {})
        (first, before, sampled), (second, behind, _) = world.course.turns
        assert (first, second) == (0, 0)
        assert behind[: len(before) + len(sampled)] == before + sampled

    environment_world.play(scene, task=TASK, chat=format, engines=lambda: pool_of(engine))
