"""Held-out evaluation: each prompt sampled once, whatever happens to the engines meanwhile."""

import asyncio
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from actors.engine_pool import EnginePool
from actors.rewards import RewardFailure, RewardPool
from actors.sampling import Sampling
from engines.sglang.client import EngineUnreachable, Generation
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
        rewards: RewardPool,
        sampling: Sampling,
    ) -> None:
        self._prompts, self._engines, self._rewards, self._sampling = prompts, engines, rewards, sampling
        self._concurrency = recipe.rollout.heldout_concurrency
        self._patience = (
            recipe.supervise.silence_timeout_s + recipe.engine.start_timeout_s + recipe.rollout.request_timeout_s
        )
        """Longest that one prompt may take: until its engine is found lost, has been restarted, and has answered."""

    async def evaluate(self, name: str) -> Float32Array:
        """[prompts] rewards; a reward that fails counts as 0.  `name` goes into the request ids: no two evaluations of
        a run may share it.

        Raises EngineError if an engine refuses a prompt, or none answers it.
        """
        places = asyncio.Semaphore(self._concurrency)
        rewards = np.zeros(len(self._prompts), np.float32)

        async def one(i: int, prompt: Prompt) -> None:
            async with places:
                generation = await self._answer(f"{name}-{i}", self._sampling.encode(prompt.text))
                try:
                    score = await self._rewards.score(prompt, self._sampling.decode(generation.token_ids))
                    rewards[i] = score.reward
                except RewardFailure as failure:
                    log.warning("held-out prompt %d: %s", i, failure)

        async with asyncio.TaskGroup() as group:
            for i, prompt in enumerate(self._prompts):
                group.create_task(one(i, prompt))
        return rewards

    async def _answer(self, name: str, ids: list[int]) -> Generation:
        """Ask until it is answered.  An engine that dies, hangs or aborts is not the prompt's fault."""
        try:
            async with asyncio.timeout(self._patience):
                for attempt in itertools.count():
                    if (generation := await self._ask(f"{name}-{attempt}.", ids)) is not None:
                        return generation
                    await asyncio.sleep(AGAIN_AFTER_SECONDS)
        except TimeoutError:
            pass
        raise EngineError(f"no engine answered held-out prompt {name} in {self._patience:.0f} s; see the engines' logs")

    async def _ask(self, rid: str, ids: list[int]) -> Generation | None:
        engine = await self._engines.pick()
        try:
            generation = await engine.generate(rid, ids, self._sampling.parameters(self._sampling.max_new_tokens))
        except EngineUnreachable as error:
            await self._engines.doubt(engine)
            log.warning("%s: %s", rid, error)
            return None
        except TimeoutError:
            await self._engines.abort(engine, rid)
            log.warning("%s: %s did not answer in time", rid, engine.name)
            return None
        return None if generation.finish is Finish.ABORT else generation
