"""Agents on the real SDKs, the endpoint, the actor, the queue and its journal, one real engine and one publisher; the
test plays the learner."""

import asyncio
import pathlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import talking_model
from engine_harness import RUN, EngineHarness

from actors import rollout
from actors.chat import ChatFormat
from actors.endpoint.options import EndpointOptions
from actors.endpoint.server import Endpoint
from actors.engine_pool import EnginePool
from actors.episodes import Branch, Episode, Episodes
from actors.rewards import Score
from actors.sampling import Sampling
from queues.core import QueueCore
from queues.journal import Journal, recover_core
from queues.process import QueueProcess
from queues.store import Settings
from stream_rl import config
from stream_rl.messages import Applied, Chunks, Hello, Lease, LeaseRequest, Refused
from stream_rl.session import Session
from stream_rl.task import Prompt
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

Play = Callable[[Episode, str], Awaitable[float]]
"""(episode, the endpoint's address) -> reward"""


class Agents:
    """Prompts for them; what they do is the test's player's."""

    def prompts(self, split: str, seed: int) -> Any:
        while True:
            yield Prompt(text="")

    async def play(self, prompt: Prompt, model: Any) -> float:
        raise AssertionError("the test plays")


@dataclass
class Trajectory:
    """As the learner gets it."""

    episode: int
    reward: float
    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    versions: list[Version]


@dataclass
class Player:
    play_: Play
    address: str = ""
    branches: dict[tuple[int, int], Branch] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    async def play(self, episode: Episode) -> Score:
        try:
            return Score(await self.play_(episode, self.address), {})
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            self.branches |= {(branch.group, branch.member): branch for branch in episode.branches}


class EndpointHarness(EngineHarness):
    """EngineHarness with the real queue in this process, which is listened to."""

    def __init__(
        self, directory: pathlib.Path, *, sessions: int, min_tokens: int = 1, stay: float = 0.3, **sglang: Any
    ) -> None:
        model = talking_model.write(directory / "model", stay)
        super().__init__(directory, model, **sglang)
        self.stay, self.incarnation = stay, 1
        self.recipe = config.Recipe(
            run=self.recipe.run,
            model=self.recipe.model,
            task=config.TaskChoice(use="endpoint_engine:Agents"),
            queue=config.Queue(
                min_tokens=min_tokens, max_tokens=1_000_000, first_groups=sessions, over_provision=1.0,
                in_flight="fixed", max_token_age=-1, fsync=False,
            ),
            rollout=config.Rollout(
                group_size=1, max_new_tokens=2000, temperature=1.0, heldout_prompts=0, request_timeout_s=120.0
            ),
            weights=self.recipe.weights,
            engine=config.Engine(chunk_tokens=5, chunk_seconds=0.05, resend_seconds=0.5),
            agent=config.Agent(tool_parser="qwen25", max_turn_tokens=1000),
            supervise=config.Supervise(retry_s=0.5, silence_timeout_s=300.0),
            sglang=self.recipe.sglang,
        )  # fmt: skip
        self.recipe.run_directory.mkdir(parents=True)
        self.leased: dict[tuple[int, int], Trajectory] = {}
        self.counts: Counter[str] = Counter()
        self.step = 0

    # -- the queue ---------------------------------------------------------------------------------------------

    async def _open_queue(self) -> str:
        self._router = Router.bind("tcp://127.0.0.1:0")
        listen = self._router.receive_raw

        async def heard() -> Any:
            came = await listen()
            if isinstance(came[1], Chunks):
                self._take(came[1])
            return came

        self._router.receive_raw = heard  # type: ignore[method-assign]
        return self._router.address

    def _take(self, chunks: Chunks) -> None:
        """Only what is new: the stream repeats what was not acknowledged in time."""
        offset = 0
        for i, rid in enumerate(chunks.rids):
            stream, count, start = self.streams[rid], int(chunks.counts[i]), int(chunks.starts[i])
            new = slice(offset + len(stream.token_ids) - start, offset + count)
            versions = [
                Version(history, step)
                for _, history, step, n in chunks.spans[chunks.spans[:, 0] == i].tolist()
                for _ in range(n)
            ]
            stream.versions += versions[len(stream.token_ids) - start :]
            stream.token_ids += chunks.token_ids[new].tolist()
            stream.logprobs += chunks.logprobs[new].tolist()
            stream.finish = chunks.finishes[i] or stream.finish
            offset += count

    async def _serve_queue(self) -> None:
        settings = Settings.of(self.recipe, RUN)
        with Journal.open(self.directory / "journal.db", RUN, {}, fsync=False, keep=False) as journal:
            self.core: QueueCore = recover_core(journal, settings)
            process = QueueProcess(self.core, self._router, journal, self.recipe.queue)
            async with asyncio.TaskGroup() as tasks:
                for loop in (process.serve(), process.commit(), process.tick()):
                    tasks.create_task(loop)

    # -- the actor ---------------------------------------------------------------------------------------------

    def play(self, play: Play, until: Callable[[Player], Awaitable[None]], timeout: float = 800) -> Player:
        """Play episodes until the test has what it wanted."""
        return self.call(self._play(Player(play), until), timeout)

    async def _play(self, player: Player, until: Callable[[Player], Awaitable[None]]) -> Player:
        recipe, address = self.recipe, self._router.address
        async with AsyncExitStack() as stack:
            engines = await stack.enter_async_context(EnginePool(recipe.rollout.request_timeout_s))
            sampling, episodes = Sampling(recipe), Episodes()
            self.chat = ChatFormat.load(recipe)
            options = EndpointOptions.of(recipe, sampling.limits.max_context_tokens)
            endpoint = Endpoint(episodes, self.chat, engines, options, self.counts)
            player.address = (await stack.enter_async_context(endpoint)).address
            self.learner_of_queue = await stack.enter_async_context(Dealer.connect(address, "learner-0"))
            await self.learner_of_queue.send(Hello(run=RUN, role="learner", name="learner-0", incarnation=1, pid=1))
            dealer = await stack.enter_async_context(Dealer.connect(address, "actor-0@1"))
            hello = Hello(run=RUN, role="actor", name="actor-0", incarnation=1, pid=1)
            session = Session(dealer, hello, recipe.supervise, heartbeat=False)
            await session.start()
            actor = rollout.RolloutActor(recipe, RUN, 1, session, engines, player, sampling, episodes, self.counts)
            async with asyncio.TaskGroup() as loops:
                running = [loops.create_task(session.run()), loops.create_task(actor.run())]
                await until(player)
                for task in running:
                    task.cancel()
        return player

    # -- the learner -------------------------------------------------------------------------------------------

    async def take_step(self) -> None:
        """Lease what is ready, apply, publish the next version: the queue takes no token of a version before that."""
        now, then = Version(0, self.step), Version(0, self.step + 1)
        await self.learner_of_queue.send(LeaseRequest(step=now))
        while not isinstance(lease := await self.learner_of_queue.receive(300), Lease):
            assert not isinstance(lease, Refused), lease
        self._note(lease)
        new = talking_model.weights(then.step, self.stay)
        await self.learner_of_queue.send(Applied(step=now, outcome="trained", metrics={}))
        await asyncio.to_thread(self._publish_from_thread, then, new)
        self.step += 1

    def _publish_from_thread(self, version: Version, tensors: Any) -> None:
        self.publish(version, tensors.items())

    def _note(self, lease: Lease) -> None:
        ends = np.cumsum(lease.lengths)
        for i, (group, member) in enumerate(zip(lease.groups.tolist(), lease.members.tolist(), strict=True)):
            at = slice(int(ends[i] - lease.lengths[i]), int(ends[i]))
            assert (group, member) not in self.leased, "trained twice"
            self.leased[group, member] = Trajectory(
                int(lease.episodes[i]),
                float(lease.rewards[i]),
                lease.token_ids[at].tolist(),
                [bool(flag) for flag in lease.sampled[at]],
                lease.logprobs[at].tolist(),
                [Version(*pair) for pair in zip(lease.histories[at].tolist(), lease.steps[at].tolist(), strict=True)],
            )

    def restart_engine(self) -> None:
        """Another incarnation, after the first was killed; from a test's thread."""
        self.incarnation += 1
        address, recipe = self._router.address, str(self.directory / "recipe.toml")
        engine = self._spawn(
            "engine", "engines.sglang.server", recipe, "--name", "engine-0", "--queue", address,
            "--publisher", self.publisher_address, "--incarnation", str(self.incarnation),
        )  # fmt: skip
        self.http = engine["address"]
