"""The rollout actor: turns admissions into groups of trajectories, and trajectories into rewards.

    python -m actors.rollout RECIPE --run-id R --queue ADDRESS --engine engine-0=http://... --ready-fd N

    queue ──Admit──▶ open a group ──▶ its members ask engines ──▶ reward processes ──CloseTrajectory──▶ queue

Tokens, log-probs and versions never pass through here: they go from the engine to the queue while the request runs.
What comes back over HTTP is used for the reward and for the count that the stream has to match.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from actors.rewards import RewardFailure, RewardPool
from engines.megatron.model_shape import read_model_shape
from engines.sglang.client import EngineClient
from stream_rl import config, runtime
from stream_rl.errors import EngineError, StreamRLError, TaskError
from stream_rl.messages import (
    ActorStats,
    Admit,
    Cancel,
    CloseTrajectory,
    Done,
    Drain,
    Evaluated,
    Hello,
    OpenGroup,
    Refused,
    Welcome,
)
from stream_rl.task import Prompt, load_task
from stream_rl.transport import Dealer
from stream_rl.types import Finish, Status, Version, make_rid

log = logging.getLogger(__name__)
NAME = "actor-0"
STATS_SECONDS = 1.0
UNREACHABLE_BACKOFF_SECONDS = 1.0
"""A member whose engine cannot be reached is given up after this pause, so that a dead engine makes no hot loop."""


class RolloutActor:
    """All of the actor's loops and what they share."""

    def __init__(
        self,
        recipe: config.Recipe,
        run: str,
        queue: Dealer,
        engines: Sequence[EngineClient],
        rewards: RewardPool,
    ) -> None:
        self._recipe, self._run, self._queue = recipe, run, queue
        self._engines, self._rewards = engines, rewards
        self._tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
        self._task = load_task(recipe.task.use, recipe.task.options)
        self._prompts = self._task.prompts("train", recipe.run.seed)
        self._sampling = {
            "temperature": recipe.rollout.temperature,
            "max_new_tokens": recipe.rollout.max_new_tokens,
            "stop_token_ids": list(read_model_shape(recipe.model.path).eos_token_ids),
            **recipe.rollout.sampling,
        }
        self._credits = 0
        self._credits_changed = asyncio.Condition()
        self._drain: Drain | None = None
        self._requests: dict[tuple[int, int], tuple[EngineClient, str]] = {}
        """Requests at engines, by (group, member)."""
        self._cancelled: set[tuple[int, int]] = set()
        self._counts: Counter[str] = Counter()

    async def listen(self) -> None:
        """Consumes: the queue's messages.  Waits for: the next.  Produces: credits, cancellations, the drain.
        Unblocked by: the queue."""
        while True:
            match message := await self._queue.receive():
                case Admit():
                    async with self._credits_changed:
                        self._credits += message.groups
                        self._credits_changed.notify_all()
                case Cancel():
                    await self._cancel(message.group, message.member)
                case Drain():
                    async with self._credits_changed:
                        self._drain = message
                        self._credits_changed.notify_all()
                case Refused():
                    self._counts[f"refused.{message.reason}"] += 1
                    log.warning("the queue refused: %s: %s", message.reason, message.detail)
                    if message.reason in ("other_run", "fenced"):
                        raise StreamRLError(f"the queue refused this actor: {message.detail}")
                case Welcome() | Done():
                    pass
                case _:
                    log.warning("no use for a %s", type(message).__name__)

    async def roll(self) -> None:
        """Consumes: credits.  Waits for: a credit or the drain.  Produces: groups, then the last evaluation.
        Unblocked by: the queue's admission."""
        await self._evaluate("first", Version(0, 0))
        async with asyncio.TaskGroup() as members:
            for group in itertools.count():
                async with self._credits_changed:
                    await self._credits_changed.wait_for(lambda: self._credits > 0 or self._drain is not None)
                    if self._drain is not None:
                        break
                    self._credits -= 1
                await self._open(group, members)
            for key in list(self._requests):
                await self._cancel(*key)
        assert self._drain is not None
        await self._evaluate("last", self._drain.final)

    async def report(self) -> None:
        """Consumes: counters.  Waits for: the clock.  Produces: ActorStats."""
        while True:
            await asyncio.sleep(STATS_SECONDS)
            counters = {name: float(count) for name, count in self._counts.items()}
            counters["in_flight"] = float(len(self._requests))
            await self._queue.send(ActorStats(counters=counters))

    async def _open(self, group: int, members: asyncio.TaskGroup) -> None:
        prompt = self._next_prompt()
        ids = np.array(self._tokenizer.encode(prompt.text).ids, np.int32)
        size = self._recipe.rollout.group_size
        await self._queue.send(OpenGroup(group=group, task=self._recipe.task.use, members=size, prompt_ids=ids))
        for member in range(size):
            members.create_task(self._member(group, member, prompt, ids.tolist()), name=f"{group}/{member}")

    def _next_prompt(self) -> Prompt:
        """Raises TaskError when the user's task ends or raises: no single trajectory can pay for that."""
        try:
            return next(self._prompts)
        except StopIteration:
            raise TaskError(f"{self._recipe.task.use}: prompts('train') ended; it must be endless") from None
        except Exception as error:
            raise TaskError(
                f"{self._recipe.task.use}: prompts('train') raised {type(error).__name__}: {error}"
            ) from error

    async def _member(self, group: int, member: int, prompt: Prompt, prompt_ids: list[int]) -> None:
        """One trajectory, from its request to its close.  Whatever goes wrong costs this trajectory, by name."""
        key, rid = (group, member), make_rid(self._run, group, member, 0)
        engine = min(self._engines, key=lambda candidate: candidate.in_flight)
        self._requests[key] = (engine, rid)
        try:
            generation = await engine.generate(rid, prompt_ids, self._sampling)
        except TimeoutError:
            await self._close_failed(key, "request_timeout")
            with contextlib.suppress(EngineError):
                await engine.abort(rid)
            return
        except EngineError as error:
            log.warning("%s: %s", rid, error)
            await asyncio.sleep(UNREACHABLE_BACKOFF_SECONDS)
            await self._close_failed(key, "engine_error")
            return
        finally:
            del self._requests[key]
            cancelled = key in self._cancelled
            self._cancelled.discard(key)
        self._counts["generated_tokens"] += len(generation.token_ids)
        if cancelled:
            return
        if generation.finish is Finish.ABORT:
            await self._close_failed(key, "interrupted")
            return
        try:
            score = await self._rewards.score(prompt, self._text(generation.token_ids))
        except RewardFailure as failure:
            log.warning("%s: %s", rid, failure)
            await self._close_failed(key, failure.reason)
            return
        await self._queue.send(
            CloseTrajectory(
                group=group,
                member=member,
                status=Status.DONE,
                reward=score.reward,
                reward_parts=score.parts,
                num_sampled=len(generation.token_ids),
            )
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    async def _close_failed(self, key: tuple[int, int], reason: str) -> None:
        self._counts[f"failed.{reason}"] += 1
        await self._queue.send(CloseTrajectory(group=key[0], member=key[1], status=Status.FAILED, reason=reason))

    async def _cancel(self, group: int, member: int) -> None:
        """The queue has already counted it: only the engine still has to hear."""
        if (group, member) not in self._requests:
            return
        engine, rid = self._requests[group, member]
        self._cancelled.add((group, member))
        with contextlib.suppress(EngineError):
            await engine.abort(rid)

    async def _evaluate(self, label: str, version: Version) -> None:
        """Mean reward of held-out prompts, one sample each; a reward that fails counts as 0."""
        rollout = self._recipe.rollout
        if rollout.heldout_prompts == 0:
            await self._queue.send(Evaluated(label=label, version=version, rewards=np.zeros(0, np.float32)))
            return
        prompts = list(itertools.islice(self._task.prompts("heldout", self._recipe.run.seed), rollout.heldout_prompts))
        places = asyncio.Semaphore(rollout.heldout_concurrency)
        rewards = np.zeros(len(prompts), np.float32)

        async def one(i: int, prompt: Prompt) -> None:
            async with places:
                engine = self._engines[i % len(self._engines)]
                ids = self._tokenizer.encode(prompt.text).ids
                try:
                    generation = await engine.generate(f"eval-{self._run}-{label}-{i}.", ids, self._sampling)
                except TimeoutError:
                    raise EngineError(f"{engine.name} did not answer held-out prompt {i} in time") from None
                if generation.finish is Finish.ABORT:
                    raise EngineError(f"{engine.name} aborted held-out prompt {i}")
                try:
                    rewards[i] = (await self._rewards.score(prompt, self._text(generation.token_ids))).reward
                except RewardFailure as failure:
                    log.warning("held-out prompt %d: %s", i, failure)

        async with asyncio.TaskGroup() as group:
            for i, prompt in enumerate(prompts):
                group.create_task(one(i, prompt))
        await self._queue.send(Evaluated(label=label, version=version, rewards=rewards))


async def main(options: argparse.Namespace) -> None:
    recipe = config.load(options.recipe)
    rollout = recipe.rollout
    async with contextlib.AsyncExitStack() as stack:
        rewards = await stack.enter_async_context(
            RewardPool(
                recipe.task.use,
                recipe.task.options,
                processes=rollout.reward_processes,
                timeout_s=rollout.reward_timeout_s,
            )
        )
        engines = [
            await stack.enter_async_context(EngineClient(name, address, rollout.request_timeout_s))
            for name, _, address in (text.partition("=") for text in options.engine)
        ]
        queue = await stack.enter_async_context(Dealer.connect(options.queue, f"{NAME}@{options.incarnation}"))
        await queue.send(
            Hello(run=options.run_id, role="actor", name=NAME, incarnation=options.incarnation, pid=os.getpid())
        )
        actor = RolloutActor(recipe, options.run_id, queue, engines, rewards)
        runtime.report_ready(options.ready_fd)
        await runtime.supervise(listen=actor.listen(), roll=actor.roll(), report=actor.report())


if __name__ == "__main__":
    parser = runtime.arguments(__doc__, "queue")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=ADDRESS")
    runtime.execute("actor", main, parser.parse_args())
