"""Who asks for a turn of an episode that has ended, and whose turns an episode's end leaves alone."""

import asyncio
from typing import Any

import pytest
from actor_world import World, rid, said, usable
from episode_world import player, resume, scene_of
from fake_engine import FakeEngine

from actors import rollout
from actors.episodes import Episode, EpisodeEnded
from stream_rl.messages import Admit, AppendTokens, Cancel, CloseTrajectory, Interrupted, OpenBranch, OpenGroup


@pytest.fixture(autouse=True)
def many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of these worlds has many turns; its player is the test's."""
    monkeypatch.setattr(rollout, "plays", lambda task: True)


def test_who_is_late_hears_that_the_episode_has_ended_and_nothing_more_is_said_of_it() -> None:
    started = asyncio.Event()
    behind: list[asyncio.Future[Any]] = []

    async def script(world: World, episode: Episode) -> float:
        await episode.turn(None, world.ids("one:"))
        abandoned = asyncio.ensure_future(episode.turn(None, world.ids("sub:")))
        await started.wait()
        abandoned.cancel()
        await asyncio.wait([abandoned])
        behind.append(asyncio.ensure_future(episode.turn(episode.branches[1], world.ids("more:"))))
        await asyncio.sleep(0)  # it waits for the turn under way
        return 1.0

    async def refused(world: World, episode: Episode) -> None:
        for branch in (None, *episode.branches):
            with pytest.raises(EpisodeEnded, match="done"):
                await episode.turn(branch, world.ids("late:"))

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0]))
            await engine.nth(2)
            [episode] = player(world).played
            engine.partial = world.ids("xy")
            started.set()
            await world.queue.nth(Interrupted)
            await refused(world, episode)  # its last turn is not over yet
            await world.queue.say(resume(world, 1, ["sub:", "xy"], member=1, episode=0))
            await world.queue.nth(CloseTrajectory, 2)
            with pytest.raises(EpisodeEnded, match="done"):
                await behind[0]
            await refused(world, episode)
            await world.queue.say(Admit(groups=[1]))
            await world.queue.nth(OpenGroup, 2)  # and with it all that was said before
        assert [said(close) for close in world.queue.of(CloseTrajectory)] == [
            ("done", 0, 0, 1, "", 2),
            ("done", 0, 1, 1, "", 2),
        ]
        assert [a.token_ids.tolist() for a in world.queue.of(AppendTokens) if not a.group] == [world.ids("one:")]
        assert len(world.queue.of(OpenBranch)) == 1
        assert [name for name in engine.rids if name.startswith("r/0/")] == [rid(0, 0, 1), rid(0, 1, 0)]

    scene_of(script, scene, ["ab"])


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_one_that_is_cancelled_or_late_leaves_the_turns_of_others_alone(reason: str) -> None:
    """Those of its group, too."""
    is_over = asyncio.Event()

    async def late(turn: asyncio.Task[Any]) -> None:
        await is_over.wait()
        turn.cancel()
        raise EpisodeEnded("deadline")  # as an episode does when its time is up

    async def script(world: World, episode: Episode) -> float:
        ask = asyncio.ensure_future(episode.turn(None, world.ids("one:")))
        if (episode.group, episode.member) == (0, 1):
            await late(ask)
        branch, first = await ask
        _, second = await episode.turn(branch, world.ids("two:"))
        return float(len(first.token_ids + second.token_ids))

    async def scene(world: World, engine: FakeEngine) -> None:
        async with world.actor():
            await world.queue.say(usable(engine), Admit(groups=[0, 1]))
            await engine.nth(4)
            victim, others = rid(0, 1, 1), [(0, 0), (1, 0), (1, 1)]
            if reason == "cancelled":
                await world.queue.say(Cancel(group=0, member=1, reason="deadline"))
            else:
                is_over.set()
            await engine.until(lambda: victim not in engine.open)
            assert engine.open == {rid(*key, 1) for key in others}
            for key in others:
                engine.finish(rid(*key, 1), world.ids("ab"))
            await engine.until(lambda: engine.open == {rid(*key, 2) for key in others})
            for key in others:
                engine.finish(rid(*key, 2), world.ids("cd"))
            await world.queue.until(lambda: sum(c.status == "done" for c in world.queue.of(CloseTrajectory)) == 3)
        closes = sorted(said(close) for close in world.queue.of(CloseTrajectory))
        failed = [] if reason == "cancelled" else [("failed", 0, 1, 1, "deadline", 0)]
        assert closes == [("done", *key, 2, "", 4) for key in others] + failed
        assert engine.aborts == [victim]

    scene_of(script, scene, group_size=2)
