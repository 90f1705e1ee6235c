"""Episodes when engines, their player or their actor end: what goes on and what is lost."""

import asyncio

import pytest
from actor_world import World, rid, said, usable
from episode_world import player, resume, scene_of, three_turns
from fake_engine import FakeEngine

from actors import rollout, segments
from actors.episodes import Episode, PlayerGone
from stream_rl.messages import (
    Admit,
    Appended,
    AppendTokens,
    CloseTrajectory,
    Interrupted,
    OpenGroup,
)


@pytest.fixture(autouse=True)
def many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of these worlds has many turns; its player is the test's."""
    monkeypatch.setattr(rollout, "plays", lambda task: True)


def test_an_interrupted_turn_goes_on_and_its_player_sees_nothing_of_it() -> None:
    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            engine.finish(rid(0, 0, 2), world.ids("cd"), "abort")
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 0, 2, "interrupted", 2)
            # its stream had brought one token only
            again = resume(world, 3, ["one:", "ab", "two:", "c"])
            await world.queue.say(again, Appended(group=0, member=0, segment=2), again)
            assert (await engine.nth(3))["input_ids"] == world.ids("one:abtwo:c")
            assert engine.requests[2]["sampling_params"]["max_new_tokens"] == 40 - 3
            engine.finish(rid(0, 0, 3), world.ids("ef"))
            await engine.nth(4)
            assert world.queue.of(AppendTokens)[2].num_sampled == 5
            engine.finish(rid(0, 0, 4), world.ids("g"))
            close = await world.queue.nth(CloseTrajectory)
        assert (close.reward, said(close)) == (6.0, ("done", 0, 0, 4, "", 6))
        assert len(player(world).played) == 1

    scene_of(three_turns, scene, ["ab"])


def test_an_append_that_came_too_late_is_said_again() -> None:
    """The engine was lost before the queue had its segment's end, and all of its tokens; or the append, and then it."""

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await world.queue.nth(AppendTokens)
            await world.queue.say(Appended(group=0, member=0, segment=1))
            await world.queue.nth(AppendTokens, 2)
            await world.queue.say(resume(world, 2, ["one:", "ab"], "stop"))
            again = await world.queue.nth(AppendTokens, 3)
            assert (again.segment, again.num_sampled, again.token_ids.tolist()) == (2, 2, world.ids("two:"))
            await world.queue.say(resume(world, 3, ["one:", "ab", "two:"]))
            assert (await engine.nth(2))["rid"] == rid(0, 0, 3)
            assert engine.requests[1]["input_ids"] == world.ids("one:abtwo:")

    scene_of(three_turns, scene, ["ab"], appended=False)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_player_that_was_shown_what_the_queue_does_not_hold_begins_again(thinking: bool) -> None:
    """Its engine died when it had answered and had not streamed."""
    hold = asyncio.Event()

    async def script(world: World, episode: Episode) -> float:
        branch, first = await episode.turn(None, world.ids("one:"))
        branch, second = await episode.turn(branch, world.ids("two:"))
        if len(player(world).played) == 1 and thinking:
            hold.set()
            await asyncio.sleep(1000)
        _, third = await episode.turn(branch, world.ids("three:"))
        return float(len(first.token_ids + second.token_ids + third.token_ids))

    async def scene(world: World, engine: FakeEngine) -> None:
        hold.clear()
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            if thinking:
                await hold.wait()
            else:
                await engine.nth(3)
            await world.queue.say(resume(world, 5, ["one:", "ab", "two:", "c"]))
            await engine.until(lambda: rid(0, 0, 5) in engine.open)
            assert engine.requests[-1]["input_ids"] == world.ids("one:abtwo:c")
            engine.finish(rid(0, 0, 5), world.ids("xyz"))
            await engine.until(lambda: rid(0, 0, 6) in engine.open)
            engine.finish(rid(0, 0, 6), world.ids("!"))
            close = await world.queue.nth(CloseTrajectory)
        assert (close.reward, said(close)) == (7.0, ("done", 0, 0, 6, "", 7))
        assert len(player(world).played) == 2
        assert world.counts["rebuilt"] == 1

    scene_of(script, scene, ["ab", "cd"])


def test_a_fresh_actor_plays_the_past_from_the_queue_s_tokens() -> None:
    async def scene(world: World, engine: FakeEngine) -> None:
        world.greet(usable(engine), resume(world, 7, ["one:", "ab", "two:", "c", "three:", "d"]))
        async with world.actor(incarnation=2):
            close = await world.queue.nth(CloseTrajectory)
        assert engine.rids == [rid(0, 0, 7)]
        assert engine.requests[0]["input_ids"] == world.ids("one:abtwo:cthree:d")
        assert not world.queue.of(AppendTokens) and not world.queue.of(OpenGroup)
        assert (close.reward, said(close)) == (6.0, ("done", 0, 0, 7, "", 6))

    scene_of(three_turns, scene, ["ef"])


@pytest.mark.parametrize(
    "texts",
    [
        ["one:", "ab", "too:", "c"],
        ["one", "ab"],
        ["one:!", "ab"],
        ["one:", "ab", "two:three", "c"],
        ["one:", "ab", "tw"],
        ["o"],
    ],
)
def test_a_past_that_is_not_said_again_word_for_word_is_lost(texts: list[str]) -> None:
    async def scene(world: World, engine: FakeEngine) -> None:
        world.greet(usable(engine), resume(world, 7, texts))
        async with world.actor(incarnation=2):
            close = await world.queue.nth(CloseTrajectory)
        assert said(close) == ("failed", 0, 0, 7, "environment_lost", 0)
        assert len(world.queue.of(CloseTrajectory)) == 1
        assert not engine.requests and not len(world.episodes)

    scene_of(three_turns, scene)


def test_what_has_ended_in_the_queue_needs_no_engine() -> None:
    async def scene(world: World, engine: FakeEngine) -> None:
        world.greet(resume(world, 4, ["one:", "ab", "two:", "c", "three:", "d"], "length"))
        async with world.actor(incarnation=2):
            close = await world.queue.nth(CloseTrajectory)
        assert (close.reward, said(close)) == (4.0, ("done", 0, 0, 4, "", 4))

    scene_of(three_turns, scene)


@pytest.mark.parametrize("first", ["trunk", "branch"])
def test_a_branch_does_not_survive_its_actor_and_takes_its_episode_along(first: str) -> None:
    async def scene(world: World, engine: FakeEngine) -> None:
        trunk = resume(world, 4, ["one:", "ab"], "stop", forked=True)
        branch = resume(world, 2, ["sub:", "cd"], member=1, episode=0, forked=True)
        world.greet(*([trunk, branch] if first == "trunk" else [branch, trunk]))
        async with world.actor(incarnation=2):
            await world.queue.nth(CloseTrajectory, 2)
        assert sorted(said(close) for close in world.queue.of(CloseTrajectory)) == [
            ("failed", 0, 0, 4, "environment_lost", 0),
            ("failed", 0, 1, 2, "environment_lost", 0),
        ]
        assert not engine.requests

    scene_of(three_turns, scene)


def test_an_episode_that_was_played_at_the_endpoint_is_not_begun_again() -> None:
    async def script(world: World, episode: Episode) -> float:
        assert world.episodes.by_key(episode.key) is episode
        assert world.episodes.by_key("wrong") is None
        return await three_turns(world, episode)

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            await world.queue.say(resume(world, 5, ["one:", "a"]))
            close = await world.queue.nth(CloseTrajectory)
            assert said(close) == ("failed", 0, 0, 5, "environment_lost", 0)
            await engine.until(lambda: not engine.open)

    scene_of(script, scene, ["ab"])


def test_the_reward_so_far_is_that_of_the_course_that_the_queue_holds() -> None:
    async def script(world: World, episode: Episode) -> float:
        if len(player(world).played) == 1:
            await episode.turn(None, world.ids("one:"))
            episode.reward_so_far = 1.0
            raise PlayerGone("environment_died")
        await asyncio.sleep(1000)
        raise AssertionError

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            close = await world.queue.nth(CloseTrajectory)
        assert said(close)[0] == "failed" and close.reason == "deadline"

    scene_of(script, scene, ["ab"], agent={"deadline_s": 1.0})


def test_an_episode_that_ends_just_after_its_engine_does_not_say_that_nothing_was_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = asyncio.Event()

    async def script(world: World, episode: Episode) -> float:
        abandoned = asyncio.ensure_future(episode.turn(None, world.ids("one:")))
        await gone.wait()
        abandoned.cancel()
        return 1.0

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth()
            monkeypatch.setattr(segments, "UNREACHABLE_BACKOFF_SECONDS", 1.0)
            await engine.kill()
            await asyncio.sleep(0.2)
            assert world.counts["interrupted.engine_unreachable"] and not world.queue.of(Interrupted)
            gone.set()
            lost = await world.queue.nth(Interrupted)
            assert said(lost) == ("interrupted", 0, 0, 1, "engine_unreachable", -1)
            assert not world.queue.of(CloseTrajectory)
            await world.queue.say(resume(world, 2, ["one:", "abc"]))
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 0, 2, "", 3)

    scene_of(script, scene)


def test_a_player_that_has_died_is_played_again_in_mid_turn() -> None:
    async def script(world: World, episode: Episode) -> float:
        branch, _ = await episode.turn(None, world.ids("one:"))
        if len(player(world).played) < 3:
            ask = asyncio.ensure_future(episode.turn(branch, world.ids("two:")))
            await asyncio.sleep(0.05)
            ask.cancel()
            raise PlayerGone("environment_died")
        _, sampled = await episode.turn(branch, world.ids("two:"))
        return float(len(sampled.token_ids))

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            await asyncio.sleep(0.3)
            engine.finish(rid(0, 0, 2), world.ids("xyz"))
            close = await world.queue.nth(CloseTrajectory)
        assert (close.reward, said(close)) == (3.0, ("done", 0, 0, 2, "", 5))
        assert len(engine.requests) == 2

    scene_of(script, scene, ["ab"])
