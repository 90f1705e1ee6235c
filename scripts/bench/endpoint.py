"""`stream-rl bench endpoint`: what the endpoint costs, and what it leaves of an engine's rate.

One stock SGLang server and one process that sends the load; the endpoint runs in this process over episodes that ask
the server directly.  The same sessions go through the endpoint and straight to SGLang in turns, in pairs that
alternate in order.
"""

import asyncio
import contextlib
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import click

from scripts.bench.engine_recipe import sglang_options
from scripts.bench.publish import interval
from scripts.processes import Child
from stream_rl.errors import ConfigError
from stream_rl.types import Finish, make_rid

if TYPE_CHECKING:
    from actors.chat import ChatFormat
    from actors.episodes import Branch, Episode
    from actors.rewards import Score
    from engines.sglang.client import EngineClient

TARGETS = {"rate_ratio": (0.9, ">=")}
INCLUDES = {
    "cpu_ms_per_request": "CPU time of this process, the endpoint and its client of the engine, over requests: HTTP, "
    "JSON, matching the history, the suffix's tokens, decoding; not the queue, not the client that sends the load",
    "cpu_us_per_token": "the same, over sampled tokens",
    "rate_ratio": "sampled tokens a second through the endpoint over those of the same sessions, token for token as "
    "long, that ask SGLang's /generate with token ids themselves: geometric mean and 95 % interval over pairs; met if "
    "all of the interval is",
}
QUESTION = "And what comes after that, if all goes well?"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}assistant: "
REQUEST_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    model: pathlib.Path | None
    """A Hugging Face directory with a chat template; None: a random one."""
    tiny: bool
    sessions: int
    """At once."""
    turns: int
    """Of each."""
    tokens: int
    """Sampled in each turn."""
    pairs: int
    start_seconds: float
    options: dict[str, Any]
    """For SGLang, under its own names."""


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out."""
    if plan.pairs < 3 or min(plan.sessions, plan.turns, plan.tokens) < 1:
        raise ConfigError("expected 3 pairs or more, and 1 session, turn and token or more")
    from engines.megatron import specimen

    with tempfile.TemporaryDirectory() as directory:
        model = plan.model or pathlib.Path(directory) / "model"
        if plan.model is None:
            say("writing a random model")
            _write_model(model, plan.tiny)
        pairs = asyncio.run(_run(plan, model, pathlib.Path(directory), say))
    logs = [math.log(through["rate"] / direct["rate"]) for through, direct in pairs]
    ratio = interval(logs)
    requests, tokens = plan.sessions * plan.turns, plan.sessions * plan.turns * plan.tokens
    cpu = [through["cpu_seconds"] for through, _ in pairs]
    return {
        "bench": "endpoint",
        "device": specimen.device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "model": str(plan.model) if plan.model else "tiny" if plan.tiny else "random Qwen3 0.6B",
        "sessions": plan.sessions,
        "turns": plan.turns,
        "tokens_per_turn": plan.tokens,
        "cpu_ms_per_request": 1e3 * statistics.median(cpu) / requests,
        "cpu_us_per_token": 1e6 * statistics.median(cpu) / tokens,
        "tokens_per_second": {
            "endpoint": statistics.median(through["rate"] for through, _ in pairs),
            "direct": statistics.median(direct["rate"] for _, direct in pairs),
        },
        "rate_ratio": ratio,
        "met": {"rate_ratio": ratio["low"] >= TARGETS["rate_ratio"][0]},
        "targets": {name: f"{sign} {least}" for name, (least, sign) in TARGETS.items()},
        "includes": INCLUDES,
    }


async def _run(
    plan: Plan, model: pathlib.Path, directory: pathlib.Path, say: Callable[[str], None]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    from engines.sglang.client import EngineClient

    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    async with _engine(plan, model, directory) as url, EngineClient("engine", url, REQUEST_TIMEOUT_S) as client:
        say("the engine is up")
        chat = _chat(model)
        await _through(plan, chat, client)
        for number in range(plan.pairs):
            if number % 2:
                direct = await _load(plan, chat, url, direct=True)
                through = await _through(plan, chat, client)
            else:
                through = await _through(plan, chat, client)
                direct = await _load(plan, chat, url, direct=True)
            pairs.append((through, direct))
            say(
                f"pair {number + 1}: {through['rate']:,.0f} tok/s through the endpoint with "
                f"{through['cpu_seconds']:.2f} s of CPU time, {direct['rate']:,.0f} directly"
            )
    return pairs


async def _through(plan: Plan, chat: "ChatFormat", client: "EngineClient") -> dict[str, float]:
    from actors.endpoint.options import EndpointOptions
    from actors.endpoint.server import Endpoint
    from actors.episodes import Branch, Episode, Episodes
    from actors.sampling import Limits
    from stream_rl.task import Prompt

    most = 1 << 30
    limits = Limits(max_new_tokens=most, max_turn_tokens=plan.tokens, max_context_tokens=most, max_turns=most)
    episodes, player = Episodes(), _Nobody()
    async with asyncio.TaskGroup() as tasks:
        course = _Engine(client, plan.tokens, tasks)
        played = [
            Episode(Prompt(text=""), Branch(group, 0), course, player, limits, tasks) for group in range(plan.sessions)
        ]
        for episode in played:
            episodes.add(episode)
        async with Endpoint(episodes, chat, _One(client), EndpointOptions()) as endpoint:
            began = time.process_time()
            keys = [episode.key for episode in played]
            figures = await _load(plan, chat, endpoint.address, direct=False, keys=keys)
            figures["cpu_seconds"] = time.process_time() - began
        longest = {len(episode.branches) for episode in played}
        if longest != {1}:
            raise ConfigError(f"sessions have {sorted(longest)} branches; the model's text does not come back the same")
    return figures


async def _load(
    plan: Plan, chat: "ChatFormat", url: str, *, direct: bool, keys: Sequence[str] = ()
) -> dict[str, float]:
    """Sessions from a process of their own."""
    news = [{"role": "user", "content": QUESTION}]
    asked = {
        "url": url, "direct": direct, "keys": list(keys), "question": QUESTION, "prompt": chat.prompt(news),
        "suffix": chat.suffix(news, []), "sessions": plan.sessions, "turns": plan.turns, "tokens": plan.tokens,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.bench.endpoint_load",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            said, _ = await process.communicate(json.dumps(asked).encode())
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise ConfigError("the load ended with an error; it is above")
    figures: dict[str, float] = json.loads(said)
    expected = plan.sessions * plan.turns * plan.tokens
    if figures["tokens"] != expected:
        raise ConfigError(
            f"expected {expected} tokens, got {figures['tokens']}; is the context of the model too small?"
        )
    return figures | {"rate": figures["tokens"] / figures["seconds"]}


class _Engine:
    """The course of episodes that ask one engine, with no queue."""

    def __init__(self, client: "EngineClient", tokens: int, tasks: asyncio.TaskGroup) -> None:
        self._client, self._tokens = client, tokens
        self._tasks: asyncio.TaskGroup = tasks

    async def branch(self, episode: "Episode", token_ids: list[int]) -> "Branch":
        raise ConfigError("a session has begun a branch; the model's text does not come back the same")

    def sample(
        self, branch: "Branch", token_ids: list[int], end: int, stop: Sequence[str], turn: asyncio.Future[None]
    ) -> None:
        self._tasks.create_task(self._sample(branch, token_ids, turn))

    async def _sample(self, branch: "Branch", token_ids: list[int], turn: asyncio.Future[None]) -> None:
        branch.extend(token_ids)
        rid = make_rid("bench", branch.group, branch.member, len(branch.token_ids))
        sampling = {"max_new_tokens": self._tokens, "temperature": 1.0, "ignore_eos": True}
        generation = await self._client.generate(rid, branch.token_ids, sampling)
        branch.extend(generation.token_ids, generation.logprobs)
        branch.finish = Finish.LENGTH
        turn.set_result(None)

    async def done(self, episode: "Episode", score: "Score") -> None:
        """Nobody plays."""

    def failed(self, episode: "Episode", reason: str) -> None:
        raise ConfigError(f"a session failed: {reason}")


class _Nobody:
    async def play(self, episode: "Episode") -> "Score":
        raise ConfigError("the load plays")


@dataclass(frozen=True, slots=True)
class _One:
    """A pool of one engine."""

    client: "EngineClient"

    async def pick(self) -> "EngineClient":
        return self.client

    async def doubt(self, client: "EngineClient") -> None:
        """There is no other."""


@contextlib.asynccontextmanager
async def _engine(plan: Plan, model: pathlib.Path, directory: pathlib.Path) -> AsyncIterator[str]:
    from engines.sglang.server import free_port

    port = free_port()
    room = plan.sessions * (plan.turns * (plan.tokens + 64) + 64)
    options = {
        "model_path": str(model),
        "host": "127.0.0.1",
        "port": port,
        **sglang_options(plan.sessions, room, plan.tiny),
        **({"dtype": "float32"} if plan.tiny else {}),
        **plan.options,
    }
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    variables = {"SGLANG_PLUGINS": "none", "HF_HUB_OFFLINE": "1"} | (
        {"SGLANG_USE_CPU_ENGINE": "1"} if plan.tiny else {}
    )
    log = directory / "engine.log"
    child = await Child.start("engine", "scripts.bench.stock_engine", words, log, threads=1, variables=variables)
    try:
        await _up(f"http://127.0.0.1:{port}", plan.start_seconds, child)
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        click.echo(log.read_text(errors="replace")[-4000:], err=True)
        raise
    finally:
        await child.stop(STOP_TIMEOUT_S)


async def _up(url: str, seconds: float, child: Child) -> None:
    """Until it answers."""
    async with asyncio.timeout(seconds), aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
        ended = tasks.create_task(child.succeed())
        while True:
            if ended.done():
                raise ConfigError("the engine ended while it started")
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"{url}/health_generate") as response:
                    if response.status == 200:
                        break
            await asyncio.sleep(0.5)
        ended.cancel()


def _chat(model: pathlib.Path) -> "ChatFormat":
    from tokenizers import Tokenizer

    from actors.chat import ChatFormat
    from actors.chat_template import ChatTemplate
    from engines.megatron.model_shape import read_model_shape

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return ChatFormat(ChatTemplate.load(model), tokenizer, read_model_shape(model).eos_token_ids)


def _write_model(directory: pathlib.Path, tiny: bool) -> None:
    """Random weights, a chat template, and a tokenizer with as many tokens as the model has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from engines.megatron import specimen
    from scripts import tiny_model

    if tiny:
        tiny_model.create(directory, max_positions=1 << 16)
    else:
        specimen.write(directory, specimen.QWEN3)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [f"Ġw{number}" for number in range(specimen.QWEN3.vocab_size - len(letters) - 1)]
        vocab = {piece: i for i, piece in enumerate([*letters, *words])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<eos>"])
        tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


@click.command()
@click.option("--model", type=click.Path(path_type=pathlib.Path, exists=True), help="With a chat template.")
@click.option("--tiny", is_flag=True, help="A small model on the CPU.")
@click.option("--sessions", default=200, show_default=True, help="At once.")
@click.option("--turns", default=4, show_default=True, help="Of each session.")
@click.option("--tokens", type=int, help="Sampled in each turn.  [default: 256; tiny: 32]")
@click.option("--pairs", default=5, show_default=True, help="Of runs through the endpoint and directly.")
@click.option("--start-seconds", default=300.0, show_default=True, help="Longest that the engine may take to start.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of SGLang; VALUE is JSON.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def endpoint(path: pathlib.Path | None, settings: tuple[str, ...], tiny: bool, tokens: int | None, **plan: Any) -> None:
    """CPU time of the endpoint, and the engine's rate through it beside the engine's alone."""
    options = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    made = Plan(tiny=tiny, tokens=tokens or (32 if tiny else 256), options=options, **plan)
    text = json.dumps(measure(made, lambda line: click.echo(line, err=True)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
