"""The rollout actor: turns admissions into groups of trajectories, and trajectories into rewards.

    python -m actors.rollout RECIPE --run-id R --queue ADDRESS --incarnation N --ready-fd N

    queue ──Admit──▶ open a group ──▶ its episodes are played ──CloseTrajectory──▶ queue
          ──Resume─▶ go on with one from the tokens that the queue holds     │ turns ──▶ engines
                                                                             │ rewards, environments: processes

Tokens, log-probs and versions never pass through here on their way to the learner: they go from the engine to the queue
while the request runs.  What comes back over HTTP is used for the reward and for the count that the stream has to
match.  Nothing here outlives the process: the queue hands everything to the next incarnation.
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

from actors.chat import ChatFormat
from actors.endpoint.options import EndpointOptions
from actors.endpoint.server import Endpoint
from actors.engine_pool import EnginePool
from actors.environments import Environments
from actors.episodes import Branch, Episodes, Player
from actors.heldout import Heldout
from actors.one_turn import OneTurn
from actors.prompts import TrainingPrompts, pack_problem, unpack_problem
from actors.recent import Recent
from actors.rewards import RewardPool
from actors.sampling import Sampling
from actors.segments import Segments
from stream_rl import config, runtime
from stream_rl.errors import ConfigError, WireError
from stream_rl.messages import (
    ActorStats,
    Admit,
    Appended,
    Cancel,
    Drain,
    Engines,
    Evaluated,
    Hello,
    OpenGroup,
    Park,
    Refused,
    Resume,
    Welcome,
)
from stream_rl.metrics import JsonLines
from stream_rl.session import Session
from stream_rl.task import Prompt, load_task, plays
from stream_rl.transport import Dealer
from stream_rl.types import Float32Array, Version

log = logging.getLogger(__name__)
NAME = "actor-0"
STATS_SECONDS = 1.0
"""Also the actor's sign of life."""


class RolloutActor:
    """All of the actor's loops and what they share."""

    def __init__(
        self,
        recipe: config.Recipe,
        run: str,
        incarnation: int,
        session: Session,
        engines: EnginePool,
        player: Player,
        sampling: Sampling,
        episodes: Episodes,
        counts: Counter[str],
    ) -> None:
        self._recipe, self._run, self._incarnation = recipe, run, incarnation
        self._session, self._engines, self._player = session, engines, player
        self._sampling, self._episodes = sampling, episodes
        self._task = load_task(recipe.task.use, recipe.task.options)
        self._plays = plays(self._task)
        self._deadline_s = recipe.agent.deadline_s if self._plays else None
        self._prompts = TrainingPrompts(recipe.task.use, lambda: self._task.prompts("train", recipe.run.seed))
        self._admitted: dict[int, None] = {}
        """Groups to open, in order."""
        self._opened = Recent[int]()
        self._drain: Drain | None = None
        self._told = asyncio.Condition()
        """The two above or the drain have changed."""
        self._counts = counts

    async def run(self) -> None:
        """All of them, until this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            segments = Segments(
                self._run, self._session, self._engines, self._player, self._sampling, self._episodes, self._counts,
                tasks, self._recipe.supervise.retry_s, self._deadline_s,
            )  # fmt: skip
            await self._admit(self._session.welcome)
            tasks.create_task(self._engines.run(), name="engines")
            tasks.create_task(self._listen(segments), name="listen")
            tasks.create_task(self._roll(segments), name="roll")
            tasks.create_task(self._report(segments), name="report")

    async def _listen(self, segments: Segments) -> None:
        """Consumes: the queue's messages.  Waits for: the next.  Produces: groups to open, segments to begin and end,
        the drain.  Unblocked by: the queue."""
        while True:
            match message := await self._session.receive():
                case Admit() | Welcome():
                    await self._admit(message)
                case Engines():
                    await self._engines.update(message)
                case Resume():
                    self._resume(segments, message)
                case Appended():
                    segments.appended(message)
                case Park():
                    segments.park(message.group, message.member, message.segment)
                case Cancel():
                    segments.cancel(message.group, message.member)
                case Drain():
                    async with self._told:
                        self._drain = message
                        self._told.notify_all()
                case Refused():
                    self._counts[f"refused.{message.reason}"] += 1
                    log.warning("the queue refused: %s: %s", message.reason, message.detail)
                case _:
                    log.warning("no use for a %s", type(message).__name__)

    async def _roll(self, segments: Segments) -> None:
        """Consumes: admissions.  Waits for: one, or the drain.  Produces: groups, then the last evaluation.
        Unblocked by: the queue."""
        await self._evaluate("first", Version(0, 0))
        while (group := await self._next_group()) is not None:
            await self._open(segments, group)
        assert self._drain is not None
        segments.close()
        await self._evaluate("last", self._drain.final)

    async def _report(self, segments: Segments) -> None:
        """Consumes: counters.  Waits for: the clock.  Produces: ActorStats."""
        while True:
            await asyncio.sleep(STATS_SECONDS)
            counters = {name: float(count) for name, count in self._counts.items()}
            counters["in_flight"] = float(len(segments))
            counters["thinking"] = float(segments.waiting)
            await self._session.send(ActorStats(counters=counters))

    async def _admit(self, message: Admit | Welcome) -> None:
        """A Welcome replaces all that was said before, but does not know of the groups whose opening is on its way."""
        async with self._told:
            if isinstance(message, Welcome):
                self._admitted.clear()
            groups = message.admitted if isinstance(message, Welcome) else message.groups
            self._admitted |= {group: None for group in sorted(groups) if group not in self._opened}
            self._told.notify_all()

    async def _next_group(self) -> int | None:
        """The next that may be opened; None when the run drains."""
        async with self._told:
            await self._told.wait_for(lambda: self._admitted or self._drain is not None)
            if self._drain is not None:
                return None
            group = next(iter(self._admitted))
            del self._admitted[group]
            self._opened.note(group)
            return group

    async def _open(self, segments: Segments, group: int) -> None:
        # in a thread: after a restart the task runs through all of its former prompts, and signs of life must go on
        prompt = await asyncio.to_thread(self._prompts.get, group)
        # an episode brings what it begins with itself: its first observation may be part of that
        ids = [] if self._plays else self._sampling.encode(prompt.text)
        members = self._recipe.rollout.group_size
        problem = pack_problem(prompt)
        opening = await self._session.post(
            lambda sequence: OpenGroup(
                sequence=sequence,
                group=group,
                task=self._recipe.task.use,
                members=members,
                problem=problem,
                prompt_ids=np.array(ids, np.int32),
            )
        )
        for member in range(members):
            branch = Branch(group, member)
            branch.extend(ids)
            segments.begin(prompt, branch, members, opening)

    def _resume(self, segments: Segments, resume: Resume) -> None:
        try:
            prompt = unpack_problem(resume.problem)
        except WireError as error:
            log.warning("group %d: %s", resume.group, error)
            segments.fail(resume.group, resume.member, resume.segment, error.reason)
            return
        segments.resume(resume, prompt)

    async def _evaluate(self, label: str, version: Version) -> None:
        """Rewards of the held-out prompts, unless the queue has them."""
        if label in self._session.welcome.evaluated:
            return
        count = self._recipe.rollout.heldout_prompts
        prompts = list(itertools.islice(self._task.prompts("heldout", self._recipe.run.seed), count)) if count else []
        heldout = Heldout(
            self._recipe, prompts, self._engines, self._player, self._sampling, self._episodes, self._deadline_s
        )
        rewards = await heldout.evaluate(f"eval-{self._run}-{label}-{self._incarnation}")
        await asyncio.to_thread(self._note_heldout, label, prompts, rewards)
        await self._session.post(
            lambda sequence: Evaluated(sequence=sequence, label=label, version=version, rewards=rewards)
        )

    def _note_heldout(self, label: str, prompts: Sequence[Prompt], rewards: Float32Array) -> None:
        """Which prompt had which reward: the queue counts their mean alone."""
        data = [{k: v for k, v in p.data.items() if isinstance(v, str | int | float)} for p in prompts]
        file = JsonLines(self._recipe.run_directory / "heldout.jsonl")
        file.write({"label": label, "rewards": rewards.tolist(), "data": data})
        file.close()


async def main(options: argparse.Namespace) -> None:
    recipe = config.load(options.recipe)
    rollout = recipe.rollout
    hello = Hello(run=options.run_id, role="actor", name=NAME, incarnation=options.incarnation, pid=os.getpid())
    async with contextlib.AsyncExitStack() as stack:
        engines = await stack.enter_async_context(EnginePool(rollout.request_timeout_s))
        sampling, episodes, counts = Sampling(recipe), Episodes(), Counter[str]()
        player: Player
        if plays(load_task(recipe.task.use, recipe.task.options)):
            player = await _environments(stack, recipe, sampling, engines, episodes, counts)
        else:
            rewards = RewardPool(
                recipe.task.use,
                recipe.task.options,
                processes=rollout.reward_processes,
                timeout_s=rollout.reward_timeout_s,
            )
            player = OneTurn(await stack.enter_async_context(rewards), sampling)
        queue = await stack.enter_async_context(Dealer.connect(options.queue, f"{NAME}@{options.incarnation}"))
        session = Session(queue, hello, recipe.supervise, heartbeat=False)
        await session.start()
        actor = RolloutActor(
            recipe, options.run_id, options.incarnation, session, engines, player, sampling, episodes, counts
        )
        runtime.report_ready(options.ready_fd)
        await runtime.supervise(session=session.run(), actor=actor.run())


async def _environments(
    stack: contextlib.AsyncExitStack,
    recipe: config.Recipe,
    sampling: Sampling,
    engines: EnginePool,
    episodes: Episodes,
    counts: Counter[str],
) -> Environments:
    """With an endpoint, if the model has a chat template; a task that speaks text needs none."""
    chat: ChatFormat | ConfigError
    base_url = ""
    try:
        chat = ChatFormat.load(recipe)
    except ConfigError as error:
        chat = error
    else:
        asked = EndpointOptions.of(recipe, sampling.limits.max_context_tokens)
        base_url = (await stack.enter_async_context(Endpoint(episodes, chat, engines, asked, counts))).address
    return await stack.enter_async_context(Environments(recipe, sampling, engines, chat, base_url))


if __name__ == "__main__":
    runtime.execute("actor", main, runtime.arguments(__doc__, "queue").parse_args())
