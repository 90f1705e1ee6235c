"""What the server needs of an API, and how answers travel."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from actors.endpoint.answer import Answer
from actors.endpoint.asking import ApiError, Ask, Body

Stored = Mapping[str, list[dict[str, Any]]]
"""Conversations that a request may name instead of sending them, by the id of their last answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Api:
    """One way to ask for a turn of the model."""

    path: str
    read: Callable[[Body, Stored], Ask]
    """Raises ApiError."""
    whole: Callable[[Ask, Answer], dict[str, Any]]
    events: Callable[[Ask, Answer], Iterator[bytes]]
    """Server-sent events of a streamed answer."""
    error: Callable[[ApiError], dict[str, Any]]
    error_events: Callable[[ApiError], Iterable[bytes]]
    """Of a stream that had begun with keep-alives."""
    answer_id: Callable[[Answer], str]


def event(data: Any, name: str | None = None) -> bytes:
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def openai_error(error: ApiError) -> dict[str, Any]:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    return {
        "error": {
            "message": error.message,
            "type": kind.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }
