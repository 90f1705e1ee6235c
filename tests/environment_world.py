"""Environment processes under real episodes, whose engines and queue are in the test's hands."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from actor_world import make_directory, make_recipe
from endpoint_world import FakeCourse

from actors.chat import ChatFormat
from actors.engine_pool import EnginePool
from actors.environments import Environments
from actors.episodes import Branch, Episode
from actors.rewards import Score
from actors.sampling import Sampling
from stream_rl import config
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt

PATIENCE = 10.0
DIE = "die"
"""What ends a process, if the model says it first."""
TASK = """
import asyncio, os, pathlib

HERE = pathlib.Path(__file__).parent

def log(*words):
    with (HERE / "log").open("a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

log("loads", os.getpid())
if (HERE / "gate").exists() and (HERE / "gate").read_text() == "die":
    os._exit(3)

class Game:
    def prompts(self, split, seed):
        yield from ()

    async def play(self, prompt, model):
        number, mark = prompt.data["number"], HERE / f"died-{prompt.data['number']}"
        log("plays", number)
        try:
            if prompt.data["sleeps"]:
                await asyncio.sleep(1000)
            first = await model.turn("a:")
            if first.text == "die" and not mark.exists():
                mark.touch()
                os._exit(3)
            second = await model.turn("b:")
        except asyncio.CancelledError:
            log("cancelled", number)
            raise
        return {"reward": len(first.text + second.text), "process": os.getpid()}
"""


class Course(FakeCourse):
    """Writes the ends down, too: (reward, parts) or the reason of a failure."""

    def __init__(self) -> None:
        super().__init__(lambda before: None)
        self.ends: dict[int, Any] = {}

    async def done(self, episode: Episode, score: Score) -> None:
        self.ends[episode.group] = score.reward, dict(score.parts)

    def failed(self, episode: Episode, reason: str) -> None:
        self.ends[episode.group] = reason
        episode.end(reason)


class World:
    def __init__(
        self, directory: pathlib.Path, environments: Environments, sampling: Sampling, tasks: asyncio.TaskGroup
    ) -> None:
        self.directory, self.environments, self._sampling = directory, environments, sampling
        self._tasks: asyncio.TaskGroup = tasks
        self.course = Course()
        self.episodes: list[Episode] = []

    def begin(self, *, sleeps: bool = False, deadline_s: float | None = None) -> Episode:
        """The next group's episode, in the process that has the fewest."""
        number = len(self.episodes)
        prompt = Prompt(text="", data={"number": number, "sleeps": sleeps})
        trunk, limits = Branch(number, 0), self._sampling.limits
        made = Episode(prompt, trunk, self.course, self.environments, limits, self._tasks, deadline_s)
        self.episodes.append(made)
        made.start()
        return made

    async def until(self, reached: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached():  # noqa: ASYNC110  tests may poll
                await asyncio.sleep(0.005)

    async def asked(self, *groups: int) -> None:
        """Until each of these waits for what the model says, and nobody else."""
        await self.until(lambda: self.asking == sorted(groups))

    @property
    def asking(self) -> list[int]:
        """Groups that wait for what the model says."""
        return sorted(branch.group for branch, _, _, turn in self.course.held if not turn.done())

    def say(self, group: int, text: str) -> None:
        """The turn that this group waits for."""
        [held] = [held for held in self.course.held if held[0].group == group]
        self.course.held.remove(held)
        self.course.end(*held, self._sampling.encode(text))

    async def ended(self, *groups: int) -> None:
        """Until these have, and nobody else."""
        await self.until(lambda: len(self.course.ends) >= len(groups))
        assert sorted(self.course.ends) == sorted(groups), self.course.ends

    async def waiting(self, *groups: int) -> None:
        """Until these have no process, and nobody else is played in the first place."""
        [host, *_] = self.environments._hosts
        episodes = [self.episodes[group] for group in groups]
        await self.until(lambda: len(host.frames) == len(groups) and not any(episode.branches for episode in episodes))

    def log(self, what: str) -> list[int]:
        """Processes that loaded the task (loads), groups that were begun (plays) or cancelled there, in order."""
        lines = [line.split() for line in (self.directory / "log").read_text().splitlines()]
        return [int(number) for word, number in lines if word == what]

    def close_gate(self) -> None:
        """From now on a process that loads the task stands still there until the test has opened the gate for it."""
        os.mkfifo(self.directory / "gate")

    async def loading(self) -> int:
        """The gate, when the first place's process stands before it."""
        [host, *_] = self.environments._hosts
        await self.until(lambda: host._process is not None and host._process.pid in self.log("loads"))
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(OSError):  # nobody reads
                    return os.open(self.directory / "gate", os.O_WRONLY | os.O_NONBLOCK)
                await asyncio.sleep(0.005)

    def open_gate(self, gate: int, said: str = "") -> None:
        os.write(gate, said.encode())
        os.close(gate)


def play(
    scene: Callable[[World], Awaitable[None]],
    *,
    task: str = TASK,
    processes: int = 1,
    chat: ChatFormat | None = None,
    engines: Callable[[], contextlib.AbstractAsyncContextManager[EnginePool]] = lambda: EnginePool(5.0),
) -> None:
    """Run a scene that must end; a hang is a failure.  Silence of an environment ends nothing in time."""

    async def bounded(directory: pathlib.Path) -> None:
        recipe = make_recipe(make_directory(directory), max_new_tokens=100)
        (directory / "game.py").write_text(task)
        choice = config.TaskChoice(use=f"{directory}/game.py:Game")
        agent = config.Agent(processes=processes, turn_gap_s=10 * PATIENCE)
        recipe, sampling = dataclasses.replace(recipe, task=choice, agent=agent), Sampling(recipe)
        async with (
            asyncio.timeout(PATIENCE),
            engines() as pool,
            Environments(recipe, sampling, pool, chat or ConfigError("no chat template")) as environments,
            asyncio.TaskGroup() as tasks,
        ):
            world = World(directory, environments, sampling, tasks)
            try:
                await scene(world)
            finally:
                for episode in world.episodes:
                    episode.end("drained")

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(bounded(pathlib.Path(directory)))
