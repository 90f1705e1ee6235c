"""Episodes of many turns: what they append and sample, and how they end."""

import asyncio

import pytest
from actor_world import World, rid, said, usable
from episode_world import player, resume, scene_of, three_turns
from fake_engine import FakeEngine

from actors import engine_pool, rollout
from actors.engine_pool import EnginePool
from actors.episodes import Branch, ContextFull, Episode, EpisodeEnded, Sampled
from stream_rl import session
from stream_rl.episode import EpisodeFailed
from stream_rl.errors import StreamRLError
from stream_rl.messages import (
    Admit,
    AppendTokens,
    Cancel,
    CloseTrajectory,
    Engines,
    Evaluated,
    Interrupted,
    OpenBranch,
    OpenGroup,
    Park,
)
from stream_rl.types import Finish


@pytest.fixture(autouse=True)
def many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of these worlds has many turns; its player is the test's."""
    monkeypatch.setattr(rollout, "plays", lambda task: True)


def test_turns_and_observations_are_one_sequence() -> None:
    branches: list[Branch] = []

    async def script(world: World, episode: Episode) -> float:
        letters = await three_turns(world, episode)
        branches.extend(episode.branches)
        assert world.episodes.by_key(episode.key) is episode
        return letters

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            close = await world.queue.nth(CloseTrajectory)
        assert (close.reward, said(close)) == (6.0, ("done", 0, 0, 3, "", 6))
        assert not world.queue.of(OpenGroup)[0].prompt_ids.size
        appended = [(a.segment, a.num_sampled, a.token_ids.tolist()) for a in world.queue.of(AppendTokens)]
        assert appended == [(0, 0, world.ids("one:")), (1, 2, world.ids("two:")), (2, 3, world.ids("three:"))]
        assert engine.rids == [rid(0, 0, segment) for segment in (1, 2, 3)]
        assert engine.requests[-1]["input_ids"] == world.ids("one:abtwo:cthree:")
        assert [body["sampling_params"]["max_new_tokens"] for body in engine.requests] == [40, 38, 37]
        (branch,) = branches
        assert branch.token_ids == world.ids("one:abtwo:cthree:def")
        assert branch.turns == [(4, 6), (10, 11), (17, 20)]
        assert branch.sampled == [flag for n, m in ((4, 2), (4, 1), (6, 3)) for flag in [False] * n + [True] * m]
        assert not len(world.episodes)

    scene_of(script, scene, ["ab", "c", "def"])


def test_branches_are_trajectories_of_their_group_and_turn_in_parallel() -> None:
    async def script(world: World, episode: Episode) -> float:
        trunk, _ = await episode.turn(None, world.ids("one:"))
        (left, _), (right, _), _ = await asyncio.gather(
            episode.turn(None, world.ids("left:")),
            episode.turn(None, world.ids("right:")),
            episode.turn(trunk, world.ids("two:")),
        )
        assert {left.member, right.member} != {trunk.member}
        assert episode.branches[0] is trunk and set(episode.branches) == {trunk, left, right}
        await episode.turn(left, world.ids("more:"))
        return 0.5

    async def scene(world: World, engine: FakeEngine) -> None:
        engine.answer = lambda body: (world.ids("ab"), "stop")
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await world.queue.nth(CloseTrajectory, 6)
        opened = world.queue.of(OpenBranch)
        assert sorted(branch.member for branch in opened) == [2, 3, 4, 5], "numbered over the whole group"
        assert [branch.member for branch in opened] == sorted(branch.member for branch in opened), "in this order"
        assert sorted(branch.episode for branch in opened) == [0, 0, 1, 1]
        closes = {close.member: close for close in world.queue.of(CloseTrajectory)}
        assert {(close.status, close.reward) for close in closes.values()} == {("done", 0.5)}
        for branch in opened:
            left = branch.prompt_ids.tolist() == world.ids("left:")
            assert (closes[branch.member].num_sampled, closes[branch.member].segment) == ((4, 1) if left else (2, 0))
            first = next(body for body in engine.requests if body["rid"] == rid(0, branch.member, 0))
            assert first["input_ids"] == branch.prompt_ids.tolist()

    scene_of(script, scene, group_size=2)


def test_who_goes_away_while_a_branch_is_opened_leaves_no_hole_in_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(world: World, episode: Episode) -> float:
        await episode.turn(None, world.ids("one:"))
        world.queue.holding = True
        monkeypatch.setattr(session, "MAX_UNACKNOWLEDGED", 1)
        left, gone = (asyncio.ensure_future(episode.turn(None, world.ids(text))) for text in ("left:", "gone:"))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        world.queue.holding = False
        await left
        await episode.turn(None, world.ids("right:"))
        return 1.0

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await world.queue.nth(CloseTrajectory, 4)
        assert [branch.member for branch in world.queue.of(OpenBranch)] == [1, 2, 3]
        reasons = {close.member: close.reason for close in world.queue.of(CloseTrajectory)}
        assert reasons == {0: "", 1: "", 2: "nothing_sampled", 3: ""}

    scene_of(script, scene, ["ab", "cd", "ef"])


def test_a_turn_under_way_when_its_episode_ends_is_cut_and_trained() -> None:
    async def script(world: World, episode: Episode) -> float:
        await episode.turn(None, world.ids("one:"))
        abandoned = asyncio.ensure_future(episode.turn(None, world.ids("sub:")))
        await started.wait()
        abandoned.cancel()
        return 1.0

    started = asyncio.Event()

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            engine.partial = world.ids("xyz")
            started.set()
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 1, 0, "cut", 3)
            assert not world.queue.of(CloseTrajectory)
            await world.queue.say(resume(world, 1, ["sub:", "xy"], member=1, episode=0))
            await world.queue.nth(CloseTrajectory, 2)
        assert [said(close) for close in world.queue.of(CloseTrajectory)] == [
            ("done", 0, 0, 1, "", 2),
            ("done", 0, 1, 1, "", 2),
        ]
        assert len(engine.requests) == 2

    scene_of(script, scene, ["ab"])


def test_a_caller_that_goes_away_and_asks_again_gets_the_same_turn() -> None:
    async def script(world: World, episode: Episode) -> float:
        ask = asyncio.ensure_future(episode.turn(None, world.ids("one:")))
        await asked.wait()
        ask.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ask
        gone.set()
        branch, sampled = await episode.turn(episode.branches[0], world.ids("one:"))
        assert sampled == Sampled(world.ids("ab"), [-token / 8 for token in world.ids("ab")], Finish.STOP)
        gone.clear()
        ask = asyncio.ensure_future(episode.turn(branch, world.ids("two:")))
        await asyncio.sleep(0)
        with pytest.raises(StreamRLError, match="is in a turn"):
            await episode.turn(branch, world.ids("two:"))
        assert (await ask)[1].token_ids == world.ids("cd")
        return 1.0

    asked, gone = asyncio.Event(), asyncio.Event()

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth()
            asked.set()
            await gone.wait()
            await asyncio.sleep(0.05)
            engine.finish(rid(0, 0, 1), world.ids("ab"))
            await engine.nth(2)
            engine.finish(rid(0, 0, 2), world.ids("cd"))
            close = await world.queue.nth(CloseTrajectory)
        assert said(close) == ("done", 0, 0, 2, "", 4)

    scene_of(script, scene)


def test_what_does_not_fit_and_too_many_turns_are_refused_and_harm_nothing() -> None:
    async def script(world: World, episode: Episode) -> float:
        with pytest.raises(EpisodeFailed, match="empty_prompt"):
            await episode.turn(None, [])
        with pytest.raises(ContextFull):
            await episode.turn(None, world.ids("x") * 30)
        branch, _ = await episode.turn(None, world.ids("one:"))
        assert branch is episode.trunk, "the refused prompt began nothing"
        with pytest.raises(ContextFull, match="30 at most"):
            await episode.turn(branch, world.ids("x") * 26)
        with pytest.raises(ContextFull):
            await episode.turn(None, world.ids("x") * 30)
        with pytest.raises(EpisodeFailed, match="empty_observation"):
            await episode.turn(branch, [])
        await episode.turn(branch, world.ids("x") * 20, max_new_tokens=3, stop=["!"])
        with pytest.raises(EpisodeEnded, match="max_turns"):
            await episode.turn(branch, world.ids("x"))
        assert episode.branches == [branch]
        return 1.0

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 0, 2, "", 4)
        assert [body["sampling_params"]["max_new_tokens"] for body in engine.requests] == [6, 3]
        assert engine.requests[1]["sampling_params"]["stop"] == ["!"]
        assert len(world.queue.of(AppendTokens)) == 2

    agent = {"max_context_tokens": 30, "max_turn_tokens": 6, "max_turns": 2}
    scene_of(script, scene, ["ab", "cd"], agent=agent)


def test_the_budget_of_a_trajectory_ends_its_turns() -> None:
    async def script(world: World, episode: Episode) -> float:
        branch, sampled = await episode.turn(None, world.ids("one:"))
        assert sampled.finish is Finish.LENGTH
        with pytest.raises(ContextFull):
            await episode.turn(branch, world.ids("two:"))
        return 1.0

    async def scene(world: World, engine: FakeEngine) -> None:
        # all of its tokens were there when its engine was lost
        world.greet(usable(engine), resume(world, 3, ["one:", "abcd"]))
        async with world.actor(incarnation=2):
            assert said(await world.queue.nth(CloseTrajectory)) == ("done", 0, 0, 3, "", 4)
        assert not engine.requests

    scene_of(script, scene, max_new_tokens=4)


def test_a_cancelled_episode_ends_in_silence_and_a_cancelled_branch_alone() -> None:
    heard: list[str] = []

    async def script(world: World, episode: Episode) -> float:
        trunk, _ = await episode.turn(None, world.ids("one:"))
        with pytest.raises(EpisodeEnded) as ended:
            await episode.turn(None, world.ids("sub:"))
        heard.append(ended.value.reason)
        await episode.turn(trunk, world.ids("two:"))
        await asyncio.sleep(1000)
        return 0.0

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            await world.queue.say(Cancel(group=0, member=1, reason="deadline"))
            await engine.nth(3)
            assert (heard, engine.aborts) == (["cancelled"], [rid(0, 1, 0)])
            await world.queue.say(Cancel(group=0, member=0, reason="deadline"))
            await engine.until(lambda: not engine.open)
            assert not len(world.episodes) and player(world).played[0].ended == "cancelled"
            await world.queue.say(Admit(groups=[1]))
            await world.queue.nth(OpenGroup, 2)
            assert not world.queue.of(CloseTrajectory)

    scene_of(script, scene, ["ab"])


def test_parking_in_a_turn_and_between_turns() -> None:
    may = asyncio.Event()

    async def script(world: World, episode: Episode) -> float:
        await may.wait()
        return await three_turns(world, episode)

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await world.queue.nth(OpenGroup)
            park = Park(group=0, member=0, segment=0)
            await world.queue.say(park, park)
            assert said(await world.queue.nth(Interrupted)) == ("interrupted", 0, 0, 0, "parked", 0)
            may.set()
            await asyncio.sleep(0.1)
            assert not world.queue.of(AppendTokens), "it rests"
            await world.queue.say(resume(world, 1, []))
            assert (await world.queue.nth(AppendTokens)).segment == 1
            await engine.nth()
            engine.partial = world.ids("ab")
            await world.queue.say(Park(group=0, member=0, segment=2))
            assert said(await world.queue.nth(Interrupted, 2)) == ("interrupted", 0, 0, 2, "parked", 2)
            await world.queue.say(resume(world, 3, ["one:", "ab"]))
            await engine.nth(2)
            engine.finish(rid(0, 0, 3), world.ids("c"))
            await engine.nth(3)
            assert engine.rids == [rid(0, 0, 2), rid(0, 0, 3), rid(0, 0, 4)]
            assert len(world.queue.of(Interrupted)) == 2

    scene_of(script, scene)


def test_the_next_turn_goes_where_the_prefix_is() -> None:
    async def script(world: World, episode: Episode) -> float:
        branch, _ = await episode.turn(None, world.ids("one:"))
        await may.wait()
        await episode.turn(branch, world.ids("two:"))
        return 1.0

    may = asyncio.Event()

    async def scene(world: World, engine: FakeEngine) -> None:
        async with FakeEngine(lambda body: (world.ids("ab"), "stop")) as other, world.actor():
            await world.queue.say(usable(engine, other), Admit(groups=[0, 1, 2]))
            await world.queue.until(lambda: len(engine.requests) + len(other.requests) == 3)
            engine.answer = lambda body: (world.ids("ab"), "stop")
            may.set()
            await world.queue.nth(CloseTrajectory, 3)
            for one in (engine, other):
                firsts = {body["rid"].rsplit("/", 1)[0] for body in one.requests if body["rid"].endswith("/1.")}
                seconds = {body["rid"].rsplit("/", 1)[0] for body in one.requests if body["rid"].endswith("/2.")}
                assert firsts == seconds

    scene_of(script, scene, ["ab"] * 3)


def test_held_out_episodes_have_turns_too_and_one_that_fails_counts_as_nothing() -> None:
    async def script(world: World, episode: Episode) -> float:
        if episode.prompt.data["n"] == 1:
            raise EpisodeFailed("no_room")
        branch, _ = await episode.turn(None, world.ids("one:"))
        sub, _ = await episode.turn(None, world.ids("sub:"))
        await asyncio.gather(episode.turn(sub, world.ids("x")), episode.turn(branch, world.ids("two:")))
        assert branch.token_ids == world.ids("one:abtwo:ab")
        return 0.5

    async def scene(world: World, engine: FakeEngine) -> None:
        engine.answer = lambda body: (world.ids("ab"), "stop")
        world.greet(usable(engine), evaluated=[])
        async with world.actor():
            assert (await world.queue.nth(Evaluated)).rewards.tolist() == [0.5, 0.0, 0.5]
        assert len(set(engine.rids)) == len(engine.rids) == 8
        assert all(name.startswith("eval-") for name in engine.rids)
        assert not len(world.episodes)

    scene_of(script, scene, heldout_prompts=3)


def test_an_overloaded_engine_is_passed_by_and_a_drained_one_too() -> None:
    async def scene() -> None:
        async with FakeEngine() as one, FakeEngine() as other, EnginePool(5.0) as pool, asyncio.TaskGroup() as loops:
            running = loops.create_task(pool.run())
            await pool.update(usable(one, other))
            preferred, free = [client for _, client in sorted(pool._open.items())]
            async with pool._changed:
                await pool._changed.wait_for(lambda: len(pool._trusted) == 2)
            for fewest in (0, 5):
                free.in_flight, preferred.in_flight = fewest, 2 * fewest + engine_pool.OVERLOAD
                assert await pool.pick(preferred) is preferred
                preferred.in_flight += 1
                assert await pool.pick(preferred) is free
            free.in_flight = preferred.in_flight = 0
            await pool.update(Engines(names=["engine-1"], addresses=[other.address], incarnations=[1]))
            assert await pool.pick(preferred) is free
            running.cancel()

    asyncio.run(scene())
