"""Episodes that share an environment process: one that ends before its time ends alone."""

import dataclasses

import pytest
from environment_world import World, play


@pytest.mark.parametrize("sleeps", [True, False], ids=["in its own code", "in a turn"])
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_one_that_is_cancelled_or_late_leaves_its_neighbours_their_process_and_turns(reason: str, sleeps: bool) -> None:
    async def scene(world: World) -> None:
        await two_neighbours(world)
        victim = world.begin(sleeps=sleeps, deadline_s=0.1 if reason == "deadline" else None)
        if reason == "cancelled":
            await world.until(lambda: 2 in world.log("plays") if sleeps else 2 in world.asking)
            victim.end(reason)
        await world.until(lambda: victim.ended == reason)
        await neighbours_go_on(world)
        assert world.log("cancelled") == [2] or reason == "deadline", "a late one need not have begun"

    play(scene)


def test_one_that_hangs_leaves_its_neighbours_their_process_and_turns() -> None:
    async def scene(world: World) -> None:
        await two_neighbours(world)
        patient = world.environments._agent
        world.environments._agent = dataclasses.replace(patient, turn_gap_s=0.05)
        victim = world.begin(sleeps=True)
        await world.until(lambda: victim.ended == "environment_hung")
        world.environments._agent = patient
        await neighbours_go_on(world)

    play(scene)


async def two_neighbours(world: World) -> None:
    """Groups 0 and 1, in mid-turn."""
    world.begin()
    world.begin()
    await world.asked(0, 1)


async def neighbours_go_on(world: World) -> None:
    """In the process that they began in, which is there for a further episode, too."""
    [host] = world.environments._hosts
    await world.until(lambda: len(host.frames) == 2 and not host._leaving)  # or it would be taken for hung later
    world.begin()
    await world.asked(0, 1, 3)
    for group in (0, 1, 3):
        world.say(group, "ab")
    await world.asked(0, 1, 3)
    for group in (0, 1, 3):
        world.say(group, "cd")
    await world.until(lambda: {0, 1, 3} <= world.course.ends.keys())
    [process] = world.log("loads")
    assert [world.course.ends[group] for group in (0, 1, 3)] == [(4.0, {"process": process})] * 3
    assert not set(world.log("cancelled")) - {2}
