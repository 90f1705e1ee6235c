"""OpenAI's responses: POST /v1/responses."""

from collections.abc import Iterator
from typing import Any

from actors.endpoint import asking
from actors.endpoint.answer import Answer, Ending
from actors.endpoint.api import Api, Stored, event, openai_error
from actors.endpoint.asking import ApiError, Ask, Body, refuse
from actors.endpoint.completions import call_tools, logprobs, read_tools, refuse_grammar

TEXT = ("input_text", "output_text", "text", "refusal")
LOGPROBS = "message.output_text.logprobs"


def read(body: Body, stored: Stored) -> Ask:
    refuse_grammar(body)
    form = body.get("text")
    if form is not None and not (isinstance(form, dict) and form.get("format") in (None, {"type": "text"})):
        raise refuse("text.format must be text: a grammar would change which tokens can be sampled", "text.format")
    for name in ("background", "conversation", "prompt"):
        if body.get(name):
            raise refuse(f"{name} is not supported; send the input, or previous_response_id", name)
    if body.get("top_logprobs"):
        raise refuse("top_logprobs must be 0: only the log-prob of the sampled token is known", "top_logprobs")
    include = body.get("include") or []
    if not isinstance(include, list):
        raise refuse("include must be a list", "include")
    instructions = body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if isinstance(instructions, str) and instructions else []
    opening = len(messages)
    if (previous := body.get("previous_response_id")) is not None:
        if not isinstance(previous, str) or previous not in stored:
            raise ApiError(
                400,
                f"Previous response with id {previous!r} not found: it is of another episode, or too many came since",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        messages += stored[previous]
    _add_items(messages, body.get("input"), len(messages))
    return Ask(
        messages=asking.with_names(messages),
        model=asking.string(body, "model"),
        tools=read_tools(body.get("tools"), _function),
        call_tools=call_tools(body.get("tool_choice")),
        max_new_tokens=asking.integer(body, "max_output_tokens"),
        stream=asking.flag(body, "stream"),
        logprobs=LOGPROBS in include,
        not_applied=asking.not_applied(body),
        opening=opening,
        echo={
            name: body.get(name)
            for name in ("instructions", "previous_response_id", "max_output_tokens", "metadata", "tools", "store")
        },
    )


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise refuse(f"{where}: only tools of type function are known, got {tool.get('type')!r}", where)
    return asking.tool(tool.get("name"), tool.get("description"), tool.get("parameters"), where)


def _add_items(messages: list[dict[str, Any]], value: Any, first: int) -> None:
    """What one turn of the model said may be several items: it becomes one message.  Those before `first` are whole."""
    items = [{"role": "user", "content": value}] if isinstance(value, str) else asking.listed(value, "input")
    for number, item in enumerate(items):
        where = f"input[{number}]"
        last = messages[-1] if len(messages) > first and messages[-1]["role"] == "assistant" else None
        match item.get("type", "message"):
            case "message":
                text = asking.text_of(item.get("content"), f"{where}.content", TEXT)
                role = {"developer": "system"}.get(item.get("role", ""), item.get("role"))
                if role not in ("system", "user", "assistant"):
                    raise refuse(f"{where}.role must be user, assistant, system or developer, got {role!r}", where)
                if role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
                    last["content"] = text
                else:
                    messages.append({"role": role, "content": text})
            case "function_call":
                call = asking.call(item.get("call_id"), item.get("name"), item.get("arguments"), where)
                if last is None:
                    messages.append(asking.assistant("", [call]))
                else:
                    last["tool_calls"] = [*last.get("tool_calls", ()), call]
            case "function_call_output":
                output = asking.text_of(item.get("output"), f"{where}.output", TEXT)
                call_id = asking.string(item, "call_id")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case "reasoning":
                messages.append(asking.assistant("", [], _reasoning(item)))
            case kind:
                raise refuse(f"{where}: items of type {kind!r} are not supported", where)


def _reasoning(item: dict[str, Any]) -> str:
    parts = item.get("content") or []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


# -- the answer ----------------------------------------------------------------------------------------------


def whole(ask: Ask, answer: Answer) -> dict[str, Any]:
    cut = {Ending.LENGTH: "max_output_tokens", Ending.CONTEXT: "context_window"}.get(answer.ending)
    usage = {
        "input_tokens": answer.num_prompt,
        "input_tokens_details": {"cached_tokens": answer.num_held},
        "output_tokens": answer.num_sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.num_prompt + answer.num_sampled,
    }
    status = "incomplete" if cut else "completed"
    return _response(ask, answer, status) | {
        "incomplete_details": {"reason": cut} if cut else None,
        "output": _items(ask, answer, status),
        "usage": usage,
    }


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    sequence = 0

    def say(kind: str, **fields: Any) -> bytes:
        nonlocal sequence
        sequence += 1
        return event({"type": kind, "sequence_number": sequence - 1, **fields}, kind)

    begun = _response(ask, answer, "in_progress")
    yield say("response.created", response=begun)
    yield say("response.in_progress", response=begun)
    done = whole(ask, answer)
    for index, item in enumerate(done["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        started = item | {"status": "in_progress"}
        match item["type"]:
            case "message":
                [part] = item["content"]
                in_part = {**at, "content_index": 0}
                empty = part | {"text": "", "logprobs": []}
                said = {**in_part, "logprobs": part["logprobs"]}
                yield say("response.output_item.added", output_index=index, item=started | {"content": []})
                yield say("response.content_part.added", **in_part, part=empty)
                yield say("response.output_text.delta", **said, delta=part["text"])
                yield say("response.output_text.done", **said, text=part["text"])
                yield say("response.content_part.done", **in_part, part=part)
            case "function_call":
                yield say("response.output_item.added", output_index=index, item=started | {"arguments": ""})
                yield say("response.function_call_arguments.delta", **at, delta=item["arguments"])
                yield say("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
            case _:
                text = item["content"][0]["text"]
                yield say("response.output_item.added", output_index=index, item=started | {"content": []})
                yield say("response.reasoning_text.delta", **at, content_index=0, delta=text)
                yield say("response.reasoning_text.done", **at, content_index=0, text=text)
        yield say("response.output_item.done", output_index=index, item=item)
    yield say(f"response.{done['status']}", response=done)


def answer_id(answer: Answer) -> str:
    return f"resp_{answer.id}"


def _response(ask: Ask, answer: Answer, status: str) -> dict[str, Any]:
    return {
        "id": answer_id(answer),
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": ask.model,
        "output": [],
        "parallel_tool_calls": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto" if ask.call_tools else "none",
        "top_p": None,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        **ask.echo,
        "tools": ask.echo.get("tools") or [],
        "metadata": ask.echo.get("metadata") or {},
    }


def _items(ask: Ask, answer: Answer, status: str) -> list[dict[str, Any]]:
    said = answer.said
    items: list[dict[str, Any]] = []
    if said.reasoning:
        content = [{"type": "reasoning_text", "text": said.reasoning}]
        items.append(
            {"id": f"rs_{answer.id}", "type": "reasoning", "summary": [], "content": content, "status": status}
        )
    if said.text or not said.tool_calls:
        part = {
            "type": "output_text",
            "text": said.text,
            "annotations": [],
            "logprobs": logprobs(answer) if ask.logprobs else [],
        }
        items.append(
            {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "content": [part], "status": status}
        )
    for call in said.tool_calls:
        items.append(
            {
                "id": f"fc_{call.id}",
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": status,
            }
        )
    return items


def _error_events(error: ApiError) -> list[bytes]:
    said = {"type": "error", "sequence_number": 0, "code": error.code, "message": error.message, "param": error.param}
    return [event(said, "error")]


RESPONSES = Api(
    path="/v1/responses",
    read=read,
    whole=whole,
    events=events,
    error=openai_error,
    error_events=_error_events,
    answer_id=answer_id,
)
