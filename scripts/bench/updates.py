"""`stream-rl bench updates`: what live updates cost an engine that is fully at work, and that they are exact.

A real engine and a real publisher; the versions are made up (see engines.weights.rehearsal).  Windows with two versions
a second against windows with none, in pairs; then commits one after the other at two shares of changed elements.  At
the end the engine recomputes its fingerprint from all live parameters, and the last version's weights are written as a
checkpoint and read back: what a fresh load of it would hold.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from scripts.bench.engine_recipe import engine_recipe, sglang_options
from scripts.bench.followed import FIRST, PROMPT_TOKENS, Followed, following, publishing
from scripts.bench.update_figures import BEATS_PER_SECOND, FEW, MANY, Measured, Window, figures
from stream_rl import config
from stream_rl.errors import ConfigError
from stream_rl.messages import EngineStats
from stream_rl.metrics import Histogram, finite, quantile

if TYPE_CHECKING:
    from engines.megatron.model_shape import ModelShape
    from engines.weights.rehearsal import Rehearsal

log = logging.getLogger(__name__)
PATIENCE_S = 30.0
"""For what engine and publisher do in well under a second."""
WARM_UP = 2
"""Versions of each kind before anything counts: a GPU loads its kernels when they are first launched."""
LAST_SECONDS = 30.0
"""Kept for the end: recomputing, exporting and stopping."""
LOG_END = 8000
"""Characters of each process's log that are shown if anything went wrong."""
PACKAGES = ("sglang", "torch", "numba", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    tiny: bool
    """A small model on the CPU, to try all of this."""
    tp: int
    requests: int
    """In flight."""
    tokens: int
    """A request asks for half to all of it."""
    commits: int
    """At FEW, windows not counted."""
    many_commits: int
    """At MANY."""
    pairs: int
    window_seconds: float
    seconds: float
    """For all of it; there are fewer commits if they do not fit."""
    options: dict[str, Any]
    """For SGLang, under its own names."""


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object, with what went wrong in `errors`.  Raises ConfigError for a plan that cannot be carried
    out."""
    if plan.pairs < 3 or min(plan.commits, plan.many_commits, plan.requests) < 1 or plan.tokens < 2:
        raise ConfigError("expected 3 pairs or more, 1 commit of each kind or more, and 1 request of 2 tokens or more")
    began, measured = time.perf_counter(), Measured()
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
        rehearsal = Rehearsal("bench", model, recipe.weights.part_bytes)
        for share in (FEW, MANY):
            say(f"made up versions that change {rehearsal.prepare(share):,} elements")
        run = _Run(plan, recipe, rehearsal, measured, began, say)
        try:
            asyncio.run(run.all(shape.vocab_size))
        except Exception as error:  # whatever it was: the phases before it have been measured
            log.exception("%s failed", run.phase)
            measured.errors.setdefault(run.phase, _short(error))
        if measured.errors:
            for file in sorted(recipe.run_directory.glob("*.log")):
                say(f"the end of {file.name}:\n{file.read_text(errors='replace')[-LOG_END:]}")
    measured.seconds = time.perf_counter() - began
    return {
        "bench": "updates",
        "device": specimen.device_name(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "dtype": shape.dtype,
        "tp": plan.tp,
        "requests": plan.requests,
        "sglang": recipe.sglang,
        **figures(measured),
    }


def _recipe(plan: Plan, model: pathlib.Path, directory: str, shape: "ModelShape") -> config.Recipe:
    room = (PROMPT_TOKENS + plan.tokens) * plan.requests
    options = sglang_options(plan.requests, room + room // 8, plan.tiny)
    options |= {"dtype": shape.dtype, "tp_size": plan.tp, "sleep_on_idle": plan.tiny} | plan.options
    start_s = min(300.0, plan.seconds)
    return engine_recipe(
        "updates", directory, model, options, max_new_tokens=plan.tokens, start_s=start_s, patience_s=PATIENCE_S
    )


class _Run:
    """The phases, one after the other; each has its time."""

    def __init__(
        self,
        plan: Plan,
        recipe: config.Recipe,
        rehearsal: "Rehearsal",
        measured: Measured,
        began: float,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._recipe, self._rehearsal, self._measured, self._say = plan, recipe, rehearsal, measured, say
        self._ends = began + plan.seconds
        self.phase = "start"

    async def all(self, vocab: int) -> None:
        """Raises what ends the engine or the publisher, TimeoutError when all the time is up; what else goes wrong in a
        phase is noted, and the next phase begins."""
        plan, measured, started = self._plan, self._measured, time.perf_counter()
        followed: Followed | None = None
        try:
            async with (
                asyncio.timeout(max(0.0, self._ends - started)),
                following(self._recipe, self._rehearsal, plan.requests, vocab) as followed,
            ):
                measured.start_seconds = time.perf_counter() - started
                self._say(f"the engine was up after {measured.start_seconds:.0f} s; {plan.requests} requests begin")
                await self._phase("warm_up", 120.0, followed, self._warm_up)
                seconds = 2 * plan.pairs * plan.window_seconds
                await self._phase("windows", 2 * seconds + 60.0, followed, self._windows)
                await self._phase("many", 90.0, followed, self._many)
                await self._phase("few", plan.seconds, followed, self._few)
                await self._phase("verify", 90.0, followed, self._verify)
                self.phase = "stop"
        finally:
            if followed is not None:
                self._note(followed)

    async def _phase(
        self, name: str, seconds: float, followed: Followed, do: Callable[[Followed], Awaitable[None]]
    ) -> None:
        self.phase = followed.phase = name
        try:
            async with asyncio.timeout(seconds):
                await do(followed)
        except Exception as error:  # a phase that fails must not take what the others find with it
            log.exception("%s failed", name)
            self._measured.errors[name] = _short(error)

    def _note(self, followed: Followed) -> None:
        measured, tokens = self._measured, followed.tokens
        measured.reports, measured.tokens = followed.reports, tokens.count
        live = {FIRST, *(report.version for _, report in followed.reports)}
        if measured.verified is not None:  # all that was published is known to be live or not to be
            tokens.problems["a version that was never live"] = tokens.of_no_version(live)
        measured.problems = {name: count for name, count in tokens.problems.items() if count}
        measured.stats = followed.stats[-1] if followed.stats else None

    # -- phases ------------------------------------------------------------------------------------------------

    async def _warm_up(self, followed: Followed) -> None:
        plan = self._plan
        early, steady = plan.requests * min(plan.tokens // 4, 64), plan.requests * plan.tokens // 2
        await followed.until(lambda: followed.tokens.count >= early, "every request to be under way")
        for share in (FEW, MANY) * WARM_UP:
            await followed.publish(share)
        # contexts grow until requests end as often as they begin; until then a window is faster than the next
        await followed.until(lambda: followed.tokens.count >= steady, "requests of all lengths to be under way")
        await followed.settled()

    async def _windows(self, followed: Followed) -> None:
        for number in range(self._plan.pairs):
            windows: dict[bool, Window] = {}
            for beats in (True, False) if number % 2 else (False, True):
                await followed.settled()
                async with publishing(followed, FEW, BEATS_PER_SECOND) if beats else contextlib.nullcontext():
                    windows[beats] = await _window(followed, self._plan.window_seconds)
            on, off = windows[True], windows[False]
            self._measured.pairs.append((on, off))
            self._say(f"pair {number + 1}: {on.rate:,.0f} tok/s with {on.versions} versions, {off.rate:,.0f} without")
        await followed.settled()

    async def _many(self, followed: Followed) -> None:
        await self._commits(followed, MANY, self._plan.many_commits, time.perf_counter() + 45.0)

    async def _few(self, followed: Followed) -> None:
        await self._commits(followed, FEW, self._plan.commits, self._ends - LAST_SECONDS)

    async def _commits(self, followed: Followed, share: float, count: int, until: float) -> None:
        """So many versions, each as soon as the one before it is nearly live; fewer if the time is up."""
        first, started = len(followed.reports), time.perf_counter()
        for _ in range(count):
            if time.perf_counter() >= until:
                break
            await followed.publish(share)
        await followed.settled()
        stalls = [1e3 * report.stall_seconds for _, report in followed.reports[first:]]
        p50, p99 = (quantile(stalls, q) for q in (0.5, 0.99))
        seconds = time.perf_counter() - started
        self._say(f"{len(stalls)} commits of {share:.0%} in {seconds:.0f} s: stall p50 {p50:.2f} ms, p99 {p99:.2f} ms")

    async def _verify(self, followed: Followed) -> None:
        from engines.weights.rehearsal import checkpoint_hash

        await followed.settled()
        await followed.fresh_stats()
        self._measured.verified = verified = await followed.verify()
        fresh = self._rehearsal.directory.with_name("fresh")
        await asyncio.to_thread(self._rehearsal.export, fresh)
        self._measured.fresh_load = await asyncio.to_thread(checkpoint_hash, fresh)
        self._say(f"recomputed {verified.weights_hash}, a fresh load has {self._measured.fresh_load}")


async def _window(followed: Followed, seconds: float) -> Window:
    before, versions = await followed.fresh_stats(), len(followed.reports)
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    versions, took = len(followed.reports) - versions, time.perf_counter() - started
    after = await followed.fresh_stats()
    steps, earlier = Histogram(), before.histograms["decode_step_seconds"]
    later = after.histograms["decode_step_seconds"]
    steps.merge({bucket: count - earlier.get(bucket, 0) for bucket, count in later.items()})
    rate = _counted(before, after, "generated_tokens") / _counted(before, after, "wall_seconds")
    return Window(rate, took, versions, steps)


def _counted(before: EngineStats, after: EngineStats, counter: str) -> float:
    return after.counters[counter] - before.counters[counter]


def _short(error: BaseException) -> str:
    """The first failure of a group, in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error or 'no time was left'}".splitlines()[0]


@click.command()
@click.option("--tiny", is_flag=True, help="A small model and few requests on the CPU, to try it out.")
@click.option("--tp", default=1, show_default=True, help="GPUs of the engine.")
@click.option("--requests", type=int, help="In flight.  [default: 256; tiny: 8]")
@click.option("--tokens", type=int, help="A request asks for half to all of it.  [default: 1024; tiny: 256]")
@click.option("--commits", default=500, show_default=True, help="That change 1 %, one after the other.")
@click.option("--many-commits", default=100, show_default=True, help="That change 5 %.")
@click.option("--pairs", default=8, show_default=True, help="Of windows with two versions a second and with none.")
@click.option("--window-seconds", default=4.0, show_default=True)
@click.option("--seconds", default=420.0, show_default=True, help="For all of it; fewer commits if they do not fit.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of SGLang; VALUE is JSON.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def updates(
    path: pathlib.Path | None,
    settings: tuple[str, ...],
    tiny: bool,
    requests: int | None,
    tokens: int | None,
    **plan: Any,
) -> None:
    """Stall, throughput and exactness of live updates in an engine at work."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    began = time.perf_counter()
    options = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    made = Plan(
        tiny=tiny,
        requests=requests or (8 if tiny else 256),
        tokens=tokens or (256 if tiny else 1024),
        options=options,
        **plan,
    )
    result = finite(measure(made, lambda line: click.echo(f"{time.perf_counter() - began:6.1f} s  {line}", err=True)))
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
    if result["errors"]:
        sys.exit(1)
