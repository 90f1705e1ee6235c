"""`stream-rl bench engine`: what streaming and live updates cost an engine, beside SGLang as it is.

Four real servers with one random model, all up at once, take the same bursts in turns: so many requests at the same
moment, each for the same number of tokens, until the last has answered.  A server that has no turn stands idle.

    plain         SGLang without our plugin; each answer comes whole
    sse           the same, every token as an event; SGLang's default repeats all that came before in each
    incremental   the same with `incremental_streaming_output`: an event holds what is new
    plugin        SGLang with our plugin, which streams to the queue; answers come whole
    updates-R     plugin, with R made-up versions a second becoming live
"""

import asyncio
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import pathlib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import click

from scripts.bench.engine_recipe import engine_recipe, sglang_options
from scripts.bench.followed import (
    PROMPT_TOKENS,
    REQUEST_TIMEOUT_S,
    RUN,
    STOP_TIMEOUT_S,
    Followed,
    following,
    publishing,
)
from scripts.bench.publish import interval
from scripts.bench.update_figures import FEW
from scripts.processes import Child
from stream_rl import config
from stream_rl.errors import ConfigError, EngineError
from stream_rl.metrics import finite, quantile
from stream_rl.types import make_rid

if TYPE_CHECKING:
    from engines.megatron.model_shape import ModelShape

PLAIN, SSE, INCREMENTAL, PLUGIN = "plain", "sse", "incremental", "plugin"
STREAMS = (SSE, INCREMENTAL)
PATIENCE_S = 60.0
"""For what engine and publisher do in well under a second, also on a crowded machine."""
PACKAGES = ("sglang", "torch", "numpy")
TARGETS = {PLUGIN: 0.98, "updates-2": 0.97}
INCLUDES = {
    "ratio": "tokens a second of a burst over those of the plain server's burst of the same round: geometric mean and "
    "95 % interval over rounds, in each of which the order is another",
    "tokens_per_second": "all tokens of a burst over the seconds from its first request until its last answer; prompts "
    "of 64 tokens are computed in it too",
    "sse": "this process reads the events and throws them away, all but the last of a request; requests ask for "
    "log-probs, without which nobody can train on the tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    tiny: bool
    """A small model on the CPU, to try all of this."""
    requests: int
    """Of a burst."""
    tokens: int
    """Of each of them."""
    rounds: int
    sse_rounds: int
    """Of them with the two streaming arms, which take many times as long."""
    rates: tuple[float, ...]
    """Versions a second."""
    seconds: float
    """For all of it; there are fewer rounds if they do not fit."""
    options: dict[str, Any]
    """For SGLang, under its own names."""

    def arms(self, number: int) -> list[str]:
        """Of a round, in its order: every second round begins with another arm, and the one after it goes backwards."""
        arms = [PLAIN, PLUGIN, *map(_of_rate, self.rates), *(STREAMS if number < self.sse_rounds else ())]
        first = number // 2 % len(arms)
        turned = arms[first:] + arms[:first]
        return turned[::-1] if number % 2 else turned


@dataclass(frozen=True, slots=True)
class Burst:
    seconds: float
    tokens: int
    versions: int = 0
    """That became live meanwhile."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out."""
    if plan.rounds < 3 or min(plan.requests, plan.tokens) < 2 or any(rate <= 0 for rate in plan.rates):
        raise ConfigError("expected 3 rounds or more, 2 requests or more of 2 tokens or more, and rates above 0")
    began = time.perf_counter()
    from engines.megatron import specimen
    from engines.weights.codes import payload
    from engines.weights.rehearsal import Rehearsal

    payload.prepare()
    shape = specimen.QWEN3
    if plan.tiny:
        shape = dataclasses.replace(specimen.sized(256, 2, 4096), dtype="float32")
    with tempfile.TemporaryDirectory() as directory:
        model = pathlib.Path(directory) / "model"
        say("writing a random model")
        specimen.write(model, shape)
        recipe = _recipe(plan, model, directory, shape)
        rehearsal = Rehearsal(RUN, model, recipe.weights.part_bytes)
        rehearsal.prepare(FEW)
        rounds: list[dict[str, Burst]] = []
        problems: dict[str, int] = {}
        stalls: list[float] = []

        async def run() -> None:
            async with following(recipe, rehearsal, 0, shape.vocab_size) as followed, _plain(recipe) as servers:
                bench = _Bench(plan, followed, servers | {PLUGIN: followed.address}, shape.vocab_size)
                say(f"all servers were up after {time.perf_counter() - began:.0f} s")
                for arm in plan.arms(0):
                    await bench.burst(arm, tokens=max(2, plan.tokens // 4))  # kernels are loaded when first launched
                stalls_before = len(followed.reports)
                for number in range(plan.rounds):
                    if rounds and time.perf_counter() - began > plan.seconds:
                        say(f"no time for more than {number} rounds")
                        break
                    rounds.append({arm: await bench.burst(arm) for arm in plan.arms(number)})
                    rates = ", ".join(f"{arm} {burst.rate:,.0f}" for arm, burst in rounds[-1].items())
                    say(f"round {number + 1}, tok/s: {rates}")
                stalls.extend(1e3 * report.stall_seconds for _, report in followed.reports[stalls_before:])
                problems.update(followed.tokens.problems)

        asyncio.run(run())
    return {
        "bench": "engine",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["stream-rl", *sys.argv[1:]]),
        "device": specimen.device_name(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "model": f"{shape.layers} layers of {shape.hidden_size}, {shape.dtype}",
        "requests": plan.requests,
        "tokens": plan.tokens,
        "sglang": recipe.sglang,
        **figures(rounds),
        "stall_ms": {name: quantile(stalls, q) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "problems": {name: count for name, count in problems.items() if count},
        "seconds": time.perf_counter() - began,
        "targets": TARGETS,
        "includes": INCLUDES,
    }


def figures(rounds: Sequence[Mapping[str, Burst]]) -> dict[str, Any]:
    """Of each arm, over the rounds that it was in; `met` says of each target whether it holds."""
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for bursts in rounds for arm in bursts):
        pairs = [(bursts[arm], bursts[PLAIN]) for bursts in rounds if arm in bursts]
        seconds = sum(burst.seconds for burst, _ in pairs)
        arms[arm] = {
            "tokens_per_second": sum(burst.tokens for burst, _ in pairs) / seconds,
            "versions_per_second": sum(burst.versions for burst, _ in pairs) / seconds,
            "ratio": interval([math.log(a.rate / b.rate) for a, b in pairs]) if len(pairs) > 1 else None,
            "rounds": [burst.rate for burst, _ in pairs],
        }
    met = {
        arm: arm in arms and bool(arms[arm]["ratio"]) and arms[arm]["ratio"]["mean"] >= t for arm, t in TARGETS.items()
    }
    return {"arms": arms, "met": met}


class _Bench:
    """The bursts."""

    def __init__(self, plan: Plan, followed: Followed, addresses: Mapping[str, str], vocab: int) -> None:
        self._plan, self._followed, self._addresses = plan, followed, addresses
        self._vocab, self._number = vocab, 0

    async def burst(self, arm: str, tokens: int = 0) -> Burst:
        """Raises EngineError if a request is not answered with as many tokens as it asked for."""
        tokens = tokens or self._plan.tokens
        await self._followed.settled()
        rate = float(arm.removeprefix("updates-")) if arm.startswith("updates-") else 0.0
        server = PLUGIN if rate or arm == PLUGIN else arm if arm == INCREMENTAL else PLAIN
        chance = random.Random(self._number)
        self._number += 1
        prompts = [[chance.randrange(self._vocab) for _ in range(PROMPT_TOKENS)] for _ in range(self._plan.requests)]
        before = len(self._followed.reports)
        timeout, connector = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S), aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(self._addresses[server], timeout=timeout, connector=connector) as http,
            publishing(self._followed, FEW, rate) if rate else contextlib.nullcontext(),
        ):
            started = time.perf_counter()
            ask = self._ask_stream if arm in STREAMS else self._ask
            async with asyncio.TaskGroup() as tasks:
                for member, prompt in enumerate(prompts):
                    rid = make_rid(RUN, self._number, member, 0)
                    tasks.create_task(ask(http, rid, prompt, tokens, server == PLUGIN))
            seconds = time.perf_counter() - started
            versions = len(self._followed.reports) - before
        return Burst(seconds, tokens * len(prompts), versions)

    async def _ask(self, http: aiohttp.ClientSession, rid: str, prompt: list[int], tokens: int, followed: bool) -> None:
        if followed:
            self._followed.tokens.asked(rid, self._followed.live)
        async with http.post("/generate", json=_body(rid, prompt, tokens)) as response:
            answer = await _whole(response, tokens)
        if followed:
            self._followed.tokens.answered(rid, answer)

    async def _ask_stream(
        self, http: aiohttp.ClientSession, rid: str, prompt: list[int], tokens: int, followed: bool
    ) -> None:
        async with http.post("/generate", json=_body(rid, prompt, tokens) | {"stream": True}) as response:
            last = b""
            async for block in response.content.iter_any():
                last = block[-32:]
        if response.status != 200 or b"[DONE]" not in last:
            raise EngineError(f"{http._base_url} ended a stream with status {response.status}: {last!r}")


def _body(rid: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    return {"rid": rid, "input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


async def _whole(response: aiohttp.ClientResponse, tokens: int) -> list[int]:
    text = await response.text()
    if response.status == 200:
        ids: list[int] = json.loads(text)["output_ids"]
        if len(ids) == tokens:
            return ids
    raise EngineError(f"{response.url} answered {response.status} and not with {tokens} tokens: {text[:300]}")


def _of_rate(rate: float) -> str:
    return f"updates-{rate:g}"


def _recipe(plan: Plan, model: pathlib.Path, directory: str, shape: "ModelShape") -> config.Recipe:
    room = (PROMPT_TOKENS + plan.tokens) * plan.requests
    options = sglang_options(plan.requests, room + room // 8, plan.tiny) | {"dtype": shape.dtype} | plan.options
    start_s = min(300.0, plan.seconds)
    return engine_recipe(
        "engine", directory, model, options, max_new_tokens=plan.tokens, start_s=start_s, patience_s=PATIENCE_S
    )


@contextlib.asynccontextmanager
async def _plain(recipe: config.Recipe) -> AsyncIterator[dict[str, str]]:
    """Addresses of the servers without our plugin, until the end of the block.  Raises ProcessDied."""
    directory, children = recipe.run_directory, []
    incremental = dataclasses.replace(recipe, sglang=recipe.sglang | {"incremental_streaming_output": True})
    try:
        for name, each in ((PLAIN, recipe), (INCREMENTAL, incremental)):
            file = directory / f"{name}.toml"
            config.dump(each, file)
            words = (str(file), "--run-id", RUN, "--queue", "", "--publisher", "", "--name", name, "--plain")
            children.append(await Child.start(name, "engines.sglang.server", words, directory / f"{name}.log", 1))
        addresses = {}
        for child in children:
            addresses[child.name] = str((await child.ready(recipe.engine.start_timeout_s))["address"])
        yield addresses
    finally:
        for child in children:
            await child.stop(STOP_TIMEOUT_S)


@click.command()
@click.option("--tiny", is_flag=True, help="A small model and few requests on the CPU, to try it out.")
@click.option("--requests", type=int, help="Of a burst.  [default: 256; tiny: 8]")
@click.option("--tokens", type=int, help="Of each of them.  [default: 512; tiny: 64]")
@click.option("--rounds", default=10, show_default=True)
@click.option("--sse-rounds", default=3, show_default=True, help="Of them with the streaming arms, which are slow.")
@click.option("--rates", default="0.5,2,5", show_default=True, help="Versions a second.")
@click.option("--seconds", default=420.0, show_default=True, help="For all of it; fewer rounds if they do not fit.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of SGLang; VALUE is JSON.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def engine(
    path: pathlib.Path | None,
    settings: tuple[str, ...],
    tiny: bool,
    requests: int | None,
    tokens: int | None,
    rates: str,
    **plan: Any,
) -> None:
    """Throughput of SGLang: plain, with SSE, with the plugin, with live updates; interleaved bursts."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    began = time.perf_counter()
    options = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    try:
        numbers = tuple(float(rate) for rate in rates.split(","))
    except ValueError as error:
        raise ConfigError(f"--rates must be numbers with commas between them, got {rates!r}") from error
    made = Plan(
        tiny=tiny,
        requests=requests or (8 if tiny else 256),
        tokens=tokens or (64 if tiny else 512),
        options=options,
        rates=numbers,
        **plan,
    )
    result = finite(measure(made, lambda line: click.echo(f"{time.perf_counter() - began:6.1f} s  {line}", err=True)))
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
