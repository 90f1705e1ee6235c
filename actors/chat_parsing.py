"""Tool calls and reasoning in what a model said, found by SGLang's own parsers over an engine's HTTP API."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engines.sglang.client import EngineClient, EngineUnreachable
from stream_rl.episode import ToolCall
from stream_rl.errors import EngineError

PARSE_SECONDS = 300.0
"""Longest that a turn may wait to be parsed: an engine takes milliseconds, but there may be none just now."""
TRIES = 5
"""Engines that are up and fail to parse a turn; SGLang fails so when it does not know a format's name."""


class Engines(Protocol):
    """actors.engine_pool.EnginePool, as far as parsing needs it."""

    async def pick(self) -> EngineClient: ...

    async def doubt(self, client: EngineClient) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A turn of the model, in parts."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: bool = False
    """It looked like a tool call and was none; it is in the text, as the model wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsing:
    """SGLang's names of a model's formats; empty: not parsed."""

    tools: str = ""
    reasoning: str = ""

    async def parse(
        self,
        written: str,
        plain: str,
        tools: Sequence[Mapping[str, Any]],
        engines: Engines,
        make_id: Callable[[int], str],
    ) -> Said:
        """written: the turn with its special tokens; plain: without, and the text if there is nothing to find."""
        async with asyncio.timeout(PARSE_SECONDS):
            for _ in range(TRIES):
                engine = await engines.pick()
                try:
                    return await self._ask(engine, written, plain, tools, make_id)
                except EngineUnreachable as error:
                    said = error
                    await engines.doubt(engine)
        raise EngineError(
            f"{TRIES} engines in a row failed to parse a turn; does SGLang know agent.tool_parser = {self.tools!r} and "
            f"agent.reasoning_parser = {self.reasoning!r}? The last one: {said}"
        )

    async def _ask(
        self,
        engine: EngineClient,
        written: str,
        plain: str,
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[int], str],
    ) -> Said:
        reasoning, rest = "", written
        if self.reasoning:
            parts = await engine.separate_reasoning(written, self.reasoning)
            reasoning, rest = _text(parts, "reasoning_text"), _text(parts, "text")
        if not (self.tools and tools):
            return Said(text=rest if reasoning else plain, reasoning=reasoning)
        parts = await engine.parse_function_call(rest, tools, self.tools)
        text = _text(parts, "normal_text")
        try:
            made = [(call["name"], call["parameters"]) for call in parts["calls"]]
        except (LookupError, TypeError) as error:
            raise EngineError(f"an engine parsed a turn to no list of calls: {parts!r:.200}") from error
        calls = [
            ToolCall(id=make_id(number), name=_utf8(name), arguments=_utf8(arguments))
            for number, (name, arguments) in enumerate(made)
            if isinstance(name, str) and isinstance(arguments, str)
        ]
        readable = all(isinstance(parsed_arguments(call.arguments), dict) for call in calls)
        if calls and len(calls) == len(made) and readable:
            return Said(text=text, reasoning=reasoning, tool_calls=tuple(calls))
        # the parser takes the text of a call that it cannot read away
        malformed = bool(made) or text.strip() != rest.strip()
        return Said(text=rest if reasoning or malformed else plain, reasoning=reasoning, malformed=malformed)


def parsed_arguments(arguments: Any) -> Any:
    """A tool call's arguments as JSON has them, or as they are if they are none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _text(parts: Mapping[str, Any], name: str) -> str:
    text = "" if parts.get(name) is None else parts[name]
    if not isinstance(text, str):
        raise EngineError(f"an engine parsed a turn to no text: {parts!r:.200}")
    return _utf8(text)


def _utf8(text: str) -> str:
    """JSON may hold halves of characters, which no wire of ours carries."""
    return text.encode("utf-8", "replace").decode()
