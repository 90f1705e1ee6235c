"""The real SDKs, unmodified, against the endpoint: tools, streams, usage, log-probs, stop reasons."""

import json
from typing import Any

import openai
import pytest
from endpoint_world import World, play

TOOL = {
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
}
CHAT_TOOLS: Any = [{"type": "function", "function": {**TOOL, "strict": True}}]
FLAT_TOOLS: Any = [{"type": "function", **TOOL, "strict": None}]
ANTHROPIC_TOOLS: Any = [{"name": "add", "description": "adds", "input_schema": TOOL["parameters"]}]
CALLS = (
    'I add.<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    '<tool_call>{"name": "add", "arguments": {"x": 2}}</tool_call>'
)
RESULTS = "\n<|im_start|>user\n<tool_response>one</tool_response>\n<tool_response>two</tool_response><|im_end|>\n"


def one_branch(world: World, *texts: str) -> None:
    """All turns are on one trajectory, each behind exactly what was sampled before and then `texts`."""
    tokens: list[int] = []
    for (member, before, sampled), text in zip(world.course.turns, texts, strict=True):
        assert member == 0
        assert before[: len(tokens)] == tokens
        assert world.text(before[len(tokens) :]) == text + "<|im_start|>assistant\n"
        tokens = before + sampled


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_of_openais_chat_completions(stream: bool) -> None:
    async def scene(world: World) -> None:
        world.says(CALLS, "Three.")
        client = await world.openai(world.episode().key)
        messages: list[Any] = [{"role": "developer", "content": "Add."}, {"role": "user", "content": "1 + 2?"}]

        async def ask() -> Any:
            options: Any = {"model": "any", "messages": messages, "tools": CHAT_TOOLS, "logprobs": True}
            if not stream:
                return await client.chat.completions.create(**options)
            async with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as events:
                return await events.get_final_completion()

        first = await ask()
        choice = first.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I add.")
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"x": 1}, {"x": 2}]
        assert len({call.id for call in calls}) == 2
        _, before, sampled = world.course.turns[0]
        assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (len(before), len(sampled))
        logprobs = choice.logprobs.content
        assert "".join(one.token for one in logprobs) == CALLS
        assert [one.logprob for one in logprobs] == [-token / 512 for token in sampled[:-1]]
        assert bytes(byte for one in logprobs for byte in one.bytes) == CALLS.encode()
        messages.append(choice.message.model_dump(exclude_none=True) if stream else choice.message)
        messages.extend(
            {"role": "tool", "tool_call_id": call.id, "content": said}
            for call, said in zip(calls, ("one", "two"), strict=True)
        )
        last = await ask()
        assert (last.choices[0].finish_reason, last.choices[0].message.content) == ("stop", "Three.")
        assert last.usage.prompt_tokens_details.cached_tokens == len(before) + len(sampled)
        tools = "\n" + json.dumps({"type": "function", "function": TOOL}, ensure_ascii=False)
        opening = f"<|im_start|>system\nAdd.\nTools:{tools}<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        one_branch(world, opening, RESULTS)

    world = play(scene)
    assert (world.counts["endpoint.begun"], world.counts["endpoint.continued"]) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_session_of_openais_responses(stream: bool, by_name: bool) -> None:
    async def scene(world: World) -> None:
        world.says(CALLS, "Three.")
        client = await world.openai(world.episode().key)

        async def ask(items: Any, **options: Any) -> Any:
            options = {"model": "any", "input": items, "tools": FLAT_TOOLS, "instructions": "Add.", **options}
            if not stream:
                return await client.responses.create(**options)
            async with client.responses.stream(**options) as events:
                return await events.get_final_response()

        items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "1 + 2?"}]}]
        first = await ask(items, include=["message.output_text.logprobs"])
        message, *calls = first.output
        assert (first.status, first.output_text, message.type) == ("completed", "I add.", "message")
        assert [json.loads(call.arguments) for call in calls] == [{"x": 1}, {"x": 2}]
        assert first.usage.output_tokens == len(world.course.turns[0][2])
        assert "".join(one.token for one in message.content[0].logprobs) == CALLS
        results = [
            {"type": "function_call_output", "call_id": call.call_id, "output": said}
            for call, said in zip(calls, ("one", "two"), strict=True)
        ]
        if by_name:
            last = await ask(results, previous_response_id=first.id)
        else:
            last = await ask([*items, *(item.to_dict() for item in first.output), *results])
        assert last.output_text == "Three."
        assert [member for member, _, _ in world.course.turns] == [0, 0]
        assert world.text(world.course.turns[1][1]).endswith(RESULTS + "<|im_start|>assistant\n")

    play(scene)


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_of_anthropics_messages(stream: bool) -> None:
    async def scene(world: World) -> None:
        world.says("<think>hm</think>" + CALLS, "Three.")
        client = await world.anthropic(world.episode().key)
        messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]}]

        async def ask() -> Any:
            options: Any = {
                "model": "any", "system": "Add.", "messages": messages, "tools": ANTHROPIC_TOOLS, "max_tokens": 300,
            }  # fmt: skip
            if not stream:
                return await client.messages.create(**options)
            async with client.messages.stream(**options) as events:
                return await events.get_final_message()

        first = await ask()
        thinking, text, *calls = first.content
        assert (first.stop_reason, thinking.thinking, text.text) == ("tool_use", "hm", "I add.")
        assert [call.input for call in calls] == [{"x": 1}, {"x": 2}]
        _, before, sampled = world.course.turns[0]
        assert (first.usage.input_tokens, first.usage.output_tokens) == (len(before), len(sampled))
        # what it thought is not sent back
        messages.append({"role": "assistant", "content": [text, *calls]})
        messages.append(
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": calls[0].id, "content": "one"},
                    {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "two"}]},
                ],
            }
        )
        counted = await client.messages.count_tokens(
            model="any", system="Add.", messages=messages, tools=ANTHROPIC_TOOLS
        )
        last = await ask()
        assert (last.stop_reason, last.content[0].text) == ("end_turn", "Three.")
        assert [member for member, _, _ in world.course.turns] == [0, 0]
        assert counted.input_tokens == len(world.course.turns[1][1])
        assert last.usage.cache_read_input_tokens == len(before) + len(sampled)
        assert world.text(world.course.turns[1][1]).endswith(RESULTS + "<|im_start|>assistant\n")

    play(scene, format={"reasoning": "qwen3"})


def test_why_a_turn_ended_is_told_apart() -> None:
    async def scene(world: World) -> None:
        world.course.say = lambda before: world.ids("a" * 2000)
        key = world.episode().key
        client, other = await world.openai(key), await world.anthropic(key)
        ask: Any = {"model": "m", "messages": [{"role": "user", "content": "go"}]}
        completion = await client.chat.completions.create(**ask, max_tokens=5)
        assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 5
        message = await other.messages.create(**ask, max_tokens=5)
        assert (message.stop_reason, message.content[0].text) == ("max_tokens", "aaaaa")
        message = await other.messages.create(**ask, max_tokens=900)
        assert (message.stop_reason, message.usage.output_tokens) == ("model_context_window_exceeded", 500)
        response = await client.responses.create(model="m", input="go", max_output_tokens=5)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        response = await client.responses.create(model="m", input="go")
        assert response.incomplete_details.reason == "context_window"

        world.course.say = lambda before: world.ids("wait Observation: x", ended=False)
        message = await other.messages.create(**ask, max_tokens=50, stop_sequences=["Observ", "Obs"])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Obs")
        assert message.content[0].text == "wait "
        assert world.course.stops[-1] == ("Observ", "Obs")

        long: Any = [{"role": "user", "content": "x" * 3998}]
        with pytest.raises(openai.BadRequestError) as full:
            await client.chat.completions.create(model="m", messages=long)
        assert full.value.code == "context_length_exceeded"

    play(scene)


def test_a_call_that_cannot_be_read_is_text_and_counted() -> None:
    async def scene(world: World) -> None:
        world.says("<tool_call>{add}</tool_call>", "sorry")
        client = await world.openai(world.episode().key)
        messages: list[Any] = [{"role": "user", "content": "1 + 2?"}]
        first = await client.chat.completions.create(model="m", messages=messages, tools=CHAT_TOOLS)
        message = first.choices[0].message
        assert (message.content, message.tool_calls) == ("<tool_call>{add}</tool_call>", None)
        messages += [message, {"role": "user", "content": "what?"}]
        await client.chat.completions.create(model="m", messages=messages, tools=CHAT_TOOLS)
        assert [member for member, _, _ in world.course.turns] == [0, 0]

    assert play(scene).counts["endpoint.malformed_tool_call"] == 1


def test_the_model_is_listed_and_answers_to_any_name() -> None:
    async def scene(world: World) -> None:
        key = world.episode().key
        client, other = await world.openai(key), await world.anthropic(key)
        assert [model.id async for model in client.models.list()] == ["policy"]
        assert [model.id async for model in other.models.list()] == ["policy"]
        assert (await client.models.retrieve("org/gpt")).id == "org/gpt"
        answer = await client.chat.completions.create(model="org/gpt", messages=[{"role": "user", "content": "x"}])
        assert answer.model == "org/gpt"

    play(scene)


def test_what_is_the_recipes_to_say_is_not_applied_and_said_so() -> None:
    async def scene(world: World) -> None:
        client = await world.openai(world.episode().key)
        raw = await client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "x"}], temperature=0, seed=4, user="me"
        )
        assert raw.headers["x-stream-rl-not-applied"] == "seed,temperature"

    world = play(scene)
    assert world.counts["endpoint.not_applied.seed"] == world.counts["endpoint.not_applied.temperature"] == 1
