"""The publisher on real sockets, killed and started again, between a learner, real plugin threads and a queue."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from fake_queue import FakeQueue
from plugin_host import PluginHost
from weights_builders import RUN, Tensors, hash_of, make_tensors, perturbed, same_bits

from actors.hand_over import HandOver
from engines.weights.chain import snapshot_parts
from engines.weights.publisher import Publisher
from stream_rl import config
from stream_rl.messages import (
    Alive,
    EngineVerified,
    Hello,
    LearnerDone,
    LeaseRequest,
    Refused,
    Snapshot,
    SnapshotOffer,
    SnapshotTaken,
    SnapshotWanted,
    VersionReport,
)
from stream_rl.session import Session
from stream_rl.transport import Dealer, Router
from stream_rl.types import Version

PART_BYTES = 60


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene that must end; a hang is a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(bounded())


def make_recipe(**supervise: Any) -> config.Recipe:
    return config.Recipe(
        run=config.Run(name=RUN, steps=1),
        model=config.Model(path=""),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=1, max_tokens=1),
        weights=config.Weights(verify_every=0, part_bytes=PART_BYTES),
        supervise=config.Supervise(**{"retry_s": 0.2, **supervise}),
    )


class Publishing:
    """A publisher in this process that can be killed, and comes back at the same address knowing nothing."""

    def __init__(self, queue: FakeQueue) -> None:
        self._queue, self._incarnation = queue, 0
        self.address = "tcp://127.0.0.1:0"

    async def start(self) -> None:
        self._incarnation += 1
        self._router = Router.bind(self.address)
        self.address = self._router.address
        self._dealer = Dealer.connect(self._queue.address, f"publisher-0@{self._incarnation}")
        hello = Hello(run=RUN, role="publisher", name="publisher-0", incarnation=self._incarnation, pid=1)
        session = Session(self._dealer, hello, make_recipe().supervise)
        await session.start()
        publisher = Publisher(make_recipe(), RUN, self._incarnation, self._router, session)
        self._loops = [asyncio.create_task(loop) for loop in (publisher.serve(), session.run(), publisher.listen())]

    async def kill(self) -> None:
        for loop in self._loops:
            loop.cancel()
        ends = await asyncio.gather(*self._loops, return_exceptions=True)
        self._router.close()
        self._dealer.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


@contextlib.asynccontextmanager
async def publishing() -> AsyncIterator[tuple[FakeQueue, Publishing, Dealer]]:
    """A queue, a publisher, and the learner's end of a conversation with it."""
    async with FakeQueue() as queue:
        publisher = Publishing(queue)
        await publisher.start()
        async with Dealer.connect(publisher.address, "learner-0@1") as learner:
            yield queue, publisher, learner
        await publisher.kill()


def parts_of(version: Version, tensors: Tensors, run: str = RUN) -> list[Snapshot]:
    return snapshot_parts(run, version, tensors.items(), PART_BYTES)


async def ask(learner: Dealer, *messages: Any) -> Any:
    """The answer to the last of these."""
    for message in messages:
        await learner.send(message)
    return await learner.receive(10)


async def assert_takes(learner: Dealer, version: Version, tensors: Tensors) -> None:
    wanted = await ask(learner, SnapshotOffer(version=version))
    assert isinstance(wanted, SnapshotWanted) and wanted.version == version
    taken = await ask(learner, *parts_of(version, tensors))
    assert isinstance(taken, SnapshotTaken) and taken.version == version


def test_an_offer_is_wanted_until_the_version_is_there_and_taken_from_then_on() -> None:
    async def scene() -> None:
        async with publishing() as (_, publisher, learner):
            await assert_takes(learner, Version(0, 4), make_tensors(0))
            for step in (4, 3, 0):
                answer = await ask(learner, SnapshotOffer(version=Version(0, step)))
                assert isinstance(answer, SnapshotTaken) and answer.version == Version(0, step)
            again = await ask(learner, *parts_of(Version(0, 4), make_tensors(0)))
            assert isinstance(again, SnapshotTaken), "sent again by a learner that did not hear the first answer"
            await publisher.kill()
            await publisher.start()
            await assert_takes(learner, Version(0, 4), make_tensors(0))
            await assert_takes(learner, Version(1, 2), make_tensors(0))

    play(scene)


def test_a_learner_that_another_has_taken_the_place_of_is_refused_and_harms_nothing() -> None:
    async def scene() -> None:
        async with publishing() as (_, publisher, learner), Dealer.connect(publisher.address, "learner-0@0") as dead:
            await assert_takes(learner, Version(1, 2), make_tensors(0))
            for message in (SnapshotOffer(version=Version(0, 9)), parts_of(Version(0, 9), make_tensors(1))[0]):
                refused = await ask(dead, message)
                assert isinstance(refused, Refused) and refused.reason == "old_history"
                assert "0.9" in refused.detail and "1.2" in refused.detail
            first, *rest = parts_of(Version(2, 0), make_tensors(2))
            await learner.send(first)
            refused = await ask(learner, parts_of(Version(1, 3), make_tensors(1))[0])
            assert isinstance(refused, Refused) and "2.0" in refused.detail, "the newer one is on its way already"
            assert isinstance(await ask(learner, *rest), SnapshotTaken)

    play(scene)


def damaged(kind: str) -> list[Snapshot]:
    """A version that a publisher which is at 0.0 refuses, for the reason named, once the last part is there."""
    tensors = make_tensors(1)
    if kind == "other_tensors":
        tensors.pop("norm")
    *rest, last = parts_of(Version(0, 1), tensors)
    change = {
        "other_run": {"run": "other"},
        "bad_part": {"part": last.parts},
        "short_payload": {"payload": last.payload[1:]},
    }.get(kind, {})
    return [*rest, dataclasses.replace(last, **change)]


@pytest.mark.parametrize("kind", ["other_tensors", "short_payload", "bad_part", "other_run"])
def test_a_snapshot_that_makes_no_sense_is_refused_by_name_and_the_next_is_taken(kind: str) -> None:
    async def scene() -> None:
        async with publishing() as (_, _, learner):
            await assert_takes(learner, Version(0, 0), make_tensors(0))
            refused = await ask(learner, *damaged(kind))
            assert isinstance(refused, Refused) and refused.detail
            assert refused.reason == (kind if kind in ("bad_part", "other_run") else "bad_snapshot")
            await assert_takes(learner, Version(0, 2), make_tensors(2))

    play(scene)


def test_peers_that_the_publisher_does_not_know_are_told_so() -> None:
    async def scene() -> None:
        async with publishing() as (_, publisher, _), Dealer.connect(publisher.address, "engine-0/0@1") as engine:
            answers = [await ask(engine, message) for message in (Alive(), LeaseRequest(step=Version(0, 0)))]
            assert [answer.reason for answer in answers] == ["unknown_engine", "unexpected"]

    play(scene)


@pytest.mark.parametrize("kills", [1, 6])
def test_engines_follow_the_learner_over_restarts_of_the_publisher_and_of_the_queue(kills: int) -> None:
    rng = np.random.default_rng(kills)
    line = [make_tensors(0)]

    async def scene() -> None:
        async with publishing() as (queue, publisher, learner):
            hand_over = HandOver(learner, make_recipe().supervise)
            handing = asyncio.create_task(hand_over.run())
            await hand_over.put(parts_of(Version(0, 0), line[0]))
            async with (
                PluginHost(queue.address, publisher.address, tensors=line[0]) as host,
                PluginHost(queue.address, publisher.address, tensors=line[0], engine="engine-1") as other,
            ):
                hosts = [host, other]
                for n in range(kills):
                    host.committing = n % 2 == 0  # or else an order waits in the scheduler while its publisher dies
                    line.append(perturbed(line[-1], rng, 0.2))
                    await hand_over.put(parts_of(Version(0, len(line) - 1), line[-1]))
                    await host.after(int(rng.integers(60)))
                    await publisher.kill()
                    if n % 3 == 1:
                        await queue.restart()
                    host.committing = True
                    await host.after(int(rng.integers(60)))
                    await publisher.start()
                final = Version(0, len(line) - 1)
                done = LearnerDone(final=final, weights_hash=hash_of(line[-1]))
                await hand_over.finish(done)
                await queue.until(lambda: verified(queue, final) == {"engine-0", "engine-1"})
                for each in hosts:
                    assert each.weights.version == final and same_bits(each.model.live(), line[-1])
                    assert each.counters.faults == 0
                reports = queue.of(EngineVerified) + queue.of(VersionReport)
                assert all(getattr(report, "hash_matches", True) for report in reports)
                assert {r.weights_hash for r in queue.of(EngineVerified)} == {hash_of(line[-1])}

                queue.heard.clear()
                await queue.restart()  # what the end of the run hangs on is said again
                await queue.until(lambda: verified(queue, final) == {"engine-0", "engine-1"})
            handing.cancel()
            await asyncio.gather(handing, return_exceptions=True)

    play(scene)


def verified(queue: FakeQueue, version: Version) -> set[str]:
    return {report.engine for report in queue.of(EngineVerified) if report.version == version}


def test_a_publisher_process_that_was_killed_comes_back_at_its_address(tmp_path: pathlib.Path) -> None:
    recipe = tmp_path / "recipe.toml"
    config.dump(make_recipe(), recipe)

    def start(queue: str, incarnation: int, bind: list[str]) -> tuple[subprocess.Popen[bytes], str]:
        read, write = os.pipe()
        command = [sys.executable, "-m", "engines.weights.publisher", str(recipe), "--run-id", RUN, "--queue", queue]
        command += ["--incarnation", str(incarnation), "--ready-fd", str(write), *bind]
        process = subprocess.Popen(command, pass_fds=[write])
        os.close(write)
        with os.fdopen(read) as pipe:
            return process, json.loads(pipe.readline())["address"]

    async def scene() -> None:
        async with FakeQueue() as queue:
            first, address = await asyncio.to_thread(start, queue.address, 1, [])
            async with Dealer.connect(address, "learner-0@1") as learner:
                await assert_takes(learner, Version(0, 7), make_tensors(0))
                first.send_signal(signal.SIGKILL)
                first.wait()
                second, again = await asyncio.to_thread(start, queue.address, 2, ["--bind", address])
                assert again == address
                await assert_takes(learner, Version(0, 7), make_tensors(0))
                second.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(second.wait, 10) == 0
            assert [(hello.incarnation, hello.address) for hello in queue.of(Hello)] == [(1, address), (2, address)]

    play(scene)
