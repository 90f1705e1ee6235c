"""A world whose actor plays episodes of many turns: their player is in the test's hands, too."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from actor_world import World, play
from fake_engine import FakeEngine

from actors.episodes import Episode
from actors.rewards import Score
from stream_rl import config
from stream_rl.messages import (
    Appended,
    AppendTokens,
    Resume,
)

Script = Callable[[World, Episode], Awaitable[float]]
Scene = Callable[[World, FakeEngine], Awaitable[None]]


class Scripted:
    """A player in the test's hands."""

    def __init__(self, world: World, script: Script) -> None:
        self._world, self._script = world, script
        self.played: list[Episode] = []

    async def play(self, episode: Episode) -> Score:
        self.played.append(episode)
        return Score(await self._script(self._world, episode), {})


def scene_of(
    script: Script,
    scene: Scene,
    answers: list[str] | None = None,
    *,
    appended: bool = True,
    agent: dict[str, Any] | None = None,
    **rollout: Any,
) -> None:
    """answers: what the engine says in turn, and stops; without, or behind them, the test says it."""

    async def scripted(world: World) -> None:
        world.recipe = dataclasses.replace(world.recipe, agent=config.Agent(**(agent or {})))
        world.player = Scripted(world, script)
        if appended:
            answer_appends(world)
        said = iter(answers or [])
        answer = lambda body: (world.ids(text), "stop") if (text := next(said, None)) is not None else None  # noqa: E731
        async with FakeEngine(answer) as engine:
            await scene(world, engine)

    play(scripted, **{"group_size": 1, "max_new_tokens": 40} | rollout)


def answer_appends(world: World) -> None:
    """The queue holds everything at once."""

    class Journal(list[Any]):
        def append(self, message: Any) -> None:
            super().append(message)
            if isinstance(message, AppendTokens):
                told = Appended(group=message.group, member=message.member, segment=message.segment + 1)
                telling.append(asyncio.ensure_future(world.queue.say(told)))

    telling: list[asyncio.Future[None]] = []
    world.queue.taken = Journal(world.queue.taken)


def resume(world: World, segment: int, texts: list[str], finish: str = "", **fields: Any) -> Resume:
    """texts: appended and sampled ones in turn; the first is the prompt."""
    order = world.resume(segment, finish=finish, **{k: v for k, v in fields.items() if k in ("group", "member")})
    prompt, *rest = [world.ids(text) for text in texts] or [[]]
    flags = [flag for i, ids in enumerate(rest) for flag in [(i + 1) % 2] * len(ids)]
    ids = np.array([token for ids in rest for token in ids], np.int32)
    return dataclasses.replace(
        order,
        prompt_ids=np.array(prompt, np.int32),
        token_ids=ids,
        sampled=np.array(flags, np.uint8),
        logprobs=np.where(flags, -ids / 8, 0).astype(np.float32),
        **{k: v for k, v in fields.items() if k in ("episode", "forked")},
    )


async def three_turns(world: World, episode: Episode) -> float:
    """Says one:, two:, three:; the reward is the number of letters."""
    branch, letters = None, 0
    for text in ("one:", "two:", "three:"):
        branch, sampled = await episode.turn(branch, world.ids(text))
        assert sampled.logprobs == [-token / 8 for token in sampled.token_ids]
        letters += len(sampled.token_ids)
    return float(letters)


def player(world: World) -> Scripted:
    assert isinstance(world.player, Scripted)
    return world.player
