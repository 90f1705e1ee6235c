"""OpenAI's chat completions: POST /v1/chat/completions."""

from collections.abc import Iterator, Mapping
from typing import Any

from actors.endpoint import asking
from actors.endpoint.answer import Answer, Ending
from actors.endpoint.api import Api, Stored, event, openai_error
from actors.endpoint.asking import Ask, Body, refuse

FINISH = {Ending.STOP: "stop", Ending.STOP_SEQUENCE: "stop", Ending.LENGTH: "length", Ending.CONTEXT: "length"}


def read(body: Body, _: Stored = {}) -> Ask:  # noqa: B006  nobody writes to it
    refuse_grammar(body)
    if body.get("n") not in (None, 1):
        raise refuse("n must be 1: each request is one turn of the episode", "n")
    if body.get("functions") or body.get("function_call"):
        raise refuse("functions is the old form; use tools", "functions")
    if body.get("top_logprobs"):
        raise refuse("top_logprobs must be 0: only the log-prob of the sampled token is known", "top_logprobs")
    if (body.get("modalities") or ["text"]) != ["text"] or body.get("audio"):
        raise refuse("modalities must be text", "modalities")
    options = body.get("stream_options")
    messages = asking.listed(body.get("messages"), "messages")
    return Ask(
        messages=asking.with_names(asking.read_each(messages, _message, "messages")),
        model=asking.string(body, "model"),
        tools=read_tools(body.get("tools"), _function),
        call_tools=call_tools(body.get("tool_choice")),
        max_new_tokens=asking.integer(body, "max_completion_tokens", "max_tokens"),
        stop=asking.strings(body, "stop", 4),
        stream=asking.flag(body, "stream"),
        stream_usage=isinstance(options, dict) and asking.flag(options, "include_usage"),
        logprobs=asking.flag(body, "logprobs"),
        not_applied=asking.not_applied(body),
    )


def refuse_grammar(body: Body) -> None:
    """A grammar masks what may be sampled, and the log-probs would not say so."""
    form = body.get("response_format") or {"type": "text"}
    if not isinstance(form, Mapping) or form.get("type") != "text":
        raise refuse(
            "response_format must be text: a grammar would change which tokens can be sampled", "response_format"
        )
    for name in ("regex", "ebnf", "json_schema", "guided_json", "guided_regex", "guided_grammar", "structured_outputs"):
        if body.get(name):
            raise refuse(f"{name}: a grammar would change which tokens can be sampled", name)


def read_tools(value: Any, read_one: Any) -> list[dict[str, Any]]:
    return asking.read_each(asking.listed(value or [], "tools"), read_one, "tools")


def call_tools(choice: Any) -> bool:
    if choice in (None, "auto", "none"):
        return bool(choice != "none")
    raise refuse(
        "tool_choice must be auto or none: to force a call, a grammar would have to change which tokens can be sampled",
        "tool_choice",
    )


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise refuse(f"{where}: only tools of type function are known, got {tool.get('type')!r}", where)
    return asking.tool(function.get("name"), function.get("description"), function.get("parameters"), where)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    text = asking.text_of(message.get("content"), f"{where}.content", ("text", "refusal"))
    match role:
        case "system" | "developer":
            return {"role": "system", "content": text}
        case "user":
            return {"role": "user", "content": text}
        case "assistant":
            made = asking.listed(message.get("tool_calls") or [], f"{where}.tool_calls")
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            return asking.assistant(
                text,
                asking.read_each(made, _call, f"{where}.tool_calls"),
                reasoning if isinstance(reasoning, str) else "",
            )
        case "tool":
            return {"role": "tool", "tool_call_id": asking.string(message, "tool_call_id"), "content": text}
    raise refuse(f"{where}.role must be system, developer, user, assistant or tool, got {role!r}", f"{where}.role")


def _call(made: dict[str, Any], where: str) -> dict[str, Any]:
    function = made.get("function")
    if not isinstance(function, dict):
        raise refuse(f"{where}: a tool call needs its function", where)
    return asking.call(made.get("id"), function.get("name"), function.get("arguments"), where)


# -- the answer ----------------------------------------------------------------------------------------------


def whole(ask: Ask, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _content(answer), "refusal": None}
    if answer.said.reasoning:
        message["reasoning_content"] = answer.said.reasoning
    if answer.said.tool_calls:
        message["tool_calls"] = _calls(answer)
    choice = {"index": 0, "message": message, "logprobs": _logprobs(ask, answer), "finish_reason": _finish(answer)}
    return {**_head(ask, answer, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    head = _head(ask, answer, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **({"usage": None} if ask.stream_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    if answer.said.reasoning:
        yield chunk({"reasoning_content": answer.said.reasoning})
    if answer.said.text or ask.logprobs:
        yield chunk({"content": answer.said.text}, logprobs=_logprobs(ask, answer))
    for number, call in enumerate(_calls(answer)):
        yield chunk({"tool_calls": [{"index": number, **call}]})
    yield chunk({}, _finish(answer))
    if ask.stream_usage:
        yield event({**head, "choices": [], "usage": _usage(answer)})
    yield b"data: [DONE]\n\n"


def _head(ask: Ask, answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer_id(answer), "object": kind, "created": answer.created, "model": ask.model}


def answer_id(answer: Answer) -> str:
    return f"chatcmpl-{answer.id}"


def _content(answer: Answer) -> str | None:
    return answer.said.text or (None if answer.said.tool_calls else "")


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.said.tool_calls
    ]


def _finish(answer: Answer) -> str:
    finish = FINISH[answer.ending]
    return "tool_calls" if finish == "stop" and answer.said.tool_calls else finish


def _logprobs(ask: Ask, answer: Answer) -> dict[str, Any] | None:
    if not ask.logprobs:
        return None
    return {"content": logprobs(answer), "refusal": None}


def logprobs(answer: Answer) -> list[dict[str, Any]]:
    """Of each sampled token, those of reasoning and tool calls included."""
    return [
        {"token": piece.text, "bytes": list(piece.utf8), "logprob": logprob, "top_logprobs": []}
        for piece, logprob in zip(answer.pieces, answer.logprobs, strict=True)
    ]


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_prompt,
        "completion_tokens": answer.num_sampled,
        "total_tokens": answer.num_prompt + answer.num_sampled,
        "prompt_tokens_details": {"cached_tokens": answer.num_held},
    }


COMPLETIONS = Api(
    path="/v1/chat/completions",
    read=read,
    whole=whole,
    events=events,
    error=openai_error,
    error_events=lambda error: [event(openai_error(error))],
    answer_id=answer_id,
)
