"""Requests that come when their episode has ended: an error of its own, and nothing is sampled for them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from endpoint_world import World, play

FIRST = [{"role": "user", "content": "a"}]
NEXT = [*FIRST, {"role": "assistant", "content": "one"}, {"role": "user", "content": "b"}]


def ask(path: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"input": messages} if path == "/v1/responses" else {"messages": messages}
    return {"model": "m", **said} | ({"max_tokens": 9} if path == "/v1/messages" else {})


def check(answer: httpx.Response, status: int, says: str) -> None:
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("messages", [FIRST, NEXT], ids=["a new branch", "the branch that is there"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_episode_ends_before_it_has_come_is_refused(
    path: str, messages: list[dict[str, Any]], stream: bool
) -> None:
    async def scene(world: World) -> None:
        world.says("one")
        episode = world.episode()
        http = await world.http(episode.key)
        assert (await http.post(path, json=ask(path, FIRST))).status_code == 200
        episode.exposed = False

        async def late() -> AsyncIterator[bytes]:
            raw = json.dumps(ask(path, messages) | {"stream": stream}).encode()
            yield raw[:9]
            await world.until(lambda: episode.exposed)  # its key was good
            world.end(episode, "deadline")
            yield raw[9:]

        check(await http.post(path, content=late()), 400, "the episode has ended: deadline")
        check(await http.post(path, json=ask(path, messages)), 401, "no episode has this API key")
        assert len(world.course.stops) == 1, "nothing more is asked of the engines"
        assert not world.course.members, "nor of the queue"

    play(scene)
