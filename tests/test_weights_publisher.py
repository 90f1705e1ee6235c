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
import threading
from typing import Any

import numpy as np
import pytest
from fake_queue import FakeQueue, play
from plugin_host import PluginHost
from publisher_builders import (
    PART_BYTES,
    ask,
    assert_takes,
    learning,
    live,
    make_recipe,
    offer,
    publishing,
    verified,
)
from update_builders import anchor_parts, change_parts
from weights_builders import FIRST, RUN, hash_of, make_tensors, perturbed, same_bits

from engines.weights.chain import Chain
from stream_rl import config
from stream_rl.errors import StreamRLError
from stream_rl.messages import (
    Alive,
    EngineVerified,
    Hello,
    LearnerDone,
    LeaseRequest,
    Refused,
    UpdatePart,
    VersionOffer,
    VersionReport,
    VersionTaken,
    VersionWanted,
)
from stream_rl.transport import Dealer
from stream_rl.types import Version


def test_an_offer_is_wanted_until_the_version_is_there_and_taken_from_then_on() -> None:
    async def scene() -> None:
        async with publishing() as (_, publisher, learner):
            await assert_takes(learner, Version(0, 4), make_tensors(0))
            await taken_in(learner, Version(0, 4))
            for step in (4, 3, 0):
                answer = await offer(learner, Version(0, step))
                assert isinstance(answer, VersionTaken) and answer.target == Version(0, step)
            again = await ask(learner, *anchor_parts(make_tensors(0), Version(0, 4), PART_BYTES))
            assert isinstance(again, VersionTaken), "sent again by a learner that did not hear the first answer"
            await publisher.kill()
            await publisher.start()
            await assert_takes(learner, Version(0, 4), make_tensors(0))
            await assert_takes(learner, Version(1, 2), make_tensors(0))

    play(scene)


async def taken_in(learner: Dealer, version: Version) -> None:
    """An offer has no answer while the version is being read; the learner repeats it."""
    async with asyncio.timeout(10):
        while True:
            await learner.send(VersionOffer(base=version, target=version))
            with contextlib.suppress(StreamRLError):
                assert isinstance(await learner.receive(0.2), VersionTaken)
                return


def test_what_changed_is_wanted_by_who_holds_the_base_and_all_of_it_by_who_does_not() -> None:
    old, new = make_tensors(0), perturbed(make_tensors(0), np.random.default_rng(0), 0.2)

    async def scene() -> None:
        async with publishing() as (_, publisher, learner):
            await assert_takes(learner, FIRST, old)
            wanted = await offer(learner, Version(0, 1), FIRST)
            assert isinstance(wanted, VersionWanted) and not wanted.anchor
            parts = change_parts(old, new, FIRST, Version(0, 1), part_bytes=8, sources=2)
            assert len(parts) > 4 and {part.source for part in parts} == {0, 1}
            for part in (*parts[1:], *parts[1:3]):
                await learner.send(part)
            taken = await ask(learner, parts[0])
            assert isinstance(taken, VersionTaken) and taken.target == Version(0, 1)
            wanted = await offer(learner, Version(0, 5), Version(0, 4))
            assert isinstance(wanted, VersionWanted) and wanted.anchor, "it missed what led to the base"
            await publisher.kill()
            await publisher.start()
            wanted = await offer(learner, Version(0, 2), Version(0, 1))
            assert isinstance(wanted, VersionWanted) and wanted.anchor

    play(scene)


def test_a_learner_that_another_has_taken_the_place_of_is_refused_and_harms_nothing() -> None:
    async def scene() -> None:
        async with publishing() as (_, publisher, learner), Dealer.connect(publisher.address, "learner-0@0") as dead:
            await assert_takes(learner, Version(1, 2), make_tensors(0))
            old = Version(0, 9)
            for message in (VersionOffer(base=old, target=old), anchor_parts(make_tensors(1), old)[0]):
                refused = await ask(dead, message)
                assert isinstance(refused, Refused) and refused.reason == "old_history"
                assert "0.9" in refused.detail and "1.2" in refused.detail
            await assert_takes(learner, Version(2, 0), make_tensors(2))
            refused = await ask(dead, anchor_parts(make_tensors(1), Version(1, 3))[0])
            assert isinstance(refused, Refused) and "2.0" in refused.detail

    play(scene)


def damaged(kind: str) -> list[UpdatePart]:
    """A version that a publisher which is at 0.0 refuses, for the reason named, once the last part is there."""
    tensors, version = make_tensors(1), Version(0, 1)
    if kind == "other_tensors":
        tensors.pop("norm")
    parts = anchor_parts(tensors, version, PART_BYTES)
    if kind == "other_base":
        parts = change_parts(make_tensors(0), tensors, Version(0, 7), version, part_bytes=PART_BYTES)
    *rest, last = parts
    change = {
        "other_run": {"run": "other"},
        "bad_part": {"part": last.parts},
        "bad_source": {"source": 3},
        "short_payload": {"payload": last.payload[1:]},
    }.get(kind, {})
    return [*rest, dataclasses.replace(last, **change)]


@pytest.mark.parametrize(
    "kind", ["other_tensors", "other_base", "short_payload", "bad_part", "bad_source", "other_run"]
)
def test_an_update_that_makes_no_sense_is_refused_by_name_and_the_next_is_taken(kind: str) -> None:
    reason = {"bad_part": "bad_part", "bad_source": "bad_part", "other_run": "other_run"}.get(kind, "bad_update")

    async def scene() -> None:
        async with publishing() as (_, _, learner):
            await assert_takes(learner, FIRST, make_tensors(0))
            refused = await ask(learner, *damaged(kind))
            assert isinstance(refused, Refused) and refused.detail
            assert refused.reason == reason
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
    rng, first = np.random.default_rng(kills), make_tensors(0)

    async def scene() -> None:
        async with (
            publishing() as (queue, publisher, dealer),
            learning(dealer, first) as learner,
            PluginHost(queue.address, publisher.address, tensors=first) as host,
            PluginHost(queue.address, publisher.address, tensors=first, engine="engine-1") as other,
        ):
            hosts = [host, other]
            for n in range(kills):
                host.committing = n % 2 == 0  # or else an order waits in the scheduler while its publisher dies
                for _ in range(int(rng.integers(1, 4))):
                    await learner.step(rng)
                await host.after(int(rng.integers(60)))
                await publisher.kill()
                if n % 3 == 1:
                    await queue.restart()
                host.committing = True
                await host.after(int(rng.integers(60)))
                await publisher.start()
            final = learner.version
            await learner.hand_over.finish(LearnerDone(final=final, weights_hash=hash_of(learner.line[-1])))
            await queue.until(lambda: verified(queue, final) == {"engine-0", "engine-1"})
            for each in hosts:
                assert each.weights.version == final and same_bits(each.model.live(), learner.line[-1])
                assert each.counters.faults == 0
            reports = queue.of(EngineVerified) + queue.of(VersionReport)
            assert all(getattr(report, "hash_matches", True) for report in reports)
            assert {r.weights_hash for r in queue.of(EngineVerified)} == {hash_of(learner.line[-1])}
            assert learner.anchors <= kills + 1

            queue.heard.clear()
            await queue.restart()  # what the end of the run hangs on is said again
            await queue.until(lambda: verified(queue, final) == {"engine-0", "engine-1"})

    play(scene)


def test_what_changes_while_the_publisher_is_slow_comes_as_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds one version in hand while it reads another; the learner puts the rest together, and waits for nobody."""
    rng, first = np.random.default_rng(0), make_tensors(0)
    gate, take = threading.Event(), Chain.take

    def slow(chain: Chain, *args: Any) -> None:
        assert gate.wait(20)
        take(chain, *args)

    async def scene() -> None:
        async with (
            publishing() as (queue, publisher, dealer),
            learning(dealer, first) as learner,
            PluginHost(queue.address, publisher.address, tensors=first) as host,
        ):
            gate.set()
            await learner.step(rng, 0.02)
            await queue.until(lambda: any(report.version == Version(0, 1) for report in live(queue)))
            gate.clear()
            for _ in range(12):
                await asyncio.wait_for(learner.step(rng, 0.02), 1.0)
                await asyncio.sleep(0.02)
            gate.set()
            await queue.until(lambda: any(report.version == learner.version for report in live(queue)))
            assert same_bits(host.model.live(), learner.line[-1])
            assert len(live(queue)) < 8 and learner.anchors == 1
            assert all(report.hash_matches for report in live(queue))

    monkeypatch.setattr(Chain, "take", slow)
    play(scene)


def test_an_anchor_that_is_asked_for_while_changes_wait_brings_them_too() -> None:
    rng, first = np.random.default_rng(0), make_tensors(0)

    async def scene() -> None:
        async with (
            publishing() as (queue, publisher, dealer),
            learning(dealer, first) as learner,
            PluginHost(queue.address, publisher.address, tensors=first) as host,
        ):
            await learner.step(rng)
            await queue.until(lambda: any(report.version == Version(0, 1) for report in live(queue)))
            await publisher.kill()
            for _ in range(3):
                await learner.step(rng)
            await publisher.start()
            await queue.until(lambda: any(report.version == learner.version for report in live(queue)))
            assert same_bits(host.model.live(), learner.line[-1])
            assert learner.anchors == 2
            await learner.step(rng, 0.02)
            await queue.until(lambda: any(report.version == learner.version for report in live(queue)))
            assert not live(queue)[-1].anchor and same_bits(host.model.live(), learner.line[-1])

    play(scene)


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
            hellos = dict.fromkeys((hello.incarnation, hello.address) for hello in queue.of(Hello))  # may be repeated
            assert list(hellos) == [(1, address), (2, address)]

    play(scene)
