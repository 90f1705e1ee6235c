"""A request, whatever API it came by, and what may be wrong with it.

Each API's module reads a body into an `Ask`: messages as OpenAI's chat completions have them, with text alone in them.
What the body asks of sampling is the recipe's to say: it is accepted, not applied, counted, and named in the answer's
header.  What would change which tokens can be sampled without their log-probs saying so is refused.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import msgspec

Body = Mapping[str, Any]

NOT_APPLIED = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "logit_bias"),
        *("repetition_penalty", "parallel_tool_calls", "reasoning_effort", "reasoning", "thinking", "verbosity"),
        *("service_tier", "truncation", "speed", "output_config", "chat_template_kwargs", "context_management"),
    }
)
"""Accepted and without effect: the recipe says how the policy is sampled, for its learner must know it."""


class ApiError(Exception):
    """An answer that is an error, in the terms of both APIs."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        """retry: the same request may do better; SDKs are told either way."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry


def refuse(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """For `raise`: a body that cannot be served."""
    return ApiError(400, message, param=param, code=code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What is wanted of the model."""

    messages: list[dict[str, Any]]
    """In the form that ChatFormat takes: role and content (a string), tool_calls, tool_call_id, name."""
    model: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    call_tools: bool = True
    """False: what the model says is text, whatever it looks like."""
    max_new_tokens: int = 0
    """0: as many as the recipe has it."""
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_usage: bool = False
    logprobs: bool = False
    not_applied: tuple[str, ...] = ()
    opening: int = 0
    """Messages at the front that a later request, which names this one's answer, does not take over."""
    echo: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the body that the answer repeats."""


def not_applied(body: Body) -> tuple[str, ...]:
    return tuple(sorted(name for name in NOT_APPLIED & body.keys() if body[name] is not None))


# -- fields --------------------------------------------------------------------------------------------------


def string(body: Body, name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise refuse(f"{name} must be a string, got {_shown(value)}", name)
    return value


def integer(body: Body, *names: str) -> int:
    """The first of these that is there; 0 if none is."""
    for name in names:
        if (value := body.get(name)) is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise refuse(f"{name} must be an integer of 1 or more, got {_shown(value)}", name)
            return value
    return 0


def flag(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise refuse(f"{name} must be true or false, got {_shown(value)}", name)
    return bool(value)


def strings(body: Body, name: str, most: int) -> tuple[str, ...]:
    """A string or a list of them."""
    value = body.get(name)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > most or not all(isinstance(v, str) and v for v in values):
        raise refuse(f"{name} must be a string or up to {most} of them, none empty, got {_shown(value)}", name)
    return tuple(values)


def listed(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise refuse(f"{name} must be a list of objects, got {_shown(value)}", name)
    return value


def text_of(content: Any, name: str, kinds: Sequence[str | None]) -> str:
    """A string, or the texts of a list of parts of these kinds, one a line."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in listed(content, name):
        kind, text = part.get("type"), part.get("text", part.get("refusal"))
        if kind not in kinds or not isinstance(text, str):
            if isinstance(kind, str) and any(other in kind for other in ("image", "audio", "file", "document")):
                raise refuse(f"{name}: the model takes text only, got a part of type {kind!r}", name)
            raise refuse(f"{name}: expected parts of type {' or '.join(map(str, kinds))}, got {_shown(part)}", name)
        texts.append(text)
    return "\n".join(texts)


def tool(name: Any, description: Any, parameters: Any, where: str) -> dict[str, Any]:
    """A function that the model may call, in the form of chat completions."""
    if not isinstance(name, str) or not name or len(name) > 128:
        raise refuse(f"{where}: a tool needs a name of up to 128 letters, got {_shown(name)}", where)
    if description is not None and not isinstance(description, str):
        raise refuse(f"{where}: description must be a string, got {_shown(description)}", where)
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise refuse(f"{where}: the parameters of {name!r} must be a JSON schema, got {_shown(parameters)}", where)
    if wrong := _schema_problem(msgspec.json.encode(parameters, order="sorted")):
        raise refuse(
            f"{where}: the parameters of {name!r} are no JSON schema: {wrong}", where, "invalid_function_parameters"
        )
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


@functools.lru_cache(1024)
def _schema_problem(schema: bytes) -> str:
    """Sessions send the same tools with each request."""
    value = msgspec.json.decode(schema)
    if value.get("type", "object") != "object":
        return f"expected an object, got type {value['type']!r}"
    try:
        jsonschema.validators.validator_for(value, jsonschema.Draft202012Validator).check_schema(value)
    except jsonschema.SchemaError as error:
        return str(error.message)[:500]
    except RecursionError:
        return "it is nested too deeply"
    return ""


# -- messages ------------------------------------------------------------------------------------------------


def assistant(text: str, calls: list[dict[str, Any]], reasoning: str = "") -> dict[str, Any]:
    """calls: as `call` makes them."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def call(call_id: Any, name: Any, arguments: Any, where: str) -> dict[str, Any]:
    """arguments: JSON."""
    if not (isinstance(call_id, str) and isinstance(name, str) and name and isinstance(arguments, str)):
        raise refuse(f"{where}: a tool call needs the strings id, name and arguments", where)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def with_names(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of tools know their tool's name, which some templates write.  Refuses an empty conversation."""
    if not messages:
        raise refuse("messages must not be empty: give one at least", "messages", "empty_array")
    names = {}
    for message in messages:
        for made in message.get("tool_calls", ()):
            names[made["id"]] = made["function"]["name"]
        if message["role"] == "tool" and (name := names.get(message["tool_call_id"])):
            message["name"] = name
    return messages


def read_each(items: Iterable[dict[str, Any]], read: Callable[[dict[str, Any], str], Any], name: str) -> list[Any]:
    return [read(item, f"{name}[{number}]") for number, item in enumerate(items)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
