"""Sessions of the real SDKs against real SGLang: what reaches the learner is what the engine streamed and the client
was told, token by token, with log-probs and versions; also when the engine is killed in mid-turn."""

import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import talking_model
from anthropic import AsyncAnthropic
from endpoint_engine import EndpointHarness, Player, Trajectory
from engine_harness import RUN
from openai import AsyncOpenAI
from test_endpoint_sdks import ANTHROPIC_TOOLS, CHAT_TOOLS, FLAT_TOOLS

from actors.episodes import Episode

SESSIONS = 200
MAX_ASKED = 4
"""Turns of a session that calls tools each time."""
STAY = 0.98
"""Turns of 50 tokens, long enough to be cut by a kill.  Few in a billion reach their budget, which openai's stream
helper answers with an exception."""
QUESTION = "What is 1 + 2?"
OPTIONS: Any = {"api_key": "none", "max_retries": 0, "timeout": 300}
OPENAI, ANTHROPIC = AsyncOpenAI(**OPTIONS), AsyncAnthropic(**OPTIONS)
"""Their copies share its connections: a client of its own for each session costs more than the session."""


@pytest.fixture
def harness(tmp_path: pathlib.Path) -> Iterator[EndpointHarness]:
    made: list[EndpointHarness] = []

    def start(**options: Any) -> EndpointHarness:
        made.append(EndpointHarness(tmp_path, **options))
        made[0].start()
        return made[0]

    yield start  # type: ignore[misc]
    for one in made:
        one.stop()


class Agent:
    """Asks, answers the model's tool calls, and writes down what it was told: (text, tool calls) of each turn."""

    def __init__(self, episode: Episode, address: str) -> None:
        self.episode, self.address = episode, address
        self.kind = episode.group % 6
        self.told: list[tuple[str, list[tuple[str, Any]]]] = []

    async def run(self) -> float:
        stream = self.kind % 2 == 1
        if self.kind < 4:
            base = self.address + "/v1"
            client = OPENAI.with_options(base_url=base, api_key=self.episode.key)
            await (self._completions if self.kind < 2 else self._responses)(client, stream)
        else:
            await self._messages(ANTHROPIC.with_options(base_url=self.address, api_key=self.episode.key), stream)
        return float(len(self.told))

    async def _completions(self, client: AsyncOpenAI, stream: bool) -> None:
        messages: list[Any] = [{"role": "system", "content": "Add."}, {"role": "user", "content": QUESTION}]
        for _ in range(MAX_ASKED):
            options: Any = {"model": "m", "messages": messages, "tools": CHAT_TOOLS}
            if stream:
                async with client.chat.completions.stream(**options) as events:
                    answer: Any = await events.get_final_completion()
            else:
                answer = await client.chat.completions.create(**options)
            message = answer.choices[0].message
            calls = message.tool_calls or []
            self._note(message.content or "", [(call.function.name, call.function.arguments) for call in calls])
            if not calls:
                return
            sent = [call.model_dump(exclude={"function": {"parsed_arguments"}}) for call in calls]
            messages.append({"role": "assistant", "content": message.content, "tool_calls": sent})
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "Three"} for call in calls]

    async def _responses(self, client: AsyncOpenAI, stream: bool) -> None:
        items: list[Any] = [{"role": "user", "content": QUESTION}]
        for _ in range(MAX_ASKED):
            options: Any = {"model": "m", "instructions": "Add.", "input": items, "tools": FLAT_TOOLS}
            if stream:
                async with client.responses.stream(**options) as events:
                    answer: Any = await events.get_final_response()
            else:
                answer = await client.responses.create(**options)
            calls = [item for item in answer.output if item.type == "function_call"]
            self._note(answer.output_text, [(call.name, call.arguments) for call in calls])
            if not calls:
                return
            items += [item.to_dict() for item in answer.output]
            items += [{"type": "function_call_output", "call_id": call.call_id, "output": "Three"} for call in calls]

    async def _messages(self, client: AsyncAnthropic, stream: bool) -> None:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        for _ in range(MAX_ASKED):
            options: Any = {"model": "m", "system": "Add.", "messages": messages, "tools": ANTHROPIC_TOOLS}
            options["max_tokens"] = 300
            if stream:
                async with client.messages.stream(**options) as events:
                    answer: Any = await events.get_final_message()
            else:
                answer = await client.messages.create(**options)
            calls = [block for block in answer.content if block.type == "tool_use"]
            text = "".join(block.text for block in answer.content if block.type == "text")
            self._note(text, [(call.name, json.dumps(call.input)) for call in calls])
            if not calls:
                return
            messages.append({"role": "assistant", "content": [block.to_dict() for block in answer.content]})
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "Three"} for call in calls]
            messages.append({"role": "user", "content": results})

    def _note(self, text: str, calls: list[tuple[str, str]]) -> None:
        self.told.append((text, [(name, json.loads(arguments)) for name, arguments in calls]))


def turns_of(token_ids: list[int], sampled: list[bool]) -> list[list[int]]:
    groups = itertools.groupby(zip(token_ids, sampled, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in tokens] for flag, tokens in groups if flag]


def check_against_stream(harness: EndpointHarness, key: tuple[int, int], trained: Trajectory) -> None:
    """Id for id, log-prob for log-prob, version for version."""
    streamed = harness.streamed()
    rids = sorted((rid for rid in streamed if rid.startswith(f"{RUN}/{key[0]}/{key[1]}/")), key=segment)
    streams = [streamed[rid] for rid in rids]
    where = [i for i, flag in enumerate(trained.sampled) if flag]
    assert [trained.token_ids[i] for i in where] == [token for one in streams for token in one.token_ids]
    assert [trained.logprobs[i] for i in where] == [logprob for one in streams for logprob in one.logprobs]
    assert [trained.versions[i] for i in where] == [version for one in streams for version in one.versions]


def check_versions(trained: Trajectory, tables: dict[int, Any]) -> None:
    """Each token's log-prob is that of its version, given the token before it."""
    for i, flag in enumerate(trained.sampled):
        if flag:
            expected = tables[trained.versions[i].step][trained.token_ids[i - 1], trained.token_ids[i]]
            assert abs(trained.logprobs[i] - expected) < 1e-3


def check_told(harness: EndpointHarness, turn: list[int], text: str, calls: list[tuple[str, Any]]) -> None:
    """The client was told what the tokens of a turn say; what is no call beside one that is, SGLang leaves out."""
    written = harness.chat.decode(turn)
    found = []
    for part in written.split("<tool_call>\n")[1:]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(part.partition("\n</tool_call>")[0]))
    assert calls == [(one["name"], one["arguments"]) for one in found]
    assert text == ("" if calls else written)


def segment(rid: str) -> int:
    return int(rid.rpartition("/")[2][:-1])


@pytest.mark.timeout(900)
def test_two_hundred_sessions_at_once_are_trained_as_they_were_streamed(harness: Any) -> None:
    harness = harness(sessions=SESSIONS, min_tokens=500, max_running_requests=64, max_total_tokens=60_000)
    agents: dict[int, Agent] = {}
    all_there = asyncio.Event()

    async def play(episode: Episode, address: str) -> float:
        agents[episode.group] = Agent(episode, address)
        if len(agents) == SESSIONS:
            all_there.set()
        await all_there.wait()  # so that they begin at once
        return await agents[episode.group].run()

    async def until(player: Player) -> None:
        while len(harness.leased) < SESSIONS:
            assert not player.errors, player.errors
            await harness.take_step()

    player = harness.play(play, until)
    tables = {step: talking_model.table(step) for step in range(harness.step + 1)}
    steps, seen = set(), Counter[str]()
    tokenizer = talking_model.tokenizer()
    for key, trained in harness.leased.items():
        agent, branch = agents[key[0]], player.branches[key]
        assert key[1] == trained.episode == 0, "a session that only goes on is one trajectory"
        assert (trained.token_ids, trained.sampled) == (branch.token_ids, branch.sampled)
        assert np.allclose(trained.logprobs, branch.logprobs, atol=1e-6)
        assert trained.reward == len(agent.told)
        check_against_stream(harness, key, trained)
        check_versions(trained, tables)
        turns = turns_of(trained.token_ids, trained.sampled)
        assert len(turns) == len(agent.told)
        for turn, (text, calls) in zip(turns, agent.told, strict=True):
            check_told(harness, turn, text, calls)
            written = harness.chat.decode(turn)
            seen["parallel"] += len(calls) > 1
            seen["malformed"] += not calls and "<tool_call>" in written
            seen["not round"] += tokenizer.encode(written, add_special_tokens=False).ids != turn
        seen["many turns"] += len(turns) > 2
        seen["several versions"] += len({trained.versions[i] for i, flag in enumerate(trained.sampled) if flag}) > 1
        steps |= {version.step for version in trained.versions}
    assert all(seen[what] for what in ("parallel", "malformed", "not round", "many turns", "several versions")), seen
    assert len(steps) > 2
    assert not harness.core.ledger.dropped, harness.core.ledger.dropped
    assert harness.counts["endpoint.malformed_tool_call"] and not harness.counts["endpoint.forked"]


@pytest.mark.timeout(900)
def test_an_engine_that_is_killed_in_mid_turn_is_one_seamless_answer(harness: Any) -> None:
    harness = harness(sessions=4, stay=STAY)
    agents: dict[int, Agent] = {}

    async def play(episode: Episode, address: str) -> float:
        agents[episode.group] = Agent(episode, address)
        return await agents[episode.group].run()

    async def until(player: Player) -> None:
        def grown() -> list[str]:
            return [rid for rid, one in harness.streamed().items() if len(one.token_ids) > 20 and not one.finish]

        async with asyncio.timeout(60):
            while not grown():
                assert not player.errors
                await asyncio.sleep(0.02)
        cut = grown()
        os.killpg(harness.processes[-1].pid, signal.SIGKILL)
        held = {rid: len(harness.streams[rid].token_ids) for rid in cut}
        await asyncio.to_thread(harness.restart_engine)
        keys = {tuple(map(int, rid.split("/")[1:3])) for rid in cut}
        while not keys <= set(harness.leased):
            assert not player.errors, player.errors
            await harness.take_step()
        cuts.update(held)

    cuts: dict[str, int] = {}
    player = harness.play(play, until)
    tables = {step: talking_model.table(step, STAY) for step in range(harness.step + 1)}
    assert cuts
    for rid in cuts:
        _, group, member, _ = rid.split("/")
        key = int(group), int(member)
        trained = harness.leased[key]
        check_against_stream(harness, key, trained)
        check_versions(trained, tables)
        assert trained.token_ids == player.branches[key].token_ids
        turns = turns_of(trained.token_ids, trained.sampled)
        told = agents[key[0]].told
        assert len(turns) == len(told)
        assert any(len(turn) > cuts[rid] for turn in turns)
        for turn, (text, calls) in zip(turns, told, strict=True):
            check_told(harness, turn, text, calls)
