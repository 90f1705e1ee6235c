"""`stream-rl bench loop`: the whole system in several modes, on the same hardware, model, task, seeds and step size.

    streaming      nothing waits: groups under way as the recipe says, versions live between two steps of an engine
    synchronous    generate all of a step's groups, then train; engines and learner on GPUs of their own
    colocated      the same with every GPU used by both, one after the other
    one_step_off   the next step's groups are generated while the last's are trained on
    rounds         APRIL: over-provision, stop when a step's tokens are there, resume
    reload         streaming, but each version pauses the engines, which load all weights from the disk

Modes are settings of this system and nothing else.  Each is a run of `stream-rl train`, started whole but for its
rollout actor; then they go one after the other, so that only one works at a time.  Synchronous modes get what they need
to be fast: engines that hold a whole step at once, weights live in milliseconds, no pause, and the next step begun as
soon as the last engine has the version.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import click
import psutil

from scripts.bench import loop_figures
from scripts.bench.loop_figures import COLOCATED, RELOAD, STREAMING, SYNCHRONOUS
from scripts.train import HELD
from stream_rl import config
from stream_rl.errors import ConfigError, StreamRLError
from stream_rl.metrics import finite

MODES = (STREAMING, SYNCHRONOUS, COLOCATED, "one_step_off", "rounds", RELOAD)
PACKAGES = ("sglang", "torch", "megatron-core")
NEVER = 1_000_000
"""Steps."""
END_S = 90.0
"""For a run to end once its time is up: its last step, all weights hashed, every process stopped."""
OUTPUT_END = 4000
"""Characters of a mode's output that are shown if it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    recipe: config.Recipe
    modes: tuple[str, ...]
    seconds: float
    """Of each mode, from its first lease."""
    gpus: int
    """0: the recipe's devices as they are."""
    learner_gpus: int
    together: bool
    """All modes start at the same time, and wait for their turn."""
    kill_after: float
    """Seconds into a mode at which an engine is killed.  0: none is."""
    reward: float | None
    start_s: float
    directory: pathlib.Path


def of_mode(plan: Plan, mode: str) -> config.Recipe:
    """The recipe of one mode.  Raises ConfigError for GPUs that cannot be divided so."""
    recipe, gpus = plan.recipe, list(range(plan.gpus))
    engine, learner = recipe.engine, recipe.learner
    if gpus:
        per_engine = recipe.sglang.get("tp_size", 1)
        if not 1 <= plan.learner_gpus <= plan.gpus:
            raise ConfigError(f"--learner-gpus must be 1 to {plan.gpus}, got {plan.learner_gpus}")
        shared = mode == COLOCATED or plan.learner_gpus == plan.gpus
        of_engines = gpus if shared else gpus[: -plan.learner_gpus]
        of_learner = gpus if shared else gpus[-plan.learner_gpus :]
        if len(of_engines) % per_engine:
            raise ConfigError(f"{len(of_engines)} GPUs cannot be divided among engines of {per_engine}")
        engine = dataclasses.replace(engine, count=len(of_engines) // per_engine, devices=tuple(of_engines))
        learner = dataclasses.replace(learner, processes=len(of_learner), devices=tuple(of_learner))
    until_its_turn = plan.start_s + len(plan.modes) * (plan.seconds + END_S)
    queue = dataclasses.replace(
        recipe.queue,
        lease_timeout_s=max(recipe.queue.lease_timeout_s, until_its_turn),
        mode=SYNCHRONOUS if mode == COLOCATED else STREAMING if mode == RELOAD else mode,  # type: ignore[arg-type]
    )
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(
            recipe.run, name=mode, directory=str(plan.directory), steps=NEVER, seconds=plan.seconds
        ),
        queue=queue,
        engine=dataclasses.replace(engine, start_timeout_s=plan.start_s),
        learner=dataclasses.replace(learner, checkpoint_every=0),
        rollout=dataclasses.replace(recipe.rollout, heldout_prompts=0),
        weights=dataclasses.replace(recipe.weights, delivery="reload" if mode == RELOAD else "live"),
    )


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it as one object.  Raises ConfigError for a plan that cannot be carried out; a mode that fails says so in
    its place."""
    if not plan.modes or not set(plan.modes) <= set(MODES) or len(set(plan.modes)) < len(plan.modes):
        raise ConfigError(f"--modes must be some of {', '.join(MODES)}, each once, got {', '.join(plan.modes)}")
    if plan.seconds <= 0:
        raise ConfigError(f"--seconds must be above 0, got {plan.seconds}")
    plan.directory.mkdir(parents=True, exist_ok=True)
    recipes = {mode: of_mode(plan, mode) for mode in plan.modes}
    for mode, recipe in recipes.items():
        if recipe.run_directory.exists():
            raise ConfigError(f"{recipe.run_directory} is there already; give another --directory")
        config.dump(recipe, plan.directory / f"{mode}.toml")
    ended: dict[str, str] = {}
    try:
        asyncio.run(_all(plan, ended, say))
    except KeyboardInterrupt:
        say("interrupted; what was measured is shown all the same")
    modes: dict[str, Any] = {}
    for mode, recipe in recipes.items():
        modes[mode] = loop_figures.figures(recipe.run_directory)
        if problem := ended.get(mode, "interrupted"):
            modes[mode]["error"] = problem
    from engines.megatron import specimen

    return {
        "bench": "loop",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["stream-rl", *sys.argv[1:]]),
        "device": specimen.device_name(),
        "gpus": plan.gpus,
        "learner_gpus": plan.learner_gpus,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds": plan.seconds,
        "recipe": dataclasses.asdict(plan.recipe),
        "modes": modes,
        **loop_figures.compared(modes, plan.reward),
        "targets": loop_figures.TARGETS,
        "includes": loop_figures.INCLUDES,
    }


async def _all(plan: Plan, ended: dict[str, str], say: Callable[[str], None]) -> None:
    """Run every mode; `ended`, by mode: "", or what went wrong."""
    async with contextlib.AsyncExitStack() as stack:
        waiting = {}
        for mode in plan.modes if plan.together else ():
            waiting[mode] = await stack.enter_async_context(_started(plan, mode))
        if plan.together:
            say(f"starting {len(plan.modes)} modes")
            ready = await asyncio.gather(*(_until_held(run, plan.start_s) for run in waiting.values()))
            ended |= {mode: problem for mode, problem in zip(waiting, ready, strict=True) if problem}
        for mode in plan.modes:
            if mode not in ended:
                async with _started(plan, mode) if not plan.together else contextlib.nullcontext(waiting[mode]) as run:
                    assert run is not None
                    problem = "" if plan.together else await _until_held(run, plan.start_s)
                    ended[mode] = problem or await _turn(plan, mode, run, say)
            if ended[mode]:
                say(f"{mode}: {ended[mode]}")


@dataclass(frozen=True, slots=True)
class _Started:
    """A mode's `stream-rl train`."""

    process: asyncio.subprocess.Process
    output: pathlib.Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@contextlib.asynccontextmanager
async def _started(plan: Plan, mode: str) -> AsyncIterator[_Started]:
    output = plan.directory / f"{mode}.out"
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scripts.cli", "train", str(plan.directory / f"{mode}.toml"), "--hold",
            stdin=asyncio.subprocess.PIPE, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        yield _Started(process, output)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()  # it ends by itself: supervise.stop_timeout_s bounds it


async def _until_held(run: _Started, seconds: float) -> str:
    """ "", or why the mode is not there."""
    try:
        async with asyncio.timeout(seconds):
            while HELD not in run.text():
                if run.process.returncode is not None:
                    return f"ended while starting:\n{run.text()[-OUTPUT_END:]}"
                await asyncio.sleep(0.5)  # a file has no other way to say that it grew
    except TimeoutError:
        return f"was not up after {seconds:.0f} s:\n{run.text()[-OUTPUT_END:]}"
    return ""


async def _turn(plan: Plan, mode: str, run: _Started, say: Callable[[str], None]) -> str:
    """Let one mode work until its time is up; "", or what went wrong."""
    say(f"{mode} begins")
    assert run.process.stdin is not None
    run.process.stdin.write(b"\n")
    try:
        async with asyncio.timeout(plan.seconds + END_S), asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(_kill(run, plan.kill_after, say))
            code = await run.process.wait()
            killing.cancel()
    except TimeoutError:
        return f"had not ended {END_S:.0f} s after its time:\n{run.text()[-OUTPUT_END:]}"
    found = loop_figures.figures(plan.directory / mode)
    if rate := found.get("trained_tokens_per_second"):
        say(f"{mode}: {found['steps']} steps, {rate:,.0f} trained tok/s, G {found['G']:.2f} s, T {found['T']:.2f} s")
    return f"ended with status {code}:\n{run.text()[-OUTPUT_END:]}" if code else ""


async def _kill(run: _Started, after: float, say: Callable[[str], None]) -> None:
    """kill -9 of the last engine; the run's supervisor starts another."""
    if after <= 0:
        return
    await asyncio.sleep(after)
    tree = psutil.Process(run.process.pid).children(recursive=True)
    engines = [process for process in tree if "engines.sglang.server" in " ".join(_words(process))]
    named = {words[words.index("--name") + 1]: process for process in engines if "--name" in (words := _words(process))}
    if not named:
        raise StreamRLError("there is no engine to kill")
    name = max(named)
    named[name].kill()
    say(f"killed {name}")


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--modes", default=",".join(MODES), show_default=True, metavar="MODE[,MODE...]", help="See above.")
@click.option("--seconds", default=90.0, show_default=True, help="Of each mode, from its first lease.")
@click.option("--gpus", default=0, show_default=True, help="0: the recipe's engines and devices as they are.")
@click.option("--learner-gpus", default=1, show_default=True, help="Of them, the last; if all, engines share them.")
@click.option("--together/--in-turn", default=None, help="Start all modes first.  [default: with GPUs]")
@click.option("--kill-after", default=0.0, show_default=True, help="Kill an engine so many seconds into each mode.")
@click.option("--reward", type=float, help="To measure the time to.  [default: what every mode reached]")
@click.option("--start-seconds", default=300.0, show_default=True, help="For a mode to start.")
@click.option("--directory", type=click.Path(path_type=pathlib.Path), help="Of the runs.  [default: runs/loop-TIME]")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def loop(
    recipe: pathlib.Path,
    overrides: tuple[str, ...],
    modes: str,
    together: bool | None,
    directory: pathlib.Path | None,
    start_seconds: float,
    path: pathlib.Path | None,
    **plan: Any,
) -> None:
    """The whole system by RECIPE in several modes: streaming, synchronous, colocated, one_step_off, rounds, reload."""
    began = time.perf_counter()
    made = Plan(
        recipe=config.load(recipe, overrides),
        modes=tuple(mode for mode in modes.split(",") if mode),
        together=plan["gpus"] > 0 if together is None else together,
        directory=directory or pathlib.Path("runs") / time.strftime("loop-%H%M%S"),
        start_s=start_seconds,
        **plan,
    )
    result = finite(measure(made, lambda line: click.echo(f"{time.perf_counter() - began:6.1f} s  {line}", err=True)))
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
    if any("error" in mode for mode in result["modes"].values()):
        sys.exit(1)
