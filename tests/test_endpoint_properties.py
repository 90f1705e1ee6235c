"""Any tree of conversations: the model sees what each request says, and what it said is sampled once and kept once."""

import random
from typing import Any

import pytest
from endpoint_world import END_ID, LIMITS, World, play

from actors.sampling import Limits

TURNS = 40


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_of_conversations(seed: int) -> None:
    """Continued at their ends, forked where turns ended or within, edited, asked again, with and without a system."""
    chance = random.Random(seed)
    asked: list[list[dict[str, Any]]] = []

    async def scene(world: World) -> None:
        http = await world.http((episode := world.episode()).key)
        number = iter(range(1000))
        # few words, so that what is said is often the same, and sometimes cut before its end
        world.course.say = lambda before: world.ids(
            chance.choice(["yes", "no", " no\n", "", f"{next(number)}"]), ended=chance.random() < 0.8
        )
        known: list[list[dict[str, Any]]] = [[]]
        for _ in range(TURNS):
            messages = list(chance.choice(known[-4:]))
            match chance.randrange(6):
                case 0:
                    messages = messages[: chance.randrange(len(messages) + 1)]
                case 1 if messages:
                    where = chance.randrange(len(messages))
                    messages[where] = messages[where] | {"content": "edited"}
                case 2 if messages and messages[-1]["role"] == "user":
                    pass  # again
                case 3 if not messages:
                    messages = [{"role": "system", "content": "be short"}]
            if not messages or messages[-1]["role"] != "user":
                messages = [*messages, {"role": "user", "content": chance.choice("ab")}]
            before = len(world.course.turns)
            answer = await http.post("/v1/chat/completions", json={"model": "m", "messages": messages})
            assert answer.status_code == 200, answer.text
            assert len(world.course.turns) == before + 1
            _, context, _ = world.course.turns[-1]
            rendered = world.chat._template.render(messages)
            assert squeezed(world.text(context)) == squeezed(rendered)
            known += [messages, [*messages, answer.json()["choices"][0]["message"]]]
            asked.append(messages)
        for branch in episode.branches:
            turns = [turn for turn in world.course.turns if turn[0] == branch.member]
            assert turns[-1][1] + turns[-1][2] == branch.token_ids
            assert sum(branch.sampled) == sum(len(sampled) for _, _, sampled in turns)
        members = [member for member, _, _ in world.course.turns]
        assert set(members) == {branch.member for branch in episode.branches}

    def squeezed(text: str) -> str:
        """What the model said is the same with and without white space around it."""
        return "".join(text.split())

    world = play(scene, limits=Limits(10_000, 500, 10_000, 2 * TURNS))
    assert world.counts["endpoint.continued"] and world.counts["endpoint.forked"] and world.counts["endpoint.begun"]


def test_a_turn_without_a_word_goes_on_all_the_same() -> None:
    async def scene(world: World) -> None:
        world.course.say = lambda before: [END_ID]
        http = await world.http(world.episode().key)
        messages: list[Any] = [{"role": "user", "content": "x"}]
        for _ in range(3):
            answer = await http.post("/v1/chat/completions", json={"model": "m", "messages": messages})
            message = answer.json()["choices"][0]["message"]
            assert message["content"] == ""
            messages += [message, {"role": "user", "content": "x"}]
        assert [member for member, _, _ in world.course.turns] == [0, 0, 0]

    play(scene, limits=LIMITS)
