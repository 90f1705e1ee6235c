"""The learner's process against a queue and a publisher that are restarted under its hands, and its own past."""

import asyncio
import pathlib
import random
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learner_peers import RUN, STEPS, Around, once, run

from actors import learner
from engines.megatron.learner import MegatronLearner
from stream_rl import messages as m
from stream_rl.errors import StreamRLError
from stream_rl.session import Session
from stream_rl.transport import Dealer
from stream_rl.types import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the last version of a run in which nothing went wrong; every other run must come to the same."""
    found = []

    async def undisturbed() -> None:
        async with Around(tmp_path_factory.mktemp("straight")) as around, around.learner() as task:
            found.append((await around.until_done()).weights_hash)
            said = around.queue.said()
            steps = [line for line in said if not line.startswith("Committed")]
            assert steps == [f"{what} 0.{step}" for step in range(STEPS) for what in ("LeaseRequest", "Applied")]
            assert [line for line in said if line not in steps] == ["Committed 0.2", "Committed 0.4", "Committed 0.5"]
            assert all(said.index(f"Committed 0.{step}") > said.index(f"Applied 0.{step - 1}") for step in (2, 4, 5))
            assert said[-1] == "Committed 0.5", "the last is waited for"
            taken = around.publisher.taken
            assert taken == sorted(set(taken)) and taken[-1] == (0, STEPS)
            assert around.publisher.anchors == taken[:1], "then what changed is enough"
            assert sorted(path.name for path in around.checkpoints.iterdir()) == ["final", "step-2", "step-4"]
            assert around.log() == [(0, step) for step in range(STEPS)]
            await around.publisher.until(lambda: isinstance(around.publisher.heard[-1], m.VersionOffer))
            assert not task.done(), "it stays, for a publisher that is restarted"

    run(undisturbed())
    return found[0]


async def until_waiting(around: Around, step: int) -> None:
    """Until the learner has handed over version 0.STEP and waits for a lease that does not come."""
    await around.queue.until(lambda: around.queue.said()[-1:] == [f"LeaseRequest 0.{step}"])
    await around.publisher.until(lambda: around.publisher.version == (0, step))


def test_a_restarted_learner_goes_on_from_its_checkpoint_in_a_new_history(
    tmp_path: pathlib.Path, straight: str
) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            queue, publisher = around.queue, around.publisher
            queue.withheld = Version(0, 3)
            async with around.learner():
                await until_waiting(around, 3)
                await around.written("step-2")
            queue.heard.clear()
            held: list[Version | None] = []
            queue.watch = lambda message: isinstance(message, m.Committed) and held.append(publisher.version)
            async with around.learner(2):
                done = await around.until_done()
            assert queue.said()[:4] == ["Committed 1.2", "LeaseRequest 1.2", "Applied 1.2", "LeaseRequest 1.3"]
            assert held[0] == (0, 3), "nobody holds a version that the queue has not heard of"
            assert publisher.taken == sorted(set(publisher.taken)) and {(0, 3), (1, 5)} <= set(publisher.taken)
            assert len(publisher.anchors) == 2 and publisher.anchors[1].history == 1
            assert done.final == (1, 5)
            assert done.weights_hash == straight
            assert around.log() == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]

    run(test())


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_without_a_whole_checkpoint_it_begins_again(
    tmp_path: pathlib.Path, straight: str, checkpoint_every: int
) -> None:
    async def test() -> None:
        async with Around(tmp_path, checkpoint_every) as around:
            around.queue.withheld = Version(0, 3)
            async with around.learner():
                await until_waiting(around, 3)
                await around.written(*["step-2"] * bool(checkpoint_every))
            damaged = list(around.checkpoints.glob("*/training.json"))
            assert len(damaged) == (1 if checkpoint_every else 0)
            for path in damaged:
                path.write_text("{")
            around.queue.version = Version(4, 3)  # others were here in between
            async with around.learner(6):
                done = await around.until_done()
            assert "Committed 5.0" in around.queue.said()
            assert (done.final, done.weights_hash) == ((5, 5), straight)

    run(test())


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(tmp_path: pathlib.Path, straight: str) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            around.queue.withheld = Version(0, 4)
            async with around.learner():
                await around.queue.until(lambda: around.queue.said()[-1:] == ["LeaseRequest 0.4"])
                await around.written("step-2", "step-4")
            (around.checkpoints / "step-4" / "model.safetensors").write_bytes(b"torn")
            (around.checkpoints / ".step-4.writing-1234567890").mkdir()
            async with around.learner(2):
                done = await around.until_done()
            assert "Committed 1.2" in around.queue.said()
            assert (done.final, done.weights_hash) == ((1, 5), straight)
            assert sorted(path.name for path in around.checkpoints.iterdir()) == ["final", "step-2", "step-4"]

    run(test())


@pytest.mark.parametrize("told", [True, False], ids=["after", "before"])
def test_a_learner_lost_at_its_end_only_says_again_what_it_said(
    tmp_path: pathlib.Path, straight: str, told: bool
) -> None:
    """Killed after LearnerDone, or between writing the last checkpoint and saying so."""

    async def test() -> None:
        async with Around(tmp_path) as around:
            queue, publisher = around.queue, around.publisher
            if not told:
                queue.keeps = False
                queue.crash_at = lambda message: isinstance(message, m.Committed) and message.step == (0, 5)
            async with around.learner():
                if told:
                    await around.until_done()
                else:
                    await queue.until(lambda: queue.said()[-1:] == ["Committed 0.5"])
            queue.heard.clear()
            publisher.done = None
            async with around.learner(2):
                done = await around.until_done()
            assert queue.said() == ["Committed 1.5"]
            assert publisher.taken[-1] == done.final == (1, 5)
            assert done.weights_hash == straight
            assert around.log() == [(0, step) for step in range(STEPS)]

    run(test())


@pytest.mark.long
def test_a_process_killed_at_any_moment_comes_to_the_same_weights(tmp_path: pathlib.Path, straight: str) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            chance, queue = random.Random(1), around.queue
            for incarnation in range(1, 8):
                words = (str(around.recipe.run_directory / "recipe.toml"), "--run-id", RUN, "--queue", queue.address,
                         "--publisher", around.publisher.address, "--incarnation", str(incarnation))  # fmt: skip
                queue.heard.clear()
                process = await asyncio.create_subprocess_exec(sys.executable, "-m", "actors.learner", *words, cwd=ROOT)
                if incarnation < 7:
                    said = chance.randrange(1, 12)
                    await queue.until(
                        lambda said=said: len(queue.all(m.Hello, m.LeaseRequest, m.Applied, m.Committed)) >= said
                    )
                    await asyncio.sleep(chance.uniform(0.0, 0.02))
                    process.kill()
                else:
                    done = await around.until_done()
                    assert (done.final.step, done.weights_hash) == (5, straight)
                    process.terminate()
                assert await process.wait() == (-signal.SIGKILL if incarnation < 7 else 0)
            lines = around.log()
            assert lines == sorted(lines), "histories only grow, and steps in each of them"
            surviving = {step: history for history, step in lines}
            assert sorted(surviving) == list(range(STEPS))

    run(test(), 200)


# -- restarts of the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [m.Hello, m.LeaseRequest, m.Applied, m.Committed, m.LearnerDone])
@pytest.mark.parametrize("keeps", [True, False], ids=["taken", "lost"])
def test_a_queue_restarted_at_any_request_changes_nothing(
    tmp_path: pathlib.Path, straight: str, kind: type[Any], keeps: bool
) -> None:
    """At each of them once: the request is in its journal or not, its answer never left."""

    async def test() -> None:
        async with Around(tmp_path) as around:
            queue = around.queue
            queue.keeps, queue.crash_at = keeps, once(lambda message: isinstance(message, kind))
            async with around.learner():
                done = await around.until_done()
            assert queue.crashes == {m.LeaseRequest: 5, m.Applied: 5, m.Committed: 3}.get(kind, 1)
            assert (done.final, done.weights_hash) == ((0, 5), straight)
            assert around.log() == [(0, step) for step in range(STEPS)]
            assert around.publisher.taken[-1] == (0, STEPS)

    run(test())


def test_a_restarted_publisher_gets_all_of_the_newest_version(tmp_path: pathlib.Path, straight: str) -> None:
    """While the learner waits for a lease, in the middle of a transfer, and after the learner's end."""

    async def test() -> None:
        async with Around(tmp_path) as around:
            queue, publisher = around.queue, around.publisher
            queue.withheld = Version(0, 2)
            async with around.learner():
                await until_waiting(around, 2)
                publisher.crash_at = once(lambda message: isinstance(message, m.VersionOffer))
                await publisher.until(lambda: publisher.crashes == 1 and publisher.version == (0, 2))
                assert publisher.taken[-2:] == [(0, 2), (0, 2)] and publisher.anchors[-1] == (0, 2)

                publisher.crash_at = once(lambda message: isinstance(message, m.UpdatePart) and message.part == 1)
                queue.withheld = None
                done = await around.until_done()
                assert publisher.hashes[Version(0, 5)] == done.weights_hash == straight
                assert publisher.crashes > 1, "a transfer was cut short and begun again"

                for crashes in range(publisher.crashes + 1, publisher.crashes + 3):
                    publisher.crash_at = once(lambda message: isinstance(message, m.VersionOffer))
                    await publisher.until(lambda crashes=crashes: publisher.crashes == crashes)
                    assert repr(await around.until_done()) == repr(done)
                    assert publisher.anchors[-1] == (0, 5)

    run(test())


def test_what_the_publisher_refuses_ends_the_learner(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            refusal = m.Refused(reason="other_run", detail="this publisher serves run-2")
            around.publisher.answer = lambda peer, message: [refusal]  # type: ignore[method-assign]
            with pytest.raises(ExceptionGroup) as raised:
                async with around.learner() as task:
                    await asyncio.wait([task])
            assert raised.group_contains(StreamRLError, match="refused the learner: other_run: this publisher serves")

    run(test())


def test_a_learner_in_the_middle_of_a_step_is_alive(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        async with Around(tmp_path) as around:
            queue, heard_twice = around.queue, threading.Event()

            class Slow(MegatronLearner):
                def train_step(self, *arguments: Any) -> dict[str, float]:
                    assert heard_twice.wait(20), "the queue heard nothing while the step ran"
                    return super().train_step(*arguments)

            recipe = around.recipe
            engine = Slow(recipe.model.path, recipe.learner, 0)
            async with (
                Dealer.connect(queue.address, "learner-0@1") as dealer,
                Dealer.connect(around.publisher.address, "learner-0@1") as publisher,
            ):
                session = Session(dealer, m.Hello(run=RUN, role="learner", name="learner-0", incarnation=1, pid=1),
                                  recipe.supervise)  # fmt: skip
                await session.start()
                loop = learner.LearnerLoop(recipe, RUN, session, publisher, engine, Version(0, 0), False)
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(c) for c in (session.run(), loop.train(), loop.hand_over.run())]
                    await queue.until(lambda: len(queue.all(m.Alive)) >= 2)
                    assert not queue.all(m.Applied)
                    heard_twice.set()
                    await around.until_done()
                    for task in tasks:
                        task.cancel()

    run(test())
