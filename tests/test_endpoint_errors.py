"""Bodies that cannot be served: the error that each API has for them, and nothing else happens."""

import asyncio
import gzip
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from endpoint_world import LIMITS, World, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_endpoint_sdks import CHAT_TOOLS

from actors.endpoint.asking import ApiError
from actors.endpoint.completions import COMPLETIONS
from actors.endpoint.messages import MESSAGES
from actors.endpoint.responses import RESPONSES
from stream_rl.errors import EngineError

USER = [{"role": "user", "content": "x"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "must not be empty"),
    ({"messages": None}, "must be a list of objects"),
    ({"messages": ["x"]}, "must be a list of objects"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "role must be"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "takes text only"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "takes text only"),
    ({"messages": [{"role": "user", "content": 7}]}, "must be a list of objects"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "expected parts"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id must be a string"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "needs its function"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1, "function": {}}]}]}, "needs the strings"),
    ({"n": 2}, "n must be 1"),
    ({"response_format": {"type": "json_object"}}, "response_format must be text"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format must be text"),
    ({"guided_regex": "a*"}, "grammar"),
    ({"logprobs": True, "top_logprobs": 3}, "top_logprobs must be 0"),
    ({"tool_choice": "required"}, "tool_choice must be auto or none"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice must be auto or none"),
    ({"tools": [{"type": "retrieval"}]}, "only tools of type function"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "needs a name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "must be a JSON schema"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]}, "no JSON schema"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": 3}}}}]},
        "no JSON schema: 3 is not of type",
    ),
    ({"max_tokens": 0}, "max_tokens must be an integer"),
    ({"max_tokens": True}, "max_tokens must be an integer"),
    ({"max_tokens": "9"}, "max_tokens must be an integer"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"stop": ["a"] * 5}, "stop must be a string or up to 4"),
    ({"stop": [""]}, "stop must be a string"),
    ({"model": 7}, "model must be a string"),
    ({"functions": [{}]}, "use tools"),
]
RESPONSE: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "must not be empty"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "takes text only"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "not supported"),
    ({"previous_response_id": "resp_x"}, "not found"),
    ({"background": True}, "not supported"),
    ({"text": {"format": {"type": "json_schema"}}}, "grammar"),
    ({"tools": [{"type": "web_search"}]}, "only tools of type function"),
    ({"tool_choice": "required"}, "tool_choice must be"),
    ({"top_logprobs": 2}, "top_logprobs must be 0"),
    ({"text": {"format": 7}}, "text.format"),
    ({"previous_response_id": []}, "not found"),
    ({"include": 7}, "include must be"),
]
ANTHROPIC: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "at least one message"),
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "takes text only"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "takes text only"),
    ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "not prefilled"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role must be"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [{"name": "f"}]}, "input_schema: Field required"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "runs no tools itself"),
    ({"tools": [{"name": "f", "input_schema": {"type": 3}}]}, "no JSON schema"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "grammar"),
    ({"stop_sequences": "x" * 9, "max_tokens": -1}, "max_tokens"),
]
CASES = [
    *(("/v1/chat/completions", {"model": "m", "messages": USER} | wrong, says) for wrong, says in CHAT),
    *(("/v1/responses", {"model": "m", "input": "x"} | wrong, says) for wrong, says in RESPONSE),
    *(("/v1/messages", {"model": "m", "messages": USER, "max_tokens": 5} | wrong, says) for wrong, says in ANTHROPIC),
]


def test_each_wrong_body_is_an_error_of_its_api_and_samples_nothing() -> None:
    async def scene(world: World) -> None:
        http = await world.http(world.episode().key)
        for path, body, says in CASES:
            answer = await http.post(path, json=body)
            said = answer.json()
            assert answer.status_code == 400, (body, said)
            assert says in said["error"]["message"], (body, said)
            assert said["error"]["type"] == "invalid_request_error"
            assert (said.get("type") == "error") == (path == "/v1/messages")
            assert answer.headers["x-should-retry"] == "false"
        assert not world.course.turns
        assert (await http.post("/v1/responses", json={"model": "m", "input": "x"})).status_code == 200

    play(scene)


def test_the_sdks_raise_what_they_have_for_it() -> None:
    async def scene(world: World) -> None:
        client, other = await world.openai("wrong"), await world.anthropic("wrong")
        ask: Any = {"model": "m", "messages": USER, "max_tokens": 5}
        with pytest.raises(openai.AuthenticationError, match="no episode has this API key"):
            await client.chat.completions.create(**ask)
        with pytest.raises(anthropic.AuthenticationError, match="no episode has this API key"):
            await other.messages.create(**ask)
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        episode = world.episode()
        client, other = await world.openai(episode.key), await world.anthropic(episode.key)
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="m", input="x")
        with pytest.raises(anthropic.NotFoundError):
            await other.messages.batches.list()
        large: Any = [{"role": "user", "content": "x" * 10_000_000}]
        with pytest.raises(anthropic.RequestTooLargeError):
            await other.messages.create(model="m", messages=large, max_tokens=5)
        with pytest.raises(openai.APIStatusError) as error:
            await client.chat.completions.create(model="m", messages=large)
        assert error.value.status_code == 413
        assert not world.course.turns

    play(scene)


def test_a_text_that_cannot_fit_is_not_tokenized() -> None:
    async def scene(world: World) -> None:
        world.chat.prompt = lambda *_: 1 // 0  # type: ignore[method-assign,assignment,return-value]
        client = await world.openai(world.episode().key)
        large: Any = [{"role": "user", "content": "x" * 5_000_000}]
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(model="m", messages=large)
        assert error.value.code == "context_length_exceeded"

    play(scene, options={"max_context_tokens": LIMITS.max_context_tokens})


@pytest.mark.parametrize(
    ("raw", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"null", {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, {}, 400),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\u0000"}]}', {}, 200),
        (b"not gzip", {"Content-Encoding": "gzip"}, 400),
        (gzip.compress(b" " * 20_000_000), {"Content-Encoding": "gzip"}, 413),
    ],
)
def test_bytes_that_are_no_request(raw: bytes, headers: dict[str, str], status: int) -> None:
    async def scene(world: World) -> None:
        http = await world.http(world.episode().key)
        answer = await http.post("/v1/chat/completions", content=raw, headers=headers)
        assert answer.status_code == status, answer.text
        assert status == 200 or answer.json()["error"]["type"] == "invalid_request_error"
        fine = await http.post("/v1/chat/completions", json={"model": "m", "messages": USER})
        assert fine.status_code == 200

    play(scene)


def test_a_client_that_never_sends_its_body_is_not_waited_for() -> None:
    async def scene(world: World) -> None:
        host, port = world.endpoint.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        key = world.episode().key
        writer.write(
            f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        assert b" 408 " in await reader.readline()
        writer.close()

    play(scene, options={"body_timeout_s": 0.05})


def test_what_this_run_cannot_do_is_said() -> None:
    async def scene(world: World) -> None:
        http = await world.http(world.episode().key)
        ask = {"model": "m", "messages": USER}
        tool = {"type": "function", "function": {"name": "f"}}
        answer = await http.post("/v1/chat/completions", json=ask | {"tools": [tool]})
        assert "agent.tool_parser" in answer.json()["error"]["message"]
        answer = await http.post("/v1/chat/completions", json=ask | {"stop": "x"})
        assert "skip_tokenizer_init" in answer.json()["error"]["message"]
        assert not world.course.turns

    play(scene, format={"tools": ""}, options={"stop_sequences": False})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BASES = {path: body for path, body, _ in reversed(CASES)}
READ = {api.path: api for api in (COMPLETIONS, RESPONSES, MESSAGES)}


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CASES), st.data())
def test_no_body_is_anything_but_a_request_or_an_error(case: tuple[str, dict[str, Any], str], data: Any) -> None:
    """Any value anywhere in a body that was nearly right."""
    path, body, _ = case
    body = json.loads(json.dumps(body))
    value, within = data.draw(JSON), body
    while True:
        keys = list(within) if isinstance(within, dict) else list(range(len(within)))
        key = data.draw(st.sampled_from(keys))
        if not within[key] or not isinstance(within[key], dict | list) or data.draw(st.booleans()):
            within[key] = value
            break
        within = within[key]
    try:
        ask = READ[path].read(body, {})
    except ApiError as error:
        assert error.status == 400  # noqa: PT017  it may be none
    else:
        assert all(isinstance(message["content"], str) for message in ask.messages) and ask.messages


def test_a_turn_that_no_engine_could_parse_is_what_who_asks_again_gets() -> None:
    """It trains, so it must be what its agent went on from."""

    async def scene(world: World) -> None:
        async def fails(*_: Any) -> Any:
            raise EngineError("no parser")

        http = await world.http(world.episode().key)

        async def ask(*messages: dict[str, Any]) -> httpx.Response:
            asked = {"model": "m", "messages": list(messages), "tools": CHAT_TOOLS}
            return await http.post("/v1/chat/completions", json=asked)

        parses = world.engines.parse_function_call
        world.engines.parse_function_call = fails  # type: ignore[method-assign]
        answer = await ask(*USER)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "true")
        world.engines.parse_function_call = parses  # type: ignore[method-assign]
        again = (await ask(*USER)).json()
        assert again["choices"][0]["message"]["content"] == "ok"
        assert (await ask(*USER)).status_code == 200, "a new sample"
        await ask(*USER, {"role": "assistant", "content": "ok"}, *USER)
        assert [member for member, _, _ in world.course.turns] == [0, 1, 1]

    play(scene)
