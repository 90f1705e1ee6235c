"""Held-out evaluation: an episode of each prompt, once, whatever happens to the engines meanwhile."""

import asyncio
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from actors.engine_pool import EnginePool
from actors.episodes import Branch, Episode, Episodes, Player
from actors.rewards import Score
from actors.sampling import Sampling
from engines.sglang.client import EngineClient, EngineUnreachable, Generation
from stream_rl import config
from stream_rl.errors import EngineError
from stream_rl.task import Prompt
from stream_rl.types import Finish, Float32Array

log = logging.getLogger(__name__)
AGAIN_AFTER_SECONDS = 1.0
"""Between asking in vain and asking again."""


class Heldout:
    """The prompts, and who answers and scores them."""

    def __init__(
        self,
        recipe: config.Recipe,
        prompts: Sequence[Prompt],
        engines: EnginePool,
        player: Player,
        sampling: Sampling,
        episodes: Episodes,
        deadline_s: float | None = None,
    ) -> None:
        self._prompts, self._engines, self._player, self._sampling = prompts, engines, player, sampling
        self._episodes, self._deadline_s = episodes, deadline_s
        self._concurrency = recipe.rollout.heldout_concurrency
        self._patience = (
            recipe.supervise.silence_timeout_s + recipe.engine.start_timeout_s + recipe.rollout.request_timeout_s
        )
        """Longest that one turn may take: until its engine is found lost, has been restarted, and has answered."""

    async def evaluate(self, name: str) -> Float32Array:
        """[prompts] rewards; an episode that fails counts as 0.  `name` goes into the request ids: no two evaluations
        of a run may share it.

        Raises EngineError if an engine refuses a prompt, or none answers it.
        """
        places = asyncio.Semaphore(self._concurrency)
        rewards = np.zeros(len(self._prompts), np.float32)

        async def one(i: int, prompt: Prompt, tasks: asyncio.TaskGroup) -> None:
            async with places:
                course = _Course(f"{name}-{i}", self._engines, self._sampling, tasks, self._patience)
                trunk = Branch(i, 0)
                limits = self._sampling.limits
                episode = Episode(prompt, trunk, course, self._player, limits, tasks, self._deadline_s)
                self._episodes.add(episode)
                episode.start()
                try:
                    rewards[i] = await course.reward
                finally:
                    self._episodes.discard(episode)
                    episode.end("drained")

        async with asyncio.TaskGroup() as tasks:
            for i, prompt in enumerate(self._prompts):
                tasks.create_task(one(i, prompt, tasks))
        return rewards


class _Course:
    """Of one episode that nobody trains on: engines, and no queue."""

    def __init__(
        self, name: str, engines: EnginePool, sampling: Sampling, tasks: asyncio.TaskGroup, patience_s: float
    ) -> None:
        self._name, self._engines, self._sampling = name, engines, sampling
        self._tasks: asyncio.TaskGroup = tasks
        self._patience_s = patience_s
        self._requests, self._members = itertools.count(), itertools.count(1)
        self._engine: EngineClient | None = None
        """That has the prefix."""
        self._turns: set[asyncio.Task[None]] = set()
        self.reward: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def branch(self, episode: Episode, token_ids: list[int]) -> Branch:
        branch = Branch(episode.group, next(self._members))
        branch.extend(token_ids)
        episode.branches.append(branch)
        return branch

    def sample(
        self, branch: Branch, token_ids: list[int], end: int, stop: Sequence[str], turn: asyncio.Future[None]
    ) -> None:
        branch.extend(token_ids)
        task = self._tasks.create_task(self._sample(branch, end, stop, turn))
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)

    async def done(self, episode: Episode, score: Score) -> None:
        self._over(score.reward)

    def failed(self, episode: Episode, reason: str) -> None:
        log.warning("held-out prompt %d: %s", episode.group, reason)
        self._over(0.0)
        episode.end(reason)

    def _over(self, reward: float) -> None:
        for task in self._turns:
            task.cancel()
        if not self.reward.done():
            self.reward.set_result(reward)

    async def _sample(self, branch: Branch, end: int, stop: Sequence[str], turn: asyncio.Future[None]) -> None:
        generation = await self._answer(branch.token_ids, end - len(branch.token_ids), stop)
        branch.extend(generation.token_ids, generation.logprobs)
        branch.finish = generation.finish
        if not turn.done():
            turn.set_result(None)

    async def _answer(self, ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Generation:
        """Ask until it is answered.  An engine that dies, hangs or aborts is not the prompt's fault."""
        parameters = self._sampling.parameters(max_new_tokens, stop)
        try:
            async with asyncio.timeout(self._patience_s):
                while True:
                    rid = f"{self._name}-{next(self._requests)}."
                    if (generation := await self._ask(rid, ids, parameters)) is not None:
                        return generation
                    await asyncio.sleep(AGAIN_AFTER_SECONDS)
        except TimeoutError:
            pass
        raise EngineError(
            f"no engine answered held-out prompt {self._name} in {self._patience_s:.0f} s; see the engines' logs"
        )

    async def _ask(self, rid: str, ids: list[int], parameters: dict[str, object]) -> Generation | None:
        engine = self._engine = await self._engines.pick(self._engine)
        try:
            generation = await engine.generate(rid, ids, parameters)
        except EngineUnreachable as error:
            await self._engines.doubt(engine)
            log.warning("%s: %s", rid, error)
            return None
        except TimeoutError:
            await self._engines.abort(engine, rid)
            log.warning("%s: %s did not answer in time", rid, engine.name)
            return None
        return None if generation.finish is Finish.ABORT else generation
