"""`stream-rl train`: start every process of a run, keep them alive, show how it goes, end them, say what came of it.

    queue ─▶ publisher ─▶ engines, learner ─▶ actor          each start needs the addresses of those before it

A process that ends by itself is started again (`scripts.supervisor`); one that does so too often ends the run, with its
name and the end of its log.
"""

import asyncio
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts import preflight, runs
from scripts.progress import Dashboard
from scripts.runs import Run
from scripts.supervisor import Processes, Program, Restart
from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import Hello, Refused, Shutdown, Status, StatusRequest, StepRecord, StockReport, VersionReport
from stream_rl.metrics import JsonLines, finite, read_lines, unflatten
from stream_rl.session import Session
from stream_rl.task import task_file
from stream_rl.transport import Dealer

HELD = "held: everything but the rollout actor is up"
NOT_IN_SUMMARY = ("queue", "peers")
"""Parts of the queue's status that tell of a moment, not of the run."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Programs that start at the same time, once those of the stages before have been up."""

    says: str
    programs: Sequence[Program]
    held: bool = False
    """With `--hold` it waits for a line on standard input."""


def stages(recipe: config.Recipe) -> list[Stage]:
    """Every process of a run.  The first is the queue, whose conversation the supervisor needs from then on."""
    journal = str(recipe.run_directory / "journal.db")
    links, port = ("queue", "publisher"), recipe.sglang.get("port", 0)
    queue = Program(name="queue", module="queues.process", arguments=("--journal", journal), keeps_address=True)
    publisher = Program(
        name="publisher", module="engines.weights.publisher", links=("queue",), keeps_address=True, peer="publisher-0"
    )
    learner = of_learner(
        recipe,
        Program(name="learner", module="actors.learner", links=links, peer="learner-0", threads=recipe.learner.threads,
                devices=recipe.learner.devices[: recipe.learner.processes]),
    )  # fmt: skip
    engines = [
        Program(
            name=name, module="engines.sglang.server", links=links, peer=name,
            arguments=("--name", name, "--port", str(port and port + i)), devices=_devices(recipe, i),
        )
        for i in range(recipe.engine.count) for name in [f"engine-{i}"]
    ]  # fmt: skip
    actor = Program(name="actor", module="actors.rollout", links=("queue",), peer="actor-0")
    return [
        Stage("starting the queue", [queue]),
        Stage("starting the publisher", [publisher]),
        Stage(
            f"starting {recipe.engine.count} x SGLang and the learner (about half a minute)", [learner, *engines]
        ),
        Stage("starting the rollout actor; held-out prompts first", [actor], held=True),
    ]  # fmt: skip


def _devices(recipe: config.Recipe, engine: int) -> tuple[int, ...]:
    """GPUs of the engine with this number."""
    devices, ranks = recipe.engine.devices, recipe.sglang.get("tp_size", 1)
    return tuple(devices[(engine * ranks + rank) % len(devices)] for rank in range(ranks)) if devices else ()


def of_learner(recipe: config.Recipe, program: Program) -> Program:
    """`program` in as many processes as the learner has, started by torchrun."""
    processes = recipe.learner.processes
    if processes == 1:
        return program
    words = ("--processes", str(processes), "--module", program.module)
    return dataclasses.replace(program, module="engines.megatron.launch", arguments=(*program.arguments, *words))


def train(recipe: config.Recipe, resume: bool = False, hold: bool = False) -> dict[str, Any]:
    """Run a recipe to its end, from its beginning or from where its run was left; the summary.

    hold: wait for a line on standard input when all but the rollout actor is up, having said HELD.

    Raises StreamRLError naming what is wrong or what died, KeyboardInterrupt after a clean stop by Ctrl-C.
    """
    preflight.check(recipe)
    run = runs.resume(recipe) if resume else runs.begin(recipe, functools.partial(print, file=sys.stderr))
    try:
        summary = supervise(run, stages, hold)
    except (StreamRLError, KeyboardInterrupt):
        if any(read_lines(run.directory / "learner.jsonl")):  # a step was taken
            print(f"go on with: stream-rl train {run.directory} --resume", file=sys.stderr)
        raise
    run.write_summary(finite(summary))
    if importlib.util.find_spec("matplotlib") is not None:  # a machine that only trains may do without
        from scripts.report import plot

        plot(run.directory)
    return summary


def supervise(run: Run, table: Callable[[config.Recipe], Sequence[Stage]], hold: bool = False) -> dict[str, Any]:
    """Run the processes of `table` until the queue says that the run has finished; the summary."""
    recipe = run.recipe
    with Dashboard(recipe.run, recipe.supervise.plain_progress_s) as dashboard:
        try:
            return asyncio.run(_Run(run, dashboard, table, hold).run())
        except asyncio.CancelledError:  # SIGTERM
            raise KeyboardInterrupt from None


class _Run:
    """One life of a run, from the first process to the last."""

    def __init__(
        self, run: Run, dashboard: Dashboard, table: Callable[[config.Recipe], Sequence[Stage]], hold: bool
    ) -> None:
        recipe, directory = run.recipe, run.directory
        self._hold = hold
        self._run, self._recipe, self._directory = run, recipe, directory
        self._dashboard, self._table = dashboard, table
        self._processes = Processes(
            (str(directory / "recipe.toml"), "--run-id", run.id),
            directory / "logs",
            recipe.supervise,
            recipe.engine.start_timeout_s,
            self._restarted,
        )
        self._metrics = JsonLines(directory / "metrics.jsonl")
        self._began = time.monotonic() - run.seconds
        self._status: dict[str, Any] = {}
        self._reward: float | None = None
        self._signs, self._moved = "", 0.0

    async def run(self) -> dict[str, Any]:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        loop.add_signal_handler(signal.SIGTERM, main.cancel)
        try:
            return await self._supervise()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, lambda: None)  # it is stopping; the stop itself must not be cut short
            try:
                self._dashboard.phase("stopping")
            finally:  # also when there is nobody to say it to
                await self._processes.stop()
                self._metrics.close()

    async def _supervise(self) -> dict[str, Any]:
        if self._run.lives:
            self._record("resume", {"number": self._run.lives})
        if not set(self._recipe.sglang) <= preflight.SGLANG_FAMILIAR:
            await self._check_sglang()
        if self._recipe.warm_start.steps and self._recipe.model.path == self._run.model:
            self._recipe = await self._warm_start()
            dataclasses.replace(self._run, recipe=self._recipe).write_recipe()
        first, *others = self._table(self._recipe)
        async with asyncio.TaskGroup() as keeping:
            await self._start(keeping, [first])
            name = f"observer-{os.getpid()}"
            hello = Hello(run=self._run.id, role="observer", name=name, incarnation=1, pid=os.getpid())
            address = self._processes["queue"].address
            async with Dealer.connect(address, f"{name}@1") as dealer, asyncio.TaskGroup() as talking:
                session = Session(dealer, hello, self._recipe.supervise)
                await session.start()
                conversation = talking.create_task(session.run(), name="session")
                if self._run.lives and await self._catch_up(session):
                    others = []
                starting = keeping.create_task(self._start(keeping, others), name="start")
                summary = await self._observe(session, starting)
                conversation.cancel()
            starting.cancel()
            self._processes.release()
        return summary

    async def _catch_up(self, session: Session) -> bool:
        """Learn from the queue what the run's former lives came to; whether nothing is left to do but to close the
        books."""
        status = await session.request(StatusRequest(), Status)
        told = unflatten(status.fields, status.texts)
        self._processes.follow({name: peer["incarnation"] for name, peer in told.get("peers", {}).items()})
        version, taken = told["queue"]["version"], told["queue"]["version_step"]
        if status.texts.get("weights_hash_learner") and taken < self._recipe.run.steps and not self._recipe.run.seconds:
            raise StreamRLError(
                f"run.steps can be raised until a run has taken its last step: this one has taken all {taken} and only "
                f"its end is left; go on with run.steps={taken}"
            )
        self._dashboard.note(f"going on with {self._run.id} from version {version}")
        return status.finished

    async def _start(self, keeping: asyncio.TaskGroup, table: Sequence[Stage]) -> None:
        for stage in table:
            if stage.held and self._hold:
                self._dashboard.phase(HELD)
                await _line()
            self._dashboard.phase(stage.says)
            await self._processes.start(keeping, stage.programs)

    async def _observe(self, session: Session, starting: "asyncio.Task[None]") -> dict[str, Any]:
        """Consumes: status of the queue, records of steps and versions.  Waits for: the next.  Produces: the metrics
        file, the dashboard, the end of the run; the summary.  Unblocked by: the queue's timer, or its restart."""
        finished = False
        while True:
            match message := await self._hear(session):
                case StepRecord():
                    self._reward = message.fields.get("reward_mean")
                    self._record("step", {"step": message.step.step} | message.fields)
                case VersionReport() | StockReport():
                    kind = "version" if isinstance(message, VersionReport) else "stock"
                    self._record(kind, dataclasses.asdict(message) | {"version": str(message.version)})
                case Status():
                    self._take(message, starting.done())
                    if finished and _is_closed(message):
                        return self._summary()
                    if finished or message.finished:
                        if not finished:
                            self._processes.release(but=["queue"])
                        finished = True
                        # again after each status that does not show it: the queue may have been killed before it heard
                        await session.send(Shutdown(reason="finished"))
                case Refused():
                    raise StreamRLError(f"the queue refused the supervisor: {message.reason}: {message.detail}")

    async def _hear(self, session: Session) -> Any:
        """The queue's next message.  A queue that is up and says nothing for too long is killed, to be started again:
        it declares others lost, and this is how it is declared lost itself."""
        queue, silence = self._processes["queue"], self._recipe.supervise.silence_timeout_s
        while True:
            incarnation = await queue.up()
            try:
                async with asyncio.timeout(silence):
                    return await session.receive()
            except TimeoutError:
                queue.lost(incarnation, f"was silent for {silence:.0f} s and was killed")

    def _take(self, status: Status, everyone_is_up: bool) -> None:
        self._status = unflatten(status.fields, status.texts)
        numbers = {k: v for k, v in status.fields.items() if not k.startswith("peers.")}
        self._record("status", numbers)
        for name, peer in self._status.get("peers", {}).items():
            if peer.get("lost"):
                why = f"was silent for {peer['silent_s']:.0f} s and was killed"
                self._processes.lost(name, peer["incarnation"], why)
        if faults := self._status.get("plugin_faults"):
            raise StreamRLError(
                f"the plugin failed inside an engine ({faults} faults): it no longer streams or updates; "
                f"look for 'failed' in {self._directory}/logs/engine-*.log"
            )
        if everyone_is_up:
            self._dashboard.update(self._status, self._reward)
            self._notice_stall()

    def _notice_stall(self) -> None:
        """A queue that goes on ticking while nothing else does is no sign of life."""
        names = ("steps", "received_tokens", "heldout_first", "heldout_last", "generated_tokens")
        signs = repr([self._status.get(name) for name in names])
        if signs != self._signs:
            self._signs, self._moved = signs, self._wall()
        if (silence := self._wall() - self._moved) > self._recipe.supervise.stall_timeout_s:
            awaited = self._status.get("queue", {}).get("awaits", "")
            raise PeerTimeout(f"nothing has moved for {silence:.0f} s (supervise.stall_timeout_s); awaited: {awaited}")

    def _restarted(self, restart: Restart) -> None:
        most = self._recipe.supervise.max_restarts
        self._dashboard.note(f"{restart.reason}; started again ({restart.number} of {most})")
        record = {"name": restart.name, "incarnation": restart.incarnation, "reason": restart.reason}
        self._record("restart", record)

    def _record(self, kind: str, fields: dict[str, Any]) -> None:
        self._metrics.write({"kind": kind, "wall_s": self._wall()} | fields)

    def _summary(self) -> dict[str, Any]:
        summary = {name: value for name, value in self._status.items() if name not in NOT_IN_SUMMARY}
        restarts = dict(Counter(self._run.restarts) + Counter(self._processes.restarts))
        of_us = {"restarts": restarts, "resumes": self._run.lives, "wall_s": round(self._wall(), 1)}
        return summary | {"journal_bytes": self._status.get("queue", {}).get("journal_bytes")} | of_us

    async def _check_sglang(self) -> None:
        """Ask SGLang itself whether it has the options of [sglang]: ten seconds of imports, before anything longer."""
        self._dashboard.phase("asking SGLang about its options")
        words = ("--check", "--name", "engine-0", "--queue", "", "--publisher", "")
        await self._processes.run_to_end(Program(name="engine-0", module="engines.sglang.server", arguments=words))

    async def _warm_start(self) -> config.Recipe:
        """The recipe with its model replaced by one that has seen the demonstrations; kept for the next run."""
        recipe = self._recipe
        output = warm_start_directory(recipe)
        if not output.is_dir():
            log = self._directory / "logs" / "warm-start.log"
            self._dashboard.phase(f"warm start: {recipe.warm_start.steps} supervised steps; {log} shows how it goes")
            program = Program(
                name="warm-start", module="actors.warm_start", arguments=("--output", str(output)),
                threads=recipe.learner.threads,
            )  # fmt: skip
            await self._processes.run_to_end(of_learner(recipe, program))
        self._dashboard.phase(f"starting from {output}")
        return dataclasses.replace(recipe, model=config.Model(path=str(output)))

    def _wall(self) -> float:
        return time.monotonic() - self._began


async def _line() -> None:
    """Wait for a line on standard input.  Raises StreamRLError at its end: whoever held the run is gone."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    try:
        if not await reader.readline():
            raise StreamRLError("standard input ended while the run was held")
    finally:
        pipe.close()


def _is_closed(status: Status) -> bool:
    """Nothing of the run is left to decide."""
    return not any(status.fields.get(f"queue.trajectories.{state}") for state in ("in_flight", "ready"))


def warm_start_directory(recipe: config.Recipe) -> pathlib.Path:
    """Beside the model, under a name that changes with everything that the warm start depends on."""
    told = dataclasses.asdict(recipe)
    files = sorted(pathlib.Path(recipe.model.path).glob("*"))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    source = task_file(recipe.task.use).read_bytes()
    parts = [told["task"], source, told["warm_start"], told["learner"], recipe.run.seed, stamp]
    return pathlib.Path(f"{recipe.model.path}-warm-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
