"""Episodes whose environment process has died: they wait for a fresh one, and none of them is forgotten."""

import pytest
from environment_world import DIE, World, play

from actors import episodes


async def lose_the_process(world: World) -> int:
    """Groups 0, 1 and 2 wait for a fresh process, in this order.  Its gate, when it loads the task."""
    for _ in range(3):
        world.begin()
    await world.asked(0, 1, 2)
    world.close_gate()
    world.say(0, DIE)
    gate = await world.loading()
    world.say(1, "ab")
    world.say(2, "ab")
    await world.waiting(0, 1, 2)
    return gate


def test_who_waits_for_a_fresh_process_begins_there_and_others_run_meanwhile() -> None:
    async def scene(world: World) -> None:
        for _ in range(4):
            world.begin()  # in the one process and the other, by turns
        await world.asked(0, 1, 2, 3)
        world.close_gate()
        world.say(0, DIE)  # and group 2 loses its process in mid-turn
        gate = await world.loading()
        for group in (1, 2, 3):
            world.say(group, "ab")
        await world.waiting(0, 2)
        await world.asked(1, 3)
        world.say(1, "cd")
        world.say(3, "cd")
        await world.ended(1, 3)
        world.open_gate(gate)
        await world.asked(0, 2)
        world.say(0, "cd")
        world.say(2, "cd")
        await world.ended(0, 1, 2, 3)
        *first, fresh = world.log("loads")
        assert len(first) == 2, "one fresh process for both"
        assert world.course.ends[0] == (5.0, {"process": fresh})
        assert world.course.ends[2] == (4.0, {"process": fresh})
        assert len(world.course.turns) == 8, "nothing is sampled twice"

    play(scene, processes=2)


def test_a_fresh_process_that_ends_while_it_loads_costs_only_the_episode_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is its end a death that counts against who waited for it."""
    monkeypatch.setattr(episodes, "MAX_DEATHS", 1)

    async def scene(world: World) -> None:
        world.open_gate(await lose_the_process(world), DIE)
        await world.ended(0)
        world.open_gate(await world.loading())
        await world.asked(1, 2)
        world.say(1, "cd")
        world.say(2, "cd")
        await world.ended(0, 1, 2)
        assert world.course.ends[0] == "environment_died"
        fresh = world.log("loads")[-1]
        assert world.course.ends[1] == world.course.ends[2] == (4.0, {"process": fresh})
        assert sorted(world.log("plays")) == [0, 1, 1, 2, 2], "each is begun once in the fresh one"

    play(scene)


@pytest.mark.parametrize("late", [0, 1], ids=["who starts it", "who waits behind"])
def test_a_deadline_counts_while_an_episode_waits_for_a_fresh_process(late: int) -> None:
    async def scene(world: World) -> None:
        for _ in range(3):
            world.begin()
        await world.asked(0, 1, 2)
        world.close_gate()
        episode = world.episodes[late]
        episode._deadline = episode._loop.time() + 1.0  # for what is behind its process's death
        world.say(0, DIE)
        await world.until(world.environments._hosts[0]._starting.locked)
        world.say(1, "ab")
        world.say(2, "ab")
        await world.ended(late)  # the gate is closed
        assert world.course.ends[late] == "deadline"
        world.open_gate(await world.loading())
        others = [group for group in range(3) if group != late]
        await world.asked(*others)
        for group in others:
            world.say(group, "cd")
        await world.ended(0, 1, 2)
        fresh = world.log("loads")[-1]
        assert all(world.course.ends[group][1] == {"process": fresh} for group in others)
        assert sorted(world.log("plays")) == sorted([0, 1, 2, *others])

    play(scene)


def test_the_wait_for_a_fresh_process_is_not_taken_for_silence() -> None:
    async def scene(world: World) -> None:
        gate = await lose_the_process(world)
        for episode in world.episodes:
            episode._active_at -= 1e6  # as if they had waited for so long
        world.open_gate(gate)
        await world.until(lambda: world.course.ends or world.asking == [0, 1, 2])
        assert not world.course.ends

    play(scene)
