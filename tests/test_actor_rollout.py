"""The rollout actor's trajectories: a queue that is killed, engines that die, and its own restarts."""

import asyncio
import dataclasses
from typing import Any

import pytest
from actor_world import BUDGET, World, play, rid, said, usable
from fake_engine import FakeEngine
from fake_queue import RETRY

from actors.engine_pool import EnginePool
from actors.prompts import unpack_problem
from actors.rewards import RewardFailure
from stream_rl.messages import (
    ActorStats,
    Admit,
    Cancel,
    CloseTrajectory,
    Engines,
    Evaluated,
    Interrupted,
    OpenGroup,
    Park,
)
from stream_rl.task import Prompt


def test_an_admitted_group_is_opened_asked_scored_and_closed() -> None:
    async def scene(world: World) -> None:
        eos = world.ids("<eos>")
        async with FakeEngine(lambda body: (world.ids("four") + eos, "stop")) as engine:
            world.queue.welcome = lambda hello: {"admitted": [0]}
            world.queue.after_welcome = lambda hello, new: [usable(engine)]
            async with world.actor():
                await world.queue.nth(CloseTrajectory, 2)
                await world.queue.until(
                    lambda: any(stats.counters.get("generated_tokens") == 10 for stats in world.queue.of(ActorStats))
                )
        first, opening, *closes = world.queue.taken
        assert isinstance(first, Evaluated) and (first.label, list(first.rewards)) == ("first", [])
        assert (opening.group, opening.members, opening.task) == (0, 2, world.recipe.task.use)
        assert unpack_problem(opening.problem) == Prompt(text="train 0:", data={"n": 0})
        assert opening.prompt_ids.tolist() == world.ids("train 0:")
        assert sorted(said(close) for close in closes) == [("done", 0, 0, 0, "", 5), ("done", 0, 1, 0, "", 5)]
        assert {close.reward for close in closes} == {4.0}, "the stop token is no part of the answer"
        assert {close.reward_parts["n"] for close in closes} == {0}
        assert [message.sequence for message in world.queue.taken] == [0, 1, 2, 3]
        assert sorted(engine.rids) == [rid(0, 0, 0), rid(0, 1, 0)]
        for body in engine.requests:
            assert body["input_ids"] == world.ids("train 0:")
            assert body["sampling_params"]["max_new_tokens"] == BUDGET
            assert body["sampling_params"]["stop_token_ids"] == eos

    play(scene)


def test_nothing_is_asked_for_a_group_before_the_queue_has_its_opening() -> None:
    """Or chunks of a group that it does not know would come, and be refused for good."""

    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            opening = asyncio.Event()
            world.queue.fault = lambda message: opening.set() or "lose"
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await opening.wait()
            await asyncio.sleep(3 * RETRY)
            assert not engine.requests
            world.queue.fault = lambda message: ""
            await engine.nth(2)

    play(scene)


def test_a_trajectory_of_a_dead_engine_goes_on_at_another_with_its_tokens_and_the_rest_of_its_budget() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as first, FakeEngine() as second, world.actor():
            await world.queue.say(usable(first), Admit(groups=[0]))
            await first.nth()
            await world.queue.say(usable(first, second))
            await first.kill()
            interrupted = await world.queue.nth(Interrupted)
            assert said(interrupted) == ("interrupted", 0, 0, 0, "engine_unreachable", -1)
            assert not second.requests, "the queue decides where its tokens end"
            # the dead one has fewer requests of ours, and the queue does not know yet that it is dead
            await world.queue.say(world.resume(1, "abc"))
            body = await second.nth()
            assert body["rid"] == rid(0, 0, 1)
            assert body["input_ids"] == world.ids("train 0:abc")
            assert body["sampling_params"]["max_new_tokens"] == BUDGET - 3
            second.finish(rid(0, 0, 1), world.ids("de"))
            close = await world.queue.nth(CloseTrajectory)
            assert said(close) == ("done", 0, 0, 1, "", 5)
            assert world.rewards.scored[-1][1] == "abcde"

    play(scene, group_size=1)


def test_a_fresh_actor_goes_on_with_what_it_has_never_heard_of() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine(lambda body: (world.ids("x"), "stop")) as engine:
            orders = [
                world.resume(1, "ab", group=3),
                world.resume(4, "cd", group=3, member=1, finish="stop"),
                world.resume(2, "efghijklmn", group=4),
                world.resume(2, "ef", group=4, member=1, finish="length"),
            ]
            world.greet(usable(engine), *orders)
            async with world.actor(incarnation=2):
                await world.queue.nth(CloseTrajectory, 4)
            assert sorted(said(close) for close in world.queue.of(CloseTrajectory)) == [
                ("done", 3, 0, 1, "", 3),
                ("done", 3, 1, 4, "", 2),
                ("done", 4, 0, 2, "", BUDGET),
                ("done", 4, 1, 2, "", 2),
            ]
            assert engine.rids == [rid(3, 0, 1)], "what has ended needs only its reward"
            assert not world.queue.of(OpenGroup)
            scored = sorted((prompt.text, prompt.data["n"], text) for prompt, text in world.rewards.scored)
            assert scored == [
                ("train 3:", 3, "abx"),
                ("train 3:", 3, "cd"),
                ("train 4:", 4, "ef"),
                ("train 4:", 4, "efghijklmn"),
            ]

    play(scene)


def test_a_parked_segment_ends_at_its_engine_and_says_how_far_it_came() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            engine.partial, engine.deaf = world.ids("abc"), 2
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            park = Park(group=0, member=1, segment=0)
            await world.queue.say(Park(group=0, member=0, segment=7), park, park)
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 1, 0, "parked", 3)
            assert set(engine.aborts) == {rid(0, 1, 0)}
            assert len(engine.aborts) == 3, "an abort that overtook its request is said again, and then no more"
            await world.queue.say(park, world.resume(1, "abc", member=1))
            await engine.nth(3)
            assert engine.open == {rid(0, 0, 0), rid(0, 1, 1)}
            assert len(world.queue.of(Interrupted)) == 1

    play(scene)


def test_parking_before_the_request_and_while_scoring() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            await world.queue.say(Admit(groups=[0]))
            await world.queue.nth(OpenGroup)
            await world.queue.say(Park(group=0, member=0, segment=0), usable(engine))
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 0, 0, "parked", 0)
            await engine.nth()
            world.rewards.may.clear()
            engine.finish(rid(0, 1, 0), world.ids("ab"))
            await engine.until(lambda: not engine.open)
            await world.rewards.asked(1)
            await world.queue.say(Park(group=0, member=1, segment=0), Park(group=8, member=1, segment=2))
            assert said(await world.queue.nth(Interrupted, 2)) == ("interrupted", 8, 1, 2, "parked", -1)
            world.rewards.may.set()
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 1, 0, "", 2)
            assert engine.rids == [rid(0, 1, 0)]
            assert not engine.aborts
            world.rewards.may.clear()
            await world.queue.say(world.resume(1, "abc", finish="stop"))
            await world.rewards.asked(2)
            await world.queue.say(Park(group=0, member=0, segment=1), Park(group=9, member=0, segment=0))
            await world.queue.nth(Interrupted, 3)
            world.rewards.may.set()
            assert said(await world.queue.nth(CloseTrajectory, 2)) == ("done", 0, 0, 1, "", 3)
            assert len(world.queue.of(Interrupted)) == 3

    play(scene)


def test_a_resume_ends_the_request_before_it_whose_answer_is_void() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth()
            again = world.resume(2, "ab")
            await world.queue.say(again)
            await engine.until(lambda: engine.aborts == [rid(0, 0, 0)] and engine.open == {rid(0, 0, 2)})
            await world.queue.say(again, world.resume(1, "a"), world.resume(0))
            engine.finish(rid(0, 0, 2), world.ids("cd"))
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 0, 2, "", 4)
            await world.queue.say(again, Admit(groups=[1]))
            await world.queue.nth(OpenGroup, 2)
            await engine.nth(3)
            assert engine.rids == [rid(0, 0, 0), rid(0, 0, 2), rid(1, 0, 0)], "each ran once, the newest only"
            assert [type(message) for message in world.queue.taken] == [OpenGroup, CloseTrajectory, OpenGroup]

    play(scene, group_size=1)


def test_a_cancelled_trajectory_ends_and_nothing_is_said_of_it() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            stop = Cancel(group=0, member=0, reason="deadline")
            await world.queue.say(stop, Cancel(group=1, member=0, reason="deadline"), world.resume(1, "a"))
            await engine.until(lambda: engine.aborts == [rid(0, 0, 0)] and engine.open == {rid(0, 1, 0)})
            await world.queue.say(Admit(groups=[1]))
            await engine.nth(3)
            engine.finish(rid(0, 1, 0), world.ids("a"))
            await world.queue.nth(CloseTrajectory)
            assert engine.open == {rid(1, 1, 0)}, "cancelled before it began"
            assert [type(message) for message in world.queue.taken] == [OpenGroup, OpenGroup, CloseTrajectory]

    play(scene)


def test_a_restarted_queue_gets_what_it_has_not_once_and_in_order() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine:
            world.greet(usable(engine), world.resume(1, "a"), admitted=[5])
            async with world.actor():
                await engine.nth()
                await world.queue.until(lambda: world.queue.of(OpenGroup))
                await engine.nth(2)
                world.queue.holding = True
                engine.finish(rid(0, 0, 1), world.ids("b"))
                engine.finish(rid(5, 0, 0), world.ids("cd"))
                await world.queue.say(Admit(groups=[6, 7]))
                await world.rewards.asked(2)
                assert len(world.queue.taken) == 1
                # the queue dies with all of that on its way, and tells again what it had told
                world.queue.holding = False
                world.greet(usable(engine), world.resume(1, "a"), world.resume(1, "a"), admitted=[6, 7, 8])
                await world.queue.restart()
                await world.queue.nth(OpenGroup, 4)
                await world.queue.nth(CloseTrajectory, 2)
                await engine.nth(5)
        assert [message.sequence for message in world.queue.taken] == list(range(6))
        assert [opening.group for opening in world.queue.of(OpenGroup)] == [5, 6, 7, 8]
        assert sorted(said(close) for close in world.queue.of(CloseTrajectory)) == [
            ("done", 0, 0, 1, "", 2),
            ("done", 5, 0, 0, "", 2),
        ]
        # requests have connections of their own: which of them the engine reads first is not ours to say
        assert sorted(engine.rids) == [rid(0, 0, 1), *(rid(group, 0, 0) for group in (5, 6, 7, 8))]

    play(scene, group_size=1)


def test_requests_go_on_while_the_queue_is_away() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            await world.queue.kill()
            for member in range(2):
                engine.finish(rid(0, member, 0), world.ids("ab"))
            await engine.until(lambda: not engine.open)
            await world.rewards.asked(2)
            world.greet()
            await world.queue.start()
            await world.queue.nth(CloseTrajectory, 2)

    play(scene)


def test_group_g_is_of_prompt_g_in_every_incarnation() -> None:
    async def scene(world: World) -> None:
        world.greet(admitted=[2, 0, 1])
        async with world.actor():
            await world.queue.nth(OpenGroup, 3)
        world.greet(admitted=[5, 3])
        async with world.actor(incarnation=2):
            await world.queue.nth(OpenGroup, 5)
            await world.queue.say(Admit(groups=[4, 9]))
            await world.queue.nth(OpenGroup, 7)
            await world.queue.say(Admit(groups=[1, 9]))
            await world.queue.nth(OpenGroup, 8)
        openings = world.queue.of(OpenGroup)
        assert [opening.group for opening in openings] == [0, 1, 2, 3, 5, 4, 9, 1]
        for opening in openings:
            assert unpack_problem(opening.problem).data == {"n": opening.group}

    play(scene)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (400, ("failed", 0, 0, 0, "engine_refused", 0)),
        (503, ("interrupted", 0, 0, 0, "engine_unreachable", -1)),
    ],
)
def test_an_engine_that_says_no(status: int, outcome: Any) -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            engine.status = status
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await world.queue.until(lambda: len(world.queue.taken) == 2)
            assert said(world.queue.taken[1]) == outcome

    play(scene, group_size=1)


def test_an_abort_that_nobody_asked_for_is_an_interruption() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine(lambda body: (world.ids("ab"), "abort")) as engine, world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 0, 0, "interrupted", 2)
            assert not world.rewards.scored

    play(scene, group_size=1)


def test_a_request_that_takes_too_long_fails_its_trajectory_and_is_aborted() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as engine, world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            assert said(await world.queue.nth(CloseTrajectory)) == ("failed", 0, 0, 0, "request_timeout", 0)
            await engine.until(lambda: engine.aborts == [rid(0, 0, 0)])

    play(scene, group_size=1, request_timeout_s=0.2)


def test_what_cannot_be_scored_or_understood_fails_by_name() -> None:
    async def scene(world: World) -> None:
        world.rewards.failure = RewardFailure("reward_raised", "oh")
        async with world.actor():
            await world.queue.say(world.resume(1, "ab", finish="stop"))
            assert said(await world.queue.nth(CloseTrajectory)) == ("failed", 0, 0, 1, "reward_raised", 0)
            bad = dataclasses.replace(world.resume(2, "ab", group=1), problem=b"\x01")
            await world.queue.say(bad)
            assert said(await world.queue.nth(CloseTrajectory, 2)) == ("failed", 1, 0, 2, "bad_problem", 0)

    play(scene)


def test_without_an_engine_all_wait_and_then_share_the_engines() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as first, FakeEngine() as second, world.actor():
            await world.queue.say(usable(), Admit(groups=[0]))
            await world.queue.nth(OpenGroup)
            await asyncio.sleep(RETRY)
            await world.queue.say(usable(first, second))
            await first.nth(3)
            await second.nth(3)

    play(scene, group_size=6)


def test_an_engine_that_takes_no_more_requests_ends_those_that_it_has() -> None:
    async def scene(world: World) -> None:
        async with FakeEngine() as old, FakeEngine() as new, world.actor():
            await world.queue.say(usable(old), Admit(groups=[0]))
            await old.nth()
            await world.queue.say(usable(new, incarnation=2), Admit(groups=[1]))
            await new.nth()
            old.finish(rid(0, 0, 0), world.ids("ab"))
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 0, 0, "", 2)
            await world.queue.say(Admit(groups=[2]))
            await new.nth(2)
            assert len(old.requests) == 1

    play(scene, group_size=1)


def test_connections_to_engines_that_are_gone_are_closed() -> None:
    async def scene() -> None:
        async with FakeEngine() as engine, EnginePool(5.0) as pool, asyncio.TaskGroup() as loops:
            running = loops.create_task(pool.run())
            await pool.update(usable(engine))
            client = await pool.pick()
            asking = asyncio.create_task(client.generate("a.", [1], {}))
            await engine.nth()
            for incarnation in range(2, 50):
                await pool.update(usable(engine, incarnation=incarnation))
                assert (await pool.pick()) is not client
                assert len(pool._open) == 2, "the one in use and the one with a request"
            await pool.abort(client, "a.")
            assert (await asking).finish == "abort"
            await pool.update(usable(engine, incarnation=50))
            assert len(pool._open) == 1
            await pool.abort(client, "a.")
            assert engine.aborts == ["a."]
            running.cancel()

    asyncio.run(scene())


def test_an_engine_is_asked_only_once_it_has_answered() -> None:
    """A restarted engine is known to the queue ten seconds before its HTTP server is up."""

    async def scene() -> None:
        async with FakeEngine() as engine, EnginePool(5.0) as pool, asyncio.TaskGroup() as loops:
            running = loops.create_task(pool.run())
            gone = Engines(names=["engine-1"], addresses=["http://127.0.0.1:1"], incarnations=[1])
            await pool.update(gone)
            picking = loops.create_task(pool.pick())
            await asyncio.sleep(0.2)
            assert not picking.done()
            both = usable(engine)
            await pool.update(
                Engines(
                    names=gone.names + both.names,
                    addresses=gone.addresses + both.addresses,
                    incarnations=gone.incarnations + both.incarnations,
                )
            )
            client = await picking
            assert client.address == both.addresses[0]
            await pool.doubt(client)
            assert (await pool.pick()) is client, "it answers again"
            running.cancel()

    asyncio.run(scene())
