"""The endpoint over real episodes, whose engines and queue are in the test's hands, with the real SDKs in front."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
from anthropic import AsyncAnthropic
from chat_builders import chat
from openai import AsyncOpenAI

from actors.endpoint.options import EndpointOptions
from actors.endpoint.server import Endpoint
from actors.episodes import Branch, Episode, Episodes
from actors.rewards import Score
from actors.sampling import Limits
from stream_rl.task import Prompt
from stream_rl.types import Finish

PATIENCE = 30.0
END_ID = 258  # of chat_builders' tokenizer
LIMITS = Limits(max_new_tokens=1000, max_turn_tokens=500, max_context_tokens=4000, max_turns=40)

Say = Callable[[list[int]], list[int] | None]
"""What the model says behind these tokens; None: the test says it later."""


class FakeCourse:
    """Engines and queue: every turn is written down."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.turns: list[tuple[int, list[int], list[int]]] = []
        """(member, tokens before, sampled) in the order of their ends."""
        self.held: list[tuple[Branch, list[int], int, asyncio.Future[None]]] = []
        self.stops: list[Sequence[str]] = []
        self.members = Counter[int]()
        self.reasons: list[str] = []

    async def branch(self, episode: Episode, token_ids: list[int]) -> Branch:
        self.members[episode.group] += 1
        branch = Branch(episode.group, self.members[episode.group])
        branch.extend(token_ids)
        episode.branches.append(branch)
        return branch

    def sample(
        self, branch: Branch, token_ids: list[int], end: int, stop: Sequence[str], turn: asyncio.Future[None]
    ) -> None:
        self.stops.append(stop)
        said = self.say(branch.token_ids + token_ids)
        if said is None:
            self.held.append((branch, token_ids, end, turn))
        else:
            self.end(branch, token_ids, end, turn, said)

    def end(self, branch: Branch, token_ids: list[int], end: int, turn: asyncio.Future[None], said: list[int]) -> None:
        """The queue says that it holds the new tokens when it likes: here with the end."""
        branch.extend(token_ids)
        fits = said[: end - len(branch.token_ids)]
        self.turns.append((branch.member, list(branch.token_ids), fits))
        branch.extend(fits, [-token / 512 for token in fits])
        branch.finish = Finish.STOP if fits == said else Finish.LENGTH
        if not turn.done():
            turn.set_result(None)

    async def done(self, episode: Episode, score: Score) -> None: ...

    def failed(self, episode: Episode, reason: str) -> None:
        self.reasons.append(reason)


class Engines:
    """One engine, that parses calls as Qwen writes them."""

    async def pick(self) -> Any:
        return self

    async def doubt(self, client: Any) -> None: ...

    async def parse_function_call(self, text: str, tools: Any, parser: str) -> dict[str, Any]:
        assert parser == "qwen25" and tools
        calls = []
        for written in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL):
            try:
                call = json.loads(written)
            except ValueError:
                continue
            calls.append({"name": call["name"], "parameters": json.dumps(call["arguments"]), "tool_index": 0})
        return {"normal_text": text.partition("<tool_call>")[0], "calls": calls}

    async def separate_reasoning(self, text: str, parser: str) -> dict[str, Any]:
        reasoning, _, rest = text.rpartition("</think>")
        return {"reasoning_text": reasoning.removeprefix("<think>"), "text": rest}


class World:
    """What a test's scene has at hand."""

    def __init__(self, format: dict[str, Any], options: dict[str, Any], limits: Limits) -> None:
        self.chat = chat(**format)
        self.engines, self.episodes, self.counts = Engines(), Episodes(), Counter[str]()
        self.options, self.limits = EndpointOptions(**options), limits
        self.course = FakeCourse(lambda before: self.ids("ok"))
        self.stack: AsyncExitStack
        self.tasks: asyncio.TaskGroup

    def ids(self, text: str, *, ended: bool = True) -> list[int]:
        """Of a turn."""
        return self.chat._encode(text) + [END_ID] * ended

    def text(self, ids: list[int]) -> str:
        text: str = self.chat._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def says(self, *texts: str) -> None:
        """These turns, in order."""
        rest = iter(texts)
        self.course.say = lambda before: self.ids(next(rest))

    def holds(self) -> None:
        self.course.say = lambda before: None

    async def held(self, count: int = 1) -> None:
        """Until so many turns wait for what the model says."""
        async with asyncio.timeout(PATIENCE):
            while len(self.course.held) < count:  # noqa: ASYNC110  tests may poll
                await asyncio.sleep(0.005)

    async def until(self, reached: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached():  # noqa: ASYNC110  tests may poll
                await asyncio.sleep(0.005)

    def release(self, text: str = "late", number: int = 0) -> None:
        self.course.end(*self.course.held.pop(number), self.ids(text))

    def episode(self, group: int = 0) -> Episode:
        made = Episode(Prompt(text=""), Branch(group, 0), self.course, _Nobody(), self.limits, self.tasks)
        self.episodes.add(made)
        return made

    def end(self, episode: Episode, reason: str = "done") -> None:
        self.episodes.discard(episode)
        episode.end(reason)

    async def openai(self, key: str, **options: Any) -> AsyncOpenAI:
        client = AsyncOpenAI(base_url=self.endpoint.address + "/v1", api_key=key, **{"max_retries": 0, **options})
        return await self.stack.enter_async_context(client)

    async def anthropic(self, key: str, **options: Any) -> AsyncAnthropic:
        client = AsyncAnthropic(base_url=self.endpoint.address, api_key=key, **{"max_retries": 0, **options})
        return await self.stack.enter_async_context(client)

    async def http(self, key: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(base_url=self.endpoint.address, headers=headers, timeout=PATIENCE)
        return await self.stack.enter_async_context(client)


class _Nobody:
    async def play(self, episode: Episode) -> Score:
        raise AssertionError("the test plays")


Scene = Callable[[World], Awaitable[None]]


def play(
    scene: Scene,
    *,
    format: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    limits: Limits = LIMITS,
) -> World:
    """Run a scene that must end; a hang is a failure."""
    world = World(format or {}, options or {}, limits)

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
            world.tasks = await stack.enter_async_context(asyncio.TaskGroup())
            endpoint = Endpoint(world.episodes, world.chat, world.engines, world.options, world.counts)
            world.endpoint = await stack.enter_async_context(endpoint)
            world.stack = stack
            await scene(world)

    asyncio.run(bounded())
    return world
