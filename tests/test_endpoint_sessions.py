"""Which trajectory a request goes on with: continue, fork, compaction, sub-agents, retries, and clients that leave."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from endpoint_world import World, play
from test_endpoint_sdks import CALLS, CHAT_TOOLS

from actors.episodes import Episode


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **fields}


class Talk:
    """Chat completions of one episode, as plain HTTP."""

    def __init__(self, world: World, http: httpx.AsyncClient) -> None:
        self.world, self.http = world, http

    async def ask(self, *messages: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> Any:
        """The answer's message."""
        answer = await self.http.post("/v1/chat/completions", json=body(*messages, **fields), headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]

    def member(self) -> int:
        return self.world.course.turns[-1][0]

    def before(self) -> str:
        return self.world.text(self.world.course.turns[-1][1])


async def talk(world: World, episode: Episode | None = None) -> Talk:
    return Talk(world, await world.http((episode or world.episode()).key))


def test_an_edited_history_begins_a_branch_that_shares_what_was_sampled() -> None:
    async def scene(world: World) -> None:
        world.says("one", "two", "three", "four")
        t = await talk(world)
        await t.ask(user("a"))
        await t.ask(user("a"), said("one"), user("b"))
        _, before, sampled = world.course.turns[0]
        # the second question is another
        await t.ask(user("a"), said("one"), user("B"))
        assert t.member() == 1
        assert world.course.turns[-1][1][: len(before) + len(sampled)] == before + sampled
        # what the model said is another: its tokens are nobody's
        await t.ask(user("a"), said("uno"), user("b"))
        assert t.member() == 2 and "uno" in t.before()

    counts = play(scene).counts
    assert (counts["endpoint.begun"], counts["endpoint.continued"], counts["endpoint.forked"]) == (2, 1, 1)


def test_both_sides_of_a_fork_go_on() -> None:
    async def scene(world: World) -> None:
        world.says("one", "two", "zwei", "three", "drei")
        t = await talk(world)
        stem = [user("a"), said("one")]
        await t.ask(user("a"))
        await t.ask(*stem, user("b"))
        await t.ask(*stem, user("c"))
        await t.ask(*stem, user("b"), said("two"), user("d"))
        assert t.member() == 0
        await t.ask(*stem, user("c"), said("zwei"), user("d"))
        assert t.member() == 1
        sampled = [token for _, _, tokens in world.course.turns for token in tokens]
        assert len(sampled) == len("onetwozweithreedrei") + 5

    play(scene)


def test_compaction_and_sub_agents_begin_branches_and_the_first_goes_on() -> None:
    async def scene(world: World) -> None:
        world.says("one", "sub", "summary", "after", "tools", "sub again")
        t = await talk(world)
        main = [{"role": "system", "content": "main"}, user("a")]
        sub = [{"role": "system", "content": "sub"}, user("a")]
        await t.ask(*main)
        await t.ask(*sub)
        assert t.member() == 1
        await t.ask(*main, said("one"), user("summarize"))
        assert t.member() == 0
        await t.ask(main[0], user("so far: summary. go on"))
        assert t.member() == 2 and "one" not in t.before()
        await t.ask(*main, said("one"), user("x"), tools=CHAT_TOOLS)
        assert t.member() == 3 and "Tools:" in t.before()
        await t.ask(*sub, said("sub"), user("b"))
        assert t.member() == 1

    play(scene)


@pytest.mark.parametrize(
    "returned",
    [
        {"role": "assistant", "content": "I add.", "tool_calls": "as they were"},
        {"role": "assistant", "content": [{"type": "text", "text": " I add.\n"}], "tool_calls": "other ids and spaces"},
    ],
)
def test_what_the_model_said_is_known_however_a_client_writes_it(returned: dict[str, Any]) -> None:
    async def scene(world: World) -> None:
        world.says(CALLS, "done")
        t = await talk(world)
        message = await t.ask(user("a"), tools=CHAT_TOOLS)
        calls = message["tool_calls"]
        if returned["tool_calls"] != "as they were":
            for number, call in enumerate(calls):
                call["id"] = f"mine-{number}"
                call["function"]["arguments"] = '{ "x" :%d}' % (number + 1)  # noqa: UP031
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls]
        await t.ask(user("a"), returned | {"tool_calls": calls}, *results, tools=CHAT_TOOLS)
        assert t.member() == 0

    play(scene)


def test_calls_with_other_arguments_are_another_history() -> None:
    async def scene(world: World) -> None:
        world.says(CALLS, "done")
        t = await talk(world)
        message = await t.ask(user("a"), tools=CHAT_TOOLS)
        message["tool_calls"][0]["function"]["arguments"] = '{"x": 7}'
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in message["tool_calls"]]
        await t.ask(user("a"), message, *results, tools=CHAT_TOOLS)
        assert t.member() == 1

    play(scene)


def test_the_same_question_again_is_a_new_sample() -> None:
    async def scene(world: World) -> None:
        world.says("one", "uno", "two", "dos", "deux")
        t = await talk(world)
        assert (await t.ask(user("a")))["content"] == "one"
        assert (await t.ask(user("a")))["content"] == "uno"
        more = [user("a"), said("one"), user("b")]
        assert [(await t.ask(*more))["content"] for _ in range(3)] == ["two", "dos", "deux"]
        assert [member for member, _, _ in world.course.turns] == [0, 1, 0, 2, 3]
        assert len({tuple(before) for _, before, _ in world.course.turns[2:]}) == 1

    play(scene)


def test_questions_at_the_same_time_have_a_branch_each() -> None:
    async def scene(world: World) -> None:
        world.says("one")
        t = await talk(world)
        await t.ask(user("a"))
        world.holds()
        asked = [asyncio.create_task(t.ask(user("a"), said("one"), user("b"))) for _ in range(5)]
        await world.held(5)
        assert world.counts["endpoint.asked_again"] == 0
        for number in range(5):
            world.release(f"answer {number}")
        answers = [(await one)["content"] for one in asked]
        assert sorted(answers) == [f"answer {number}" for number in range(5)]
        assert sorted(member for member, _, _ in world.course.turns[1:]) == [0, 1, 2, 3, 4]
        world.says("end")
        await t.ask(user("a"), said("one"), user("b"), said("answer 3"), user("c"))
        assert t.member() == next(m for m, _, s in world.course.turns if world.text(s).startswith("answer 3"))

    play(scene)


# -- asked again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["retry header", "idempotency key"])
def test_a_request_that_is_sent_again_gets_the_same_answer_and_samples_nothing(how: str) -> None:
    async def scene(world: World) -> None:
        world.says("one", "two")
        t = await talk(world)
        first = {"Idempotency-Key": "k"} if how == "idempotency key" else {"x-stainless-retry-count": "0"}
        again = first if how == "idempotency key" else {"x-stainless-retry-count": "1"}
        answers = [await t.ask(user("a"), headers=headers) for headers in (first, again, again)]
        assert [answer["content"] for answer in answers] == ["one"] * 3
        await t.ask(user("a"), said("one"), user("b"), headers={"Idempotency-Key": "other"})
        assert [member for member, _, _ in world.course.turns] == [0, 0]

    assert play(scene).counts["endpoint.asked_again"] == 2


def test_an_idempotency_key_is_for_one_body() -> None:
    async def scene(world: World) -> None:
        t = await talk(world)
        await t.ask(user("a"), headers={"Idempotency-Key": "k"})
        answer = await t.http.post("/v1/chat/completions", json=body(user("b")), headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")
        assert len(world.course.turns) == 1

    play(scene)


@pytest.mark.parametrize("stream", [False, True])
def test_an_sdk_that_times_out_and_asks_again_gets_the_turn_that_it_had_asked_for(stream: bool) -> None:
    async def scene(world: World) -> None:
        world.holds()
        client = await world.openai(world.episode().key, max_retries=2, timeout=0.3)

        async def ask() -> str:
            if not stream:
                answer = await client.chat.completions.create(**body(user("a")))
                return answer.choices[0].message.content or ""
            parts = await client.chat.completions.create(**body(user("a"), stream=True))
            return "".join([part.choices[0].delta.content or "" async for part in parts if part.choices])

        asked = asyncio.create_task(ask())
        await world.until(lambda: world.counts["endpoint.asked_again"])
        assert len(world.course.held) == 1
        world.release("late")
        assert await asked == "late"
        assert len(world.course.turns) == 1

    counts = play(scene, options={"keep_alive_s": 60.0}).counts
    assert counts["endpoint.client_gone"] >= 1


def test_a_client_that_leaves_loses_nothing() -> None:
    async def scene(world: World) -> None:
        world.holds()
        t = await talk(world)
        asked = asyncio.create_task(t.ask(user("a")))
        await world.held()
        asked.cancel()
        await world.until(lambda: world.counts["endpoint.client_gone"] == 1)
        # it comes back, without saying that it does, while the turn is under way
        again = asyncio.create_task(t.ask(user("a")))
        await world.until(lambda: world.counts["endpoint.asked_again"] == 1)
        assert len(world.course.held) == 1
        world.release("one")
        assert (await again)["content"] == "one"
        # it leaves and comes back after the turn, which it can only have as a retry
        asked = asyncio.create_task(t.ask(user("a"), said("one"), user("b")))
        await world.held()
        asked.cancel()
        await world.until(lambda: world.counts["endpoint.client_gone"] == 2)
        world.release("two")
        retry = {"x-stainless-retry-count": "1"}
        assert (await t.ask(user("a"), said("one"), user("b"), headers=retry))["content"] == "two"
        # or goes on from, if it knows the answer
        world.says("three")
        await t.ask(user("a"), said("one"), user("b"), said("two"), user("c"))
        assert [member for member, _, _ in world.course.turns] == [0, 0, 0]

    play(scene)


def test_a_retry_of_what_failed_asks_anew() -> None:
    async def scene(world: World) -> None:
        t = await talk(world)
        world.course.say = lambda before: 1 // 0  # type: ignore[return-value]
        answer = await t.http.post("/v1/chat/completions", json=body(user("a")))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        world.says("one")
        retry = {"x-stainless-retry-count": "1"}
        assert (await t.ask(user("a"), headers=retry))["content"] == "one"

    play(scene)


def test_streams_show_signs_of_life_and_then_the_whole_turn() -> None:
    async def scene(world: World) -> None:
        world.holds()
        key = world.episode().key
        client, other, http = await world.openai(key), await world.anthropic(key), await world.http(key)

        async def raw() -> str:
            return (await http.post("/v1/chat/completions", json=body(user("a"), stream=True))).text

        async def chunks() -> list[str]:
            parts = await client.chat.completions.create(**body(user("b"), stream=True))
            return [part.choices[0].delta.content or "" async for part in parts]

        async def blocks() -> str:
            async with other.messages.stream(**body(user("c")), max_tokens=9) as events:
                return await events.get_final_text()

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one()) for one in (raw, chunks, blocks)]
            await world.held(3)
            await asyncio.sleep(0.5)
            for _ in range(3):
                world.release("late")
        text = asked[0].result()
        assert text.count(": keep-alive\n\n") >= 2 and text.endswith("data: [DONE]\n\n")
        assert "".join(asked[1].result()) == asked[2].result() == "late"

    play(scene, options={"keep_alive_s": 0.02})


def test_a_stream_whose_episode_ends_says_so() -> None:
    async def scene(world: World) -> None:
        world.holds()
        episode = world.episode()
        client, other = await world.openai(episode.key), await world.anthropic(episode.key)

        async def chat() -> None:
            async for _ in await client.chat.completions.create(**body(user("a"), stream=True)):
                pass

        async def respond() -> None:
            async for event in await client.responses.create(model="m", input="a", stream=True):
                assert event.type == "error" and event.code == "episode_ended"  # the SDK hands it on
                raise AssertionError(event.message)

        async def message() -> None:
            async with other.messages.stream(**body(user("c")), max_tokens=9) as events:
                await events.get_final_text()

        asked = [asyncio.create_task(one()) for one in (chat, respond, message)]
        await world.held(3)
        await asyncio.sleep(0.1)
        world.end(episode, "deadline")
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert "the episode has ended: deadline" in str(error), error

    play(scene, options={"keep_alive_s": 0.02})


# -- sessions and episodes -----------------------------------------------------------------------------------


def test_an_episode_that_has_ended_is_an_error_of_its_own_and_its_key_is_void() -> None:
    async def scene(world: World) -> None:
        world.holds()
        episode, other = world.episode(), world.episode(1)
        client = await world.openai(episode.key, max_retries=3)
        asked = asyncio.create_task(client.chat.completions.create(**body(user("a"))))
        await world.held()
        world.end(episode, "max_turns")
        with pytest.raises(openai.BadRequestError) as ended:
            await asked
        assert (ended.value.code, ended.value.body["message"]) == ("episode_ended", "the episode has ended: max_turns")  # type: ignore[index]
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(**body(user("a")))
        world.says("fine")
        assert (await (await talk(world, other)).ask(user("a")))["content"] == "fine"

    play(scene)


def test_a_thousand_sessions_opened_and_left_leave_nothing() -> None:
    async def scene(world: World) -> None:
        client = await world.http("none")
        for number in range(1000):
            episode = world.episode(number)
            headers = {"x-api-key": episode.key}
            answer = await client.post("/v1/chat/completions", json=body(user("a")), headers=headers)
            assert answer.status_code == 200
            world.end(episode)
        del episode
        world.course.turns.clear()
        await asyncio.sleep(0)
        assert len(world.endpoint.sessions) <= 1
        assert not len(world.episodes)

    play(scene)


def test_what_is_kept_of_an_episode_is_bounded() -> None:
    async def scene(world: World) -> None:
        episode = world.episode()
        t = await talk(world, episode)
        for number in range(39):
            answer = await t.http.post("/v1/responses", json={"model": "m", "input": f"q{number}" * 50})
            assert answer.status_code == 200
        session = world.endpoint.sessions.of(episode)
        assert len(session.exchanges) <= 11 and len(session.stored) == 10
        assert not any(exchange.ask.messages for exchange in session.exchanges), "each would be a whole conversation"
        gone = await t.http.post("/v1/responses", json={"model": "m", "input": "x", "previous_response_id": "resp_1"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (400, "previous_response_not_found")

    from actors.endpoint import sessions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "KEPT", 10)
        play(scene)


def test_too_many_turns_at_once_are_asked_to_come_again() -> None:
    async def scene(world: World) -> None:
        world.holds()
        t = await talk(world)
        asked = [asyncio.create_task(t.ask(user(str(number)))) for number in range(3)]
        await world.held(3)
        answer = await t.http.post("/v1/chat/completions", json=body(user("more")))
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert answer.headers["retry-after"] and answer.headers["x-should-retry"] == "true"
        # another session does not notice
        other = asyncio.create_task((await talk(world, world.episode(1))).ask(user("a")))
        await world.held(4)
        for _ in range(4):
            world.release()
        await asyncio.gather(*asked, other)

    from actors.endpoint import server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "MAX_OPEN", 3)
        play(scene)


def test_leaving_the_endpoint_ends_its_turns() -> None:
    async def scene(world: World) -> None:
        world.holds()
        t = await talk(world)
        task = asyncio.create_task(t.ask(user("a")))
        await world.held()
        world.left = task  # type: ignore[attr-defined]

    world = play(scene)
    assert world.left.done()  # type: ignore[attr-defined]
