"""The rollout actor's evaluations, its prompts, and its process."""

import asyncio
import dataclasses
import itertools
import pathlib
import signal
import sys
from typing import Any

import pytest
from actor_world import RUN, World, make_directory, make_recipe, play, rid, usable
from fake_engine import FakeEngine
from fake_queue import FakeQueue
from tokenizers import Tokenizer

from actors.prompts import MAX_SKIPPED, TrainingPrompts, pack_problem, unpack_problem
from stream_rl import config
from stream_rl.errors import EngineError, TaskError, WireError
from stream_rl.messages import (
    ActorStats,
    Admit,
    CloseTrajectory,
    Drain,
    Evaluated,
    Hello,
    Interrupted,
    OpenGroup,
    Park,
)
from stream_rl.task import Prompt
from stream_rl.types import Version


def test_the_last_evaluation_is_of_the_drained_version_and_what_is_in_flight_ends() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            engine.answer = lambda body: (world.ids("abc"), "stop") if body["rid"].startswith("eval") else None
            await world.queue.say(usable(engine), Admit(groups=[0, 1]))
            await engine.nth(4)
            final = Version(1, 7)
            await world.queue.say(Drain(final=final), Drain(final=final), world.resume(1, "ab"))
            last = await world.queue.nth(Evaluated)
            assert (last.label, last.version, list(last.rewards)) == ("last", final, [3.0, 3.0, 3.0])
            await engine.until(lambda: len(engine.aborts) == 4 and not engine.open)
            assert [type(message) for message in world.queue.taken] == [OpenGroup, OpenGroup, Evaluated]
            await world.queue.say(world.resume(1, "ab", group=9, finish="stop"))
            for count in (1, 2):
                await world.queue.say(Park(group=7 + count, member=1, segment=0))
                await world.queue.nth(Interrupted, count)
            assert not world.queue.of(CloseTrajectory), "there is no more to go on with"
            prompts = [body["input_ids"] for body in engine.requests if body["rid"].startswith("eval")]
            assert sorted(prompts) == sorted(world.ids(f"heldout {n}:") for n in range(3))

    play(scene, heldout_prompts=3)


def test_what_the_queue_has_evaluated_is_not_evaluated_again() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine(lambda body: (world.ids("abc"), "stop")) as engine:
            world.greet(usable(engine), Drain(final=Version(0, 1)), evaluated=["first", "last"])
            async with world.actor(incarnation=2):
                await world.queue.nth(ActorStats)
            assert not world.queue.taken
            world.greet(usable(engine), Drain(final=Version(0, 1)))
            async with world.actor(incarnation=3):
                assert (await world.queue.nth(Evaluated)).label == "last"

    play(scene, heldout_prompts=3)


def test_an_evaluation_survives_an_engine_s_death_and_restart_and_aborts() -> None:
    async def scene(world: World) -> None:
        count = itertools.count()
        first, second = FakeEngine(), FakeEngine(lambda body: (world.ids("ab"), ["abort", "stop"][next(count) > 1]))
        async with first, second:
            world.greet(usable(first), evaluated=[])
            async with world.actor():
                await first.nth(3)
                await first.kill()
                await world.queue.say(usable(first, second))  # it is not known to be dead yet
                got = await world.queue.nth(Evaluated)
        assert (got.label, list(got.rewards)) == ("first", [2.0, 2.0, 2.0])
        assert len(second.requests) == 5, "three prompts, two of them aborted once"
        rids = [*first.rids, *second.rids]
        assert len(set(rids)) == len(rids), "SGLang refuses a rid that it has"

    play(scene, heldout_prompts=3)


def test_an_evaluation_begins_anew_with_its_actor_under_other_names() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine:
            world.greet(usable(engine), evaluated=[])
            async with world.actor():
                await engine.nth()
            engine.answer = lambda body: (world.ids("ab"), "stop")
            async with world.actor(incarnation=2):
                await world.queue.nth(Evaluated)
        assert len(set(engine.rids)) == 2

    play(scene, heldout_prompts=1)


def test_a_welcome_takes_back_what_was_admitted_before() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine:
            world.greet(usable(engine), evaluated=[], admitted=[0, 1])
            async with world.actor():
                await engine.nth()
                await world.queue.say(Admit(groups=[2]))
                world.greet(usable(engine), evaluated=[], admitted=[1, 3])
                heard = len(world.queue.of(Hello))
                await world.queue.restart()
                await world.queue.until(lambda: len(world.queue.of(Hello)) > heard)
                await world.queue.say(world.resume(1, "a", group=9, finish="stop"))
                await world.queue.nth(CloseTrajectory)
                engine.finish(engine.rids[0], world.ids("ab"))
                await world.queue.nth(OpenGroup, 2)
            assert [opening.group for opening in world.queue.of(OpenGroup)] == [1, 3]

    play(scene, heldout_prompts=1)


def test_a_heldout_prompt_that_nobody_answers_or_an_engine_refuses_ends_the_actor() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine:
            engine.status = 400
            world.greet(usable(engine), evaluated=[])
            with pytest.raises(BaseExceptionGroup) as failure:
                async with world.actor():
                    await asyncio.sleep(10)
        assert failure.value.split(EngineError)[1] is None
        assert "answered 400" in repr(leaf(failure.value))
        async with FakeEngine() as hung:
            world.greet(usable(hung), evaluated=[])
            limits = {"supervise": dataclasses.replace(world.recipe.supervise, silence_timeout_s=1.0)}
            limits["engine"] = dataclasses.replace(world.recipe.engine, start_timeout_s=0.1)
            world.recipe = dataclasses.replace(world.recipe, **limits)
            with pytest.raises(BaseExceptionGroup) as failure:
                async with world.actor(incarnation=2):
                    await asyncio.sleep(10)
        assert "no engine answered held-out prompt" in repr(leaf(failure.value))
        assert len(hung.requests) > 1

    play(scene, heldout_prompts=1, request_timeout_s=0.1)


def leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def test_the_process_registers_rolls_and_leaves_promptly_on_sigterm(tmp_path: pathlib.Path) -> None:
    directory = make_directory(tmp_path)

    async def scene() -> None:
        tokenizer = Tokenizer.from_file(str(directory / "model" / "tokenizer.json"))
        recipe = make_recipe(directory)
        config.dump(recipe, directory / "recipe.toml")
        finished = lambda body: (tokenizer.encode("abc").ids, "stop") if body["rid"] == rid(0, 0, 0) else None  # noqa: E731
        async with FakeQueue() as queue, FakeEngine(finished) as engine:
            queue.welcome = lambda hello: {"evaluated": ["first"], "admitted": [0]}
            queue.after_welcome = lambda hello, new: [usable(engine)]
            words = [str(directory / "recipe.toml"), "--run-id", RUN, "--queue", queue.address, "--incarnation", "3"]
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "actors.rollout", *words)
            close = await queue.nth(CloseTrajectory)
            assert (close.reward, close.reward_parts) == (3.0, {"n": 0.0})
            hello, *_ = queue.of(Hello)  # said again on a busy machine
            assert (hello.role, hello.name, hello.incarnation, hello.pid) == ("actor", "actor-0", 3, process.pid)
            await engine.until(lambda: engine.open == {rid(0, 1, 0)})
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await process.wait() == 0

    async def bounded() -> None:
        async with asyncio.timeout(150):
            await scene()

    asyncio.run(bounded())


def test_prompts_are_found_by_number_in_any_order() -> None:
    started = itertools.count()

    def start() -> Any:
        next(started)
        return (Prompt(text=str(n)) for n in itertools.count())

    prompts = TrainingPrompts("t", start)
    far = MAX_SKIPPED + 10
    assert [prompts.get(n).text for n in (3, 1, far, 2, 0)] == ["3", "1", str(far), "2", "0"]
    assert next(started) == 2, "begun, and begun again for what was no longer kept"
    assert [prompts.get(n).text for n in (5, 4)] == ["5", "4"]
    assert len(prompts._skipped) <= MAX_SKIPPED


def test_a_task_that_ends_or_raises_is_said_to() -> None:
    with pytest.raises(TaskError, match="must be endless"):
        TrainingPrompts("t", lambda: iter([Prompt(text="0")])).get(1)

    def bad() -> Any:
        raise KeyError("oh")

    with pytest.raises(TaskError, match="raised KeyError"):
        TrainingPrompts("t", bad).get(0)


def test_a_problem_travels_whole_or_is_refused() -> None:
    prompt = Prompt(text="a", data={"answer": [1, 2.5, None]})
    assert unpack_problem(pack_problem(prompt)) == prompt
    with pytest.raises(TaskError, match="cannot travel"):
        pack_problem(Prompt(text="a", data={"answer": object()}))
    for bad in (b"", b"\xc1", b"\x01", pack_problem(prompt)[:-1]):
        with pytest.raises(WireError):
            unpack_problem(bad)
