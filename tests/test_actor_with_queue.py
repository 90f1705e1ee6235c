"""The real actor with the queue's real state machine, while engines abort, vanish with what they had answered, and the
actor is killed: whatever reaches the learner is a whole episode, as its environment knew it."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from actor_world import RUN, World, play
from aiohttp import web
from fake_engine import FakeEngine
from queue_builders import Row, make_chunks, make_core

from actors import rollout
from actors.episodes import Branch, Episode
from actors.rewards import Score
from queues.core import JOURNAL, REPLY
from stream_rl import messages as m
from stream_rl.transport import Router
from stream_rl.types import Version

EOS_LIKE = 9
MOST = 30


def spoken(sampled: list[int], turn: int) -> list[int]:
    """What the environment says behind these tokens."""
    return [100 + sum(sampled) % 50, 100 + turn, *range(100, 100 + len(sampled) % 3)]


def turns_of(group: int) -> int:
    return 1 + group % 4


class Environment:
    """Deterministic: its observations and its reward are functions of what was sampled."""

    async def play(self, episode: Episode) -> Score:
        branch: Branch | None = None
        everything: list[int] = []
        observation = spoken([], episode.group)
        for turn in range(turns_of(episode.group)):
            branch, sampled = await episode.turn(branch, observation, max_new_tokens=6)
            everything += sampled.token_ids
            if episode.group % 3 == 2 and turn == 0:
                sub, _ = await episode.turn(None, [77, *spoken(everything, 7)], max_new_tokens=6)
                await episode.turn(sub, [78], max_new_tokens=6)
            if random.random() < 0.3:
                await asyncio.sleep(random.random() * 0.02)
            observation = spoken(sampled.token_ids, turn)
        return Score(float(sum(everything)), {})


class Chaos:
    """The queue, its learner and its engines."""

    def __init__(self, world: World, seed: int, mode: str) -> None:
        self.random = random.Random(seed)
        self.core = make_core(
            max_new_tokens=MOST, mode=mode, min_tokens=40, max_tokens=4000, first_groups=5, max_token_age=-1
        )
        self.world, self.leases, self.step = world, list[m.Lease](), 0
        self.peers: dict[str, bytes] = {}
        self.incarnations, self.sequences = Counter[str](), Counter[str]()
        self.lost = Counter[str]()
        """Trajectories of episodes without branches that failed."""
        self.enough = asyncio.Event()
        self.outgoing: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def serve(self, router: Router) -> None:
        while True:
            peer, message = await router.receive()
            name = next((name for name, known in self.peers.items() if known == peer), "")
            if isinstance(message, m.Hello):
                name, self.peers[message.name] = message.name, peer
            self.handle(name, message)

    async def send(self, router: Router) -> None:
        while True:
            name, message = await self.outgoing.get()
            if name in self.peers:
                await router.send(self.peers[name], message)

    def handle(self, name: str, message: Any) -> None:
        if isinstance(message, m.CloseTrajectory) and message.status == "failed" and message.group % 3 != 2:
            self.lost[message.reason] += 1
        for recipient, action in self.core.handle(time.monotonic(), name, message):
            recipient = name if recipient == REPLY else recipient
            if isinstance(action, m.Lease):
                self.check(action)
                self.leases.append(action)
                asyncio.get_running_loop().call_soon(self.apply)
            elif recipient != JOURNAL:
                self.outgoing.put_nowait((recipient, action))
        self.core.recount()

    def apply(self) -> None:
        metrics = {"loss": 0.0}
        self.handle("learner-0", m.Applied(step=Version(0, self.step), outcome="trained", metrics=metrics))
        self.step += 1
        if len(self.leases) >= 8:
            self.enough.set()
        else:
            self.handle("learner-0", m.LeaseRequest(step=Version(0, self.step)))

    def join(self, engine: str, address: str) -> None:
        self.incarnations[engine] += 1
        self.sequences[engine] = 0
        hello = m.Hello(
            run=RUN, role="engine", name=engine, incarnation=self.incarnations[engine], pid=1, address=address
        )
        self.handle(engine, hello)
        stats = m.EngineStats(
            engine=engine,
            incarnation=self.incarnations[engine],
            version=Version(0, self.step),
            counters={},
            histograms={},
        )
        self.handle(engine, stats)

    def stream(self, engine: str, *rows: Row) -> None:
        chunks = make_chunks(rows, self.sequences[engine], engine=engine, incarnation=self.incarnations[engine])
        self.sequences[engine] += 1
        self.handle(engine, chunks)

    def answer(self, engine: str, address: str, body: dict[str, Any]) -> tuple[list[int], str]:
        budget, chance = body["sampling_params"]["max_new_tokens"], self.random.random()
        ids = [self.random.randrange(10, 90) for _ in range(self.random.randrange(0, budget))]
        finish = "stop" if len(ids) < budget else "length"
        ids = [*ids, EOS_LIKE] if finish == "stop" else ids
        logprobs, versions = [-token / 8 for token in ids], [(0, self.step)] * len(ids)
        cut = self.random.randrange(len(ids))  # a finish comes with its token
        first = Row(body["rid"], 0, ids[:cut], versions[:cut], "", logprobs[:cut])
        if chance < 0.75:
            if cut:
                self.stream(engine, first)
            rest = Row(body["rid"], cut, ids[cut:], versions[cut:], finish, logprobs[cut:])
            if self.random.random() < 0.5:
                self.stream(engine, rest)
            else:  # what the actor says may come first
                asyncio.get_running_loop().call_later(
                    self.random.random() * 0.02, self.late, engine, self.incarnations[engine], rest
                )
            return ids, finish
        if chance < 0.8:  # all is streamed, and the answer is lost
            self.stream(engine, Row(body["rid"], 0, ids, versions, finish, logprobs))
            raise web.HTTPServiceUnavailable
        if chance < 0.85:
            self.stream(engine, first, Row(body["rid"], cut, [], (), "abort"))
            return ids[:cut], "abort"
        self.stream(engine, first)
        asyncio.get_running_loop().call_later(self.random.random() * 0.02, self.join, engine, address)
        if chance < 0.93:
            raise web.HTTPServiceUnavailable
        return ids, finish  # it had answered, and dies before it has streamed

    def late(self, engine: str, incarnation: int, row: Row) -> None:
        if self.incarnations[engine] == incarnation:
            self.stream(engine, row)

    def check(self, lease: m.Lease) -> None:
        """Against what the environment of each must have said."""
        rewards: dict[tuple[int, int], set[float]] = {}
        ends = np.cumsum(lease.lengths)
        for i, (end, length) in enumerate(zip(ends, lease.lengths, strict=True)):
            ids, flags = lease.token_ids[end - length : end].tolist(), lease.sampled[end - length : end].tolist()
            group, member, episode = int(lease.groups[i]), int(lease.members[i]), int(lease.episodes[i])
            logprobs = lease.logprobs[end - length : end].tolist()
            assert logprobs == pytest.approx([-token / 8 * flag for token, flag in zip(ids, flags, strict=True)])
            said: list[list[int]] = []
            heard: list[list[int]] = []
            for token, flag, before in zip(ids, flags, [1, *flags], strict=False):
                if flag != before:
                    (heard if flag else said).append([])
                (heard if flag else said)[-1].append(token)
            assert len(said) == len(heard)
            rewards.setdefault((group, episode), set()).add(float(lease.rewards[i]))
            if member != episode:
                assert (said[0][0], said[1:]) == (77, [[78]])
                continue
            assert said[0] == spoken([], group)
            assert said[1:] == [spoken(before, turn) for turn, before in enumerate(heard[:-1])]
            assert len(said) == turns_of(group)
            assert all(len(turn) <= 6 and EOS_LIKE not in turn[:-1] for turn in heard)
            assert lease.rewards[i] == sum(map(sum, heard))
        assert all(len(values) == 1 for values in rewards.values()), "one reward for all branches of an episode"


@pytest.mark.parametrize("mode", ["streaming", "rounds"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 8))])
def test_whatever_trains_is_a_whole_episode(seed: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "plays", lambda task: True)

    async def scene(world: World) -> None:
        chaos = Chaos(world, seed, mode)
        await world.queue.kill()
        router = Router.bind("tcp://127.0.0.1:0")
        world.queue.address, world.player = router.address, Environment()
        engines = [FakeEngine(), FakeEngine()]
        async with engines[0], engines[1], asyncio.TaskGroup() as loops:
            serving = [loops.create_task(chaos.serve(router)), loops.create_task(chaos.send(router))]
            for role in ("learner", "publisher"):
                chaos.handle("", m.Hello(run=RUN, role=role, name=f"{role}-0", incarnation=1, pid=1))
            for number, engine in enumerate(engines):
                name, address = f"engine-{number}", engine.address
                chaos.join(name, address)
                engine.answer = lambda body, name=name, address=address: chaos.answer(name, address, body)  # type: ignore[misc]
            chaos.handle("learner-0", m.LeaseRequest(step=Version(0, 0)))
            for incarnation in (1, 2, 3):
                async with world.actor(incarnation):
                    try:
                        async with asyncio.timeout(0.7 if incarnation < 3 else 60):
                            await chaos.enough.wait()
                    except TimeoutError:
                        assert incarnation < 3, "\n".join(chaos.core.why())
            for task in serving:
                task.cancel()
        router.close()
        dropped = {name: count for name, count in chaos.core.ledger.dropped.items() if count}
        assert set(dropped) <= {"environment_lost", "too_few_members", "nothing_sampled"}, dropped
        refused = {name for name, count in chaos.core.tallies.refused.items() if count}
        assert refused <= {
            "old_segment",
            "already_closed",
            "message_again",
            "after_drop",
            "unknown_member",
            "duplicate",
        }, refused
        assert not chaos.lost, "an episode without branches survives everything"

    play(scene, group_size=2, max_new_tokens=MOST)
