"""Environments in their processes: what they say becomes turns, and each way in which they fail has its name."""

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from actor_world import World, play, usable
from chat_builders import CHATML
from episode_world import answer_appends
from fake_engine import FakeEngine

from actors import rollout
from actors.engine_pool import EnginePool
from actors.sampling import Sampling
from stream_rl import config
from stream_rl.messages import Admit, AppendTokens, CloseTrajectory
from stream_rl.plain import pack, unpack

TASK = """
import asyncio, contextlib, os, time, pathlib
import aiohttp
from stream_rl.episode import EpisodeFailed
from stream_rl.task import Prompt

HERE = pathlib.Path(__file__).parent

class Game:
    def prompts(self, split, seed):
        n = 0
        while True:
            yield Prompt(text=f"{n}:", data={"n": n})
            n += 1

    async def play(self, prompt, model):
        how = self.how(prompt.data["n"])
        if how == "dies" and self.first(prompt):
            turn = await model.turn("a")
            os._exit(3)
        if how == "always dies":
            os._exit(3)
        if how == "blocks":
            await model.turn("a")
            await asyncio.gather(self.block())
        if how == "sleeps":
            await asyncio.sleep(1000)
        if how == "so far":
            await model.reward_so_far(0.25)
            await model.turn("a")
            await asyncio.sleep(1000)
        if how == "raises":
            raise KeyError("oh")
        if how == "fails":
            raise EpisodeFailed("no_room", "on the disk")
        if how == "no number":
            return "a lot"
        if how == "infinite":
            return 1e300
        if how == "messages":
            await model.turn([{"role": "user", "content": "hello"}])
            turn = await model.turn([{"role": "user", "content": "more"}])
            return float(turn.text == "ab")
        if how == "no message":
            await model.turn([])
        if how == "no role":
            await model.turn([{"content": "hello"}])
            await model.turn([{"content": "more"}])
        if how == "impatient":
            for text in ("a:", "b:", "c:", "d:", "e:", "f:"):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0):
                        await model.turn(text)
            return float((await model.turn("last:")).text == "last")
        if how == "endpoint":
            url = model.base_url + "/v1/chat/completions"
            body = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {model.key}"}) as client:
                answer = await (await client.post(url, json=body)).json()
                said = answer["choices"][0]["message"]
                body["messages"] += [said, {"role": "user", "content": "more"}]
                answer = await (await client.post(url, json=body)).json()
            return float(answer["choices"][0]["message"]["content"] == "ab")
        if how == "twice":
            await asyncio.gather(model.turn("a"), model.turn("b"))
        if how == "changes" and not self.first(prompt):
            await model.turn("other:")
        print("this goes to stderr")
        said = [(await model.turn()).text]
        for text in ("x", "yy"):
            turn = await model.turn(text + ":")
            said.append(turn.text)
        if how in ("changes",):
            os._exit(3)
        return {"reward": len("".join(said)), "turns": len(said)}

    async def block(self):
        time.sleep(1000)

    def how(self, n):
        hows = (HERE / "hows").read_text().split(",")
        return hows[n] if n < len(hows) else ""

    def first(self, prompt):
        mark = HERE / f"been-{prompt.data['n']}"
        if mark.exists():
            return False
        mark.touch()
        return True
"""


def ends(body: dict[str, Any], ids: list[int]) -> bool:
    return bool(body["input_ids"][-len(ids) :] == ids)


def run(hows: list[str], agent: dict[str, Any] | None = None, template: str = "") -> tuple[list[Any], World]:
    """Close messages, by group, of episodes that go on in these ways."""
    closes: list[Any] = []
    worlds: list[World] = []

    async def scene(world: World) -> None:
        directory = pathlib.Path(world.recipe.model.path).parent
        (directory / "game.py").write_text(TASK)
        (directory / "hows").write_text(",".join(hows))
        if template:
            (directory / "model" / "chat_template.jinja").write_text(template)
        recipe = world.recipe = dataclasses.replace(
            world.recipe,
            task=config.TaskChoice(use=f"{directory}/game.py:Game"),
            agent=config.Agent(**{"turn_gap_s": 20.0} | (agent or {})),
        )
        answer_appends(world)
        worlds.append(world)
        async with (
            FakeEngine(lambda body: (world.ids("last" if ends(body, world.ids("last:")) else "ab"), "stop")) as engine,
            EnginePool(5.0) as pool,
            contextlib.AsyncExitStack() as stack,
        ):
            sampling = Sampling(recipe)
            world.player = await rollout._environments(stack, recipe, sampling, pool, world.episodes, world.counts)
            async with world.actor():
                await world.queue.say(usable(engine), Admit(groups=list(range(len(hows)))))
                await world.queue.nth(CloseTrajectory, len(hows))
        closes.extend(sorted(world.queue.of(CloseTrajectory), key=lambda close: close.group))

    play(scene, group_size=1, max_new_tokens=400)
    return closes, worlds[0]


def test_episodes_are_played_to_their_end() -> None:
    closes, world = run(["", ""], {"processes": 2})
    for close in closes:
        assert (close.status, close.reward, close.reward_parts, close.num_sampled) == ("done", 6.0, {"turns": 3.0}, 6)
        appended = [a.token_ids.tolist() for a in world.queue.of(AppendTokens) if a.group == close.group]
        assert appended == [world.ids(text) for text in (f"{close.group}:", "x:", "yy:")]


def test_the_answer_to_a_turn_that_was_given_up_is_not_taken_for_the_next() -> None:
    closes, world = run(["impatient"])
    assert (closes[0].status, closes[0].reward) == ("done", 1.0)
    appended = [a.token_ids.tolist() for a in world.queue.of(AppendTokens)]
    assert appended == [world.ids("0:a:"), world.ids("last:")]


def test_each_failure_has_its_name_and_costs_one_episode() -> None:
    hows = ["raises", "fails", "no number", "infinite", "messages", "endpoint", "twice", ""]
    closes, _ = run(hows)
    assert {hows[close.group]: close.reason for close in closes} == {
        "raises": "environment_raised",
        "fails": "no_room",
        "no number": "bad_reward",
        "infinite": "reward_not_finite",
        "messages": "no_chat_template",
        "endpoint": "no_endpoint",
        "twice": "environment_raised",
        "": "",
    }


def test_messages_and_the_endpoint_go_through_the_model_s_template() -> None:
    hows = ["messages", "endpoint", "no message", "no role"]
    closes, world = run(hows, template=CHATML)
    assert [(close.reason, close.reward, close.num_sampled) for close in closes[:2]] == [("", 1.0, 4)] * 2
    assert [close.reason for close in closes[2:]] == ["bad_observation"] * 2
    said = [[a.token_ids.tolist() for a in world.queue.of(AppendTokens) if a.group == group] for group in (0, 1)]
    for (first, second), before in zip(said, ("0:", ""), strict=True):
        assert first == world.ids(before + "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
        assert second == world.ids("<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")


def test_a_process_that_dies_takes_nobody_along() -> None:
    closes, world = run(["dies", "", ""])
    assert [(close.status, close.reward, close.num_sampled) for close in closes[1:]] == [("done", 6.0, 6)] * 2
    # it had begun with another observation, so its past cannot be played again
    assert (closes[0].status, closes[0].reason) == ("failed", "environment_lost")
    assert not len(world.episodes)


def test_one_that_is_cancelled_before_it_began_is_said_to_be_over(tmp_path: pathlib.Path) -> None:
    """Or else its process is taken for hung, and ended with all that is played there."""
    (tmp_path / "game.py").write_text(TASK)
    (tmp_path / "hows").write_text("sleeps")
    opening = {"use": f"{tmp_path}/game.py:Game", "options": {}, "base_url": "", "no_endpoint": ""}
    start = {"start": 1, "text": "", "data": {"n": 0}, "key": "k"}
    frames = [pack(frame) for frame in (opening, start, {"cancel": 1})]
    process = subprocess.run(
        [sys.executable, "-m", "actors.environment_process"],
        input=b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames),
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    said, rest = [], process.stdout
    while rest:
        length = int.from_bytes(rest[:4], "big")
        said.append(unpack(rest[4 : 4 + length]))
        rest = rest[4 + length :]
    assert {"over": 1, "failure": "cancelled", "detail": ""} in said


def test_an_episode_that_always_kills_its_process_ends() -> None:
    closes, _ = run(["always dies"])
    assert (closes[0].status, closes[0].reason) == ("failed", "environment_died")


def test_an_environment_that_is_not_deterministic_is_lost_with_its_process() -> None:
    closes, _ = run(["changes"])
    assert (closes[0].status, closes[0].reason) == ("failed", "environment_lost")


@pytest.mark.parametrize("how", ["sleeps", "blocks"])
def test_one_that_hangs_is_ended_and_its_neighbours_are_not(how: str) -> None:
    closes, _ = run([how, "", ""], {"turn_gap_s": 5.0})
    assert [(close.status, close.reason) for close in closes] == [
        ("failed", "environment_hung"),
        ("done", ""),
        ("done", ""),
    ]


def test_a_deadline_closes_with_the_reward_so_far_or_fails() -> None:
    closes, _ = run(["so far", "sleeps"], {"deadline_s": 2.0})
    assert [(close.status, close.reason, close.reward, close.num_sampled) for close in closes] == [
        ("done", "", 0.25, 2),
        ("failed", "deadline", 0.0, 0),
    ]
