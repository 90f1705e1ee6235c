"""Anthropic's messages: POST /v1/messages, and /v1/messages/count_tokens."""

import json
from collections.abc import Iterator
from typing import Any

from actors.endpoint import asking
from actors.endpoint.answer import Answer, Ending
from actors.endpoint.api import Api, Stored, event
from actors.endpoint.asking import ApiError, Ask, Body, refuse

STOP = {
    Ending.STOP: "end_turn",
    Ending.STOP_SEQUENCE: "stop_sequence",
    Ending.LENGTH: "max_tokens",
    Ending.CONTEXT: "model_context_window_exceeded",
}
ERRORS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
}


def read(body: Body, _: Stored = {}) -> Ask:  # noqa: B006  nobody writes to it
    ask = read_for_count(body)
    if not ask.max_new_tokens:
        raise refuse("max_tokens: Field required", "max_tokens")
    return ask


def read_for_count(body: Body) -> Ask:
    """Without what only a turn needs."""
    if body.get("output_format") or (
        isinstance(body.get("output_config"), dict) and body["output_config"].get("format")
    ):
        raise refuse("output_config.format: a grammar would change which tokens can be sampled", "output_config")
    if body.get("mcp_servers") or body.get("container"):
        raise refuse("mcp_servers and container: this server runs no tools itself", "mcp_servers")
    choice = body.get("tool_choice")
    if choice is not None and (not isinstance(choice, dict) or choice.get("type") not in ("auto", "none")):
        raise refuse(
            "tool_choice: type must be auto or none; to force a call, a grammar would have to change which tokens can "
            "be sampled",
            "tool_choice",
        )
    system = asking.text_of(body.get("system"), "system", ("text",))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(asking.listed(body.get("messages"), "messages")):
        messages += _messages(message, f"messages.{number}")
    if messages and messages[-1]["role"] == "assistant":
        raise refuse("messages: the last must be a user's; what the assistant says is not prefilled", "messages")
    if not any(message["role"] != "system" for message in messages):
        raise refuse("messages: at least one message is required", "messages")
    tools = asking.listed(body.get("tools") or [], "tools")
    return Ask(
        messages=asking.with_names(messages),
        model=asking.string(body, "model"),
        tools=asking.read_each(tools, _tool, "tools"),
        call_tools=choice is None or choice["type"] == "auto",
        max_new_tokens=asking.integer(body, "max_tokens"),
        stop=asking.strings(body, "stop_sequences", 16),
        stream=asking.flag(body, "stream"),
        not_applied=asking.not_applied(body),
    )


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise refuse(f"{where}: this server runs no tools itself, got one of type {tool['type']!r}", where)
    if "input_schema" not in tool:
        raise refuse(f"{where}.input_schema: Field required", where)
    return asking.tool(tool.get("name"), tool.get("description"), tool["input_schema"], where)


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A user's message may hold results of tools, each a message of its own in the chat."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise refuse(f"{where}.role must be user or assistant, got {role!r}", where)
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else asking.listed(content, where)
    if role == "assistant":
        return [_assistant(blocks, where)]
    results = [_result(block, where) for block in blocks if block.get("type") == "tool_result"]
    others = [block for block in blocks if block.get("type") != "tool_result"]
    text = asking.text_of(others, where, ("text",))
    return [*results, {"role": role, "content": text}] if others else results


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    text = asking.text_of(block.get("content"), f"{where}.tool_result.content", ("text",))
    return {"role": "tool", "tool_call_id": asking.string(block, "tool_use_id"), "content": text}


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    calls, texts, reasoning = [], [], []
    for block in blocks:
        match block.get("type"):
            case "tool_use":
                arguments = json.dumps(block.get("input") or {})
                calls.append(asking.call(block.get("id"), block.get("name"), arguments, where))
            case "thinking":
                reasoning.append(asking.string(block, "thinking"))
            case "redacted_thinking":
                pass
            case _:
                texts.append(block)
    return asking.assistant(asking.text_of(texts, where, ("text",)), calls, "".join(reasoning))


# -- the answer ----------------------------------------------------------------------------------------------


def whole(ask: Ask, answer: Answer) -> dict[str, Any]:
    return {
        "id": answer_id(answer),
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": _blocks(answer),
        "stop_reason": _stop_reason(answer),
        "stop_sequence": answer.stop_sequence,
        "usage": _usage(answer, answer.num_sampled),
    }


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    opening: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answer, 1)}
    yield _event("message_start", message=whole(ask, answer) | opening)
    for index, block in enumerate(_blocks(answer)):
        match block["type"]:
            case "text":
                empty: dict[str, Any] = {"text": ""}
                deltas = [{"type": "text_delta", "text": block["text"]}]
            case "thinking":
                empty = {"thinking": "", "signature": ""}
                deltas = [
                    {"type": "thinking_delta", "thinking": block["thinking"]},
                    {"type": "signature_delta", "signature": block["signature"]},
                ]
            case _:
                empty = {"input": {}}
                deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        yield _event("content_block_start", index=index, content_block=block | empty)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    delta = {"stop_reason": _stop_reason(answer), "stop_sequence": answer.stop_sequence}
    yield _event("message_delta", delta=delta, usage={"output_tokens": answer.num_sampled})
    yield _event("message_stop")


def answer_id(answer: Answer) -> str:
    return f"msg_{answer.id}"


def error(error: ApiError) -> dict[str, Any]:
    kind = ERRORS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": None}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    said = answer.said
    blocks: list[dict[str, Any]] = []
    if said.reasoning:
        blocks.append({"type": "thinking", "thinking": said.reasoning, "signature": answer.id})
    if said.text:
        blocks.append({"type": "text", "text": said.text})
    for call in said.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
    return blocks


def _stop_reason(answer: Answer) -> str:
    return "tool_use" if answer.ending == Ending.STOP and answer.said.tool_calls else STOP[answer.ending]


def _usage(answer: Answer, num_sampled: int) -> dict[str, int]:
    return {
        "input_tokens": answer.num_prompt - answer.num_held,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.num_held,
        "output_tokens": num_sampled,
    }


MESSAGES = Api(
    path="/v1/messages",
    read=read,
    whole=whole,
    events=events,
    error=error,
    error_events=lambda problem: [event(error(problem), "error")],
    answer_id=answer_id,
)
