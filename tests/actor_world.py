"""A rollout actor in a world of fakes: its queue, its engines and its rewards are in the test's hands."""

import asyncio
import contextlib
import dataclasses
import pathlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from fake_queue import RETRY, FakeQueue
from tokenizers import Tokenizer

from actors import heldout, segments
from actors.engine_pool import EnginePool
from actors.episodes import Episodes, Player
from actors.one_turn import OneTurn
from actors.prompts import pack_problem
from actors.rewards import RewardFailure, Score
from actors.rollout import RolloutActor
from actors.sampling import Sampling
from scripts import tiny_model
from stream_rl import config
from stream_rl.messages import CloseTrajectory, Engines, Hello, Interrupted, Resume
from stream_rl.session import Session
from stream_rl.task import Prompt
from stream_rl.transport import Dealer

RUN, BUDGET = "r", 10
TASK = """
from stream_rl.task import Prompt

class Count:
    def prompts(self, split, seed):
        n = 0
        while True:
            yield Prompt(text=f"{split} {n}:", data={"n": n})
            n += 1

    def reward(self, prompt, completion):
        return {"reward": float(len(completion)), "n": prompt.data["n"]}
"""


class Rewards:
    """Scores at once: as many points as letters; or keeps the completion until it may."""

    def __init__(self) -> None:
        self.scored: list[tuple[Prompt, str]] = []
        self._asked = asyncio.Condition()
        self.may = asyncio.Event()
        self.may.set()
        self.failure: RewardFailure | None = None

    async def score(self, prompt: Prompt, completion: str) -> Score:
        self.scored.append((prompt, completion))
        async with self._asked:
            self._asked.notify_all()
        await self.may.wait()
        if self.failure:
            raise self.failure
        return Score(float(len(completion)), {"n": prompt.data["n"]})

    async def asked(self, count: int) -> None:
        async with asyncio.timeout(60), self._asked:
            await self._asked.wait_for(lambda: len(self.scored) >= count)


@dataclasses.dataclass
class World:
    recipe: config.Recipe
    queue: FakeQueue
    rewards: Rewards
    tokenizer: Tokenizer
    player: Player | None = None
    """In place of one turn and its reward."""
    episodes: Episodes = dataclasses.field(default_factory=Episodes)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    @contextlib.asynccontextmanager
    async def actor(self, incarnation: int = 1) -> AsyncIterator[None]:
        """One life of an actor; leaving is its kill -9."""
        hello = Hello(run=RUN, role="actor", name="actor-0", incarnation=incarnation, pid=1)
        async with (
            EnginePool(self.recipe.rollout.request_timeout_s) as engines,
            Dealer.connect(self.queue.address, f"actor-0@{incarnation}") as dealer,
        ):
            session = Session(dealer, hello, self.recipe.supervise, heartbeat=False)
            await session.start()
            sampling = Sampling(self.recipe)
            player = self.player or OneTurn(self.rewards, sampling)
            actor = RolloutActor(
                self.recipe, RUN, incarnation, session, engines, player, sampling, self.episodes, self.counts
            )
            async with asyncio.TaskGroup() as loops:
                running = [loops.create_task(session.run()), loops.create_task(actor.run())]
                yield
                for task in running:
                    task.cancel()

    def greet(self, *orders: Any, **welcome: Any) -> None:
        """What the queue says to the actor's next Hello: Welcome with these fields, then the orders."""
        self.queue.welcome = lambda hello: {"evaluated": ["first"]} | welcome
        self.queue.after_welcome = lambda hello, new: list(orders)

    def resume(self, segment: int, text: str = "", group: int = 0, member: int = 0, finish: str = "") -> Resume:
        prompt = Prompt(text=f"train {group}:", data={"n": group})
        return Resume(
            group=group,
            member=member,
            segment=segment,
            members=2,
            problem=pack_problem(prompt),
            finish=finish,
            prompt_ids=np.array(self.ids(prompt.text), np.int32),
            token_ids=(token_ids := np.array(self.ids(text), np.int32)),
            episode=member,
            sampled=np.ones(len(token_ids), np.uint8),
            logprobs=np.full(len(token_ids), -1.0, np.float32),
        )


def make_directory(path: pathlib.Path) -> pathlib.Path:
    """A model and a task."""
    tiny_model.create(path / "model", hidden=8, intermediate=8, layers=1, heads=1, kv_heads=1, head_dim=8)
    (path / "count_task.py").write_text(TASK)
    (path / "runs" / "test").mkdir(parents=True)
    return path


def play(scene: Callable[[World], Awaitable[None]], **rollout: Any) -> None:
    """Run a scene in a world of its own; a hang is a failure."""

    async def bounded(directory: pathlib.Path) -> None:
        async with asyncio.timeout(150), FakeQueue() as queue:
            tokenizer = Tokenizer.from_file(str(directory / "model" / "tokenizer.json"))
            world = World(make_recipe(directory, **rollout), queue, Rewards(), tokenizer)
            world.greet()
            await scene(world)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "UNREACHABLE_BACKOFF_SECONDS", RETRY)
        patch.setattr(heldout, "AGAIN_AFTER_SECONDS", RETRY)
        asyncio.run(bounded(make_directory(pathlib.Path(directory))))


def make_recipe(directory: pathlib.Path, **rollout: Any) -> config.Recipe:
    options = {"group_size": 2, "max_new_tokens": BUDGET, "heldout_prompts": 0} | rollout
    return config.Recipe(
        run=config.Run(name="test", steps=1, directory=str(directory / "runs")),
        model=config.Model(path=str(directory / "model")),
        task=config.TaskChoice(use=f"{directory}/count_task.py:Count"),
        queue=config.Queue(min_tokens=1, max_tokens=100),
        rollout=config.Rollout(**options),
        supervise=config.Supervise(retry_s=RETRY, peer_timeout_s=20.0),
    )


def usable(*engines: FakeEngine, incarnation: int = 1) -> Engines:
    return Engines(
        names=[f"engine-{i}" for i in range(len(engines))],
        addresses=[engine.address for engine in engines],
        incarnations=[incarnation] * len(engines),
    )


def rid(group: int, member: int, segment: int) -> str:
    return f"{RUN}/{group}/{member}/{segment}."


def said(message: CloseTrajectory | Interrupted) -> tuple[str, int, int, int, str, int]:
    kind = message.status if isinstance(message, CloseTrajectory) else "interrupted"
    return kind, message.group, message.member, message.segment, message.reason, message.num_sampled
