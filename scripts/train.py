"""`stream-rl train`: start every process of a run, watch them, show how it goes, end them, say what came of it.

    queue ─▶ publisher ─▶ engines, learner ─▶ actor          each start needs the addresses of those before it

Any process that ends by itself ends the run, with its name and the end of its log.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import signal
import time
from typing import Any

from scripts import preflight
from scripts.processes import Child
from scripts.progress import Dashboard
from scripts.report import plot
from stream_rl import config
from stream_rl.errors import PeerTimeout, StreamRLError
from stream_rl.messages import Hello, Refused, Shutdown, Status, StatusRequest, StepRecord, Welcome
from stream_rl.metrics import JsonLines, finite, unflatten
from stream_rl.task import task_file
from stream_rl.transport import Dealer

INCARNATION = 1
"""Processes are started once in a run; a restart will count up."""
NOT_IN_SUMMARY = ("queue", "peers")
"""Parts of the queue's status that tell of a moment, not of the run."""


def train(recipe: config.Recipe) -> dict[str, Any]:
    """Run a recipe to its end; the summary.  Raises StreamRLError naming what is wrong or what died, KeyboardInterrupt
    after a clean stop by Ctrl-C."""
    preflight.check(recipe)
    directory = fresh_directory(recipe.run_directory)
    with Dashboard(recipe.run.name, recipe.run.steps, recipe.supervise.plain_progress_s) as dashboard:
        try:
            summary = asyncio.run(_Run(recipe, directory, dashboard).run())
        except asyncio.CancelledError:  # SIGTERM
            raise KeyboardInterrupt from None
    (directory / "summary.json").write_text(json.dumps(finite(summary), indent=2) + "\n")
    plot(directory)
    return summary


def fresh_directory(directory: pathlib.Path) -> pathlib.Path:
    """An empty run directory; an earlier run of that name is kept beside it, under a number."""
    if directory.exists():
        number = next(n for n in range(1, 1 << 30) if not directory.with_name(f"{directory.name}.{n}").exists())
        directory.rename(directory.with_name(f"{directory.name}.{number}"))
    for name in ("logs", "checkpoints"):
        (directory / name).mkdir(parents=True)
    return directory


class _Run:
    """One run, from the first process to the last."""

    def __init__(self, recipe: config.Recipe, directory: pathlib.Path, dashboard: Dashboard) -> None:
        self._recipe, self._directory, self._dashboard = recipe, directory, dashboard
        self._run_id = f"{recipe.run.name}-{secrets.token_hex(4)}"
        self._children: list[Child] = []
        self._started = time.monotonic()
        self._finished = asyncio.Event()
        self._status: dict[str, Any] = {}
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
            self._dashboard.phase("stopping")
            await self._stop()

    async def _supervise(self) -> dict[str, Any]:
        config.dump(self._recipe, self._directory / "recipe.toml")
        if not set(self._recipe.sglang) <= preflight.SGLANG_FAMILIAR:
            await self._check_sglang()
        if self._recipe.warm_start.steps:
            self._recipe = await self._warm_start()
            config.dump(self._recipe, self._directory / "recipe.toml")
        async with asyncio.TaskGroup() as group:
            queue_address = await self._start_all(group)
            async with Dealer.connect(queue_address, f"observer-{os.getpid()}") as queue:
                observing = group.create_task(self._observe(queue), name="observe")
                await self._finished.wait()
                observing.cancel()
                summary = await self._close_books(queue)
            await self._stop()
        return summary

    async def _start_all(self, group: asyncio.TaskGroup) -> str:
        """Start every process in order; the queue's address."""
        recipe, again = self._recipe, ("--incarnation", str(INCARNATION))
        self._dashboard.phase("starting the queue and the publisher")
        queue = (await self._start(group, "queue", "queues.process", *again))["address"]
        publisher = (await self._start(group, "publisher", "engines.weights.publisher", "--queue", queue, *again))[
            "address"
        ]
        self._dashboard.phase(f"starting {recipe.engine.count} x SGLang and the learner (about half a minute)")
        links = ("--queue", queue, "--publisher", publisher, *again)
        threads = recipe.learner.threads
        async with asyncio.TaskGroup() as starts:
            starts.create_task(self._start(group, "learner", "actors.learner", *links, threads=threads))
            port = recipe.sglang.get("port", 0)
            engines = {
                name: starts.create_task(
                    self._start(
                        group, name, "engines.sglang.server", *links,
                        "--name", name, "--port", str(port and port + i),
                    )
                )
                for i in range(recipe.engine.count)
                for name in [f"engine-{i}"]
            }  # fmt: skip
        places = [word for name, task in engines.items() for word in ("--engine", f"{name}={task.result()['address']}")]
        self._dashboard.phase("starting the rollout actor; held-out prompts first")
        await self._start(group, "actor", "actors.rollout", "--queue", queue, *again, *places)
        return str(queue)

    async def _start(
        self, group: asyncio.TaskGroup, name: str, module: str, *arguments: str, threads: int = 1
    ) -> dict[str, Any]:
        """Start a process, wait until it is up, and watch it from then on."""
        child = await Child.start(
            name,
            module,
            [str(self._directory / "recipe.toml"), "--run-id", self._run_id, *arguments],
            self._directory / "logs" / f"{name}.log",
            threads,
        )  # fmt: skip
        self._children.append(child)
        fields = await child.ready(self._recipe.engine.start_timeout_s)
        group.create_task(child.watch(), name=f"watch {name}")
        return fields

    async def _observe(self, queue: Dealer) -> None:
        """Consumes: status and step records of the queue.  Waits for: the next.  Produces: the metrics file, the
        dashboard, the end.  Unblocked by: the queue's timer."""
        timeout = self._recipe.supervise.peer_timeout_s
        hello = Hello(
            run=self._run_id, role="observer", name=f"observer-{os.getpid()}", incarnation=INCARNATION, pid=os.getpid()
        )
        await queue.request(hello, Welcome, timeout)
        metrics, reward = JsonLines(self._directory / "metrics.jsonl"), None
        try:
            while True:
                match message := await queue.receive(timeout):
                    case StepRecord():
                        reward = message.fields.get("reward_mean")
                        metrics.write({"kind": "step", "wall_s": self._wall(), "step": message.step.step}
                                      | message.fields)  # fmt: skip
                    case Status():
                        self._take(message)
                        numbers = {k: v for k, v in message.fields.items() if not k.startswith("peers.")}
                        metrics.write({"kind": "status", "wall_s": self._wall()} | numbers)
                        self._dashboard.update(self._status, reward)
                    case Refused():
                        raise StreamRLError(f"the queue refused the supervisor: {message.reason}: {message.detail}")
        finally:
            metrics.close()

    def _take(self, status: Status) -> None:
        self._status = unflatten(status.fields, status.texts)
        if faults := self._status.get("plugin_faults"):
            raise StreamRLError(
                f"the plugin failed inside an engine ({faults} faults): it no longer streams or updates; "
                f"look for 'failed' in {self._directory}/logs/engine-*.log"
            )
        if status.finished:
            self._finished.set()
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

    async def _close_books(self, queue: Dealer) -> dict[str, Any]:
        """What is still in flight is dropped as run_end; the final figures."""
        timeout = self._recipe.supervise.peer_timeout_s
        await queue.send(Shutdown(reason="finished"))
        await queue.send(StatusRequest())
        deadline = time.monotonic() + timeout
        while True:
            message = await queue.receive(deadline - time.monotonic())
            # a status from before the shutdown may still be on its way
            if isinstance(message, Status) and not any(
                message.fields.get(f"queue.trajectories.{state}") for state in ("in_flight", "ready")
            ):
                break
        summary = unflatten(message.fields, message.texts)
        for name in NOT_IN_SUMMARY:
            summary.pop(name, None)
        return summary | {"wall_s": round(self._wall(), 1)}

    async def _check_sglang(self) -> None:
        """Ask SGLang itself whether it has the options of [sglang]: ten seconds of imports, before anything longer."""
        self._dashboard.phase("asking SGLang about its options")
        await self._run_to_end(
            "engine-0", "engines.sglang.server", "--check", "--run-id", self._run_id, "--name", "engine-0",
            "--incarnation", str(INCARNATION), "--queue", "", "--publisher", "",
        )  # fmt: skip

    async def _run_to_end(self, name: str, module: str, *arguments: str, threads: int = 1) -> None:
        """Run a process that does one thing and ends."""
        log, recipe = self._directory / "logs" / f"{name}.log", str(self._directory / "recipe.toml")
        child = await Child.start(name, module, [recipe, *arguments], log, threads)
        self._children.append(child)
        await child.wait()
        self._children.remove(child)

    async def _warm_start(self) -> config.Recipe:
        """The recipe with its model replaced by one that has seen the demonstrations; kept for the next run."""
        recipe = self._recipe
        output = warm_start_directory(recipe)
        if not output.is_dir():
            log = self._directory / "logs" / "warm-start.log"
            self._dashboard.phase(f"warm start: {recipe.warm_start.steps} supervised steps; {log} shows how it goes")
            words = ("--run-id", self._run_id, "--output", str(output))
            await self._run_to_end("warm-start", "actors.warm_start", *words, threads=recipe.learner.threads)
        self._dashboard.phase(f"starting from {output}")
        return dataclasses.replace(recipe, model=config.Model(path=str(output)))

    async def _stop(self) -> None:
        """End the children: those that ask first, those that answer last."""
        timeout = self._recipe.supervise.stop_timeout_s
        asking = [child for child in self._children if child.name not in ("publisher", "queue")]
        async with asyncio.TaskGroup() as group:
            for child in asking:
                group.create_task(child.stop(timeout))
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(child.stop(timeout))

    def _wall(self) -> float:
        return time.monotonic() - self._started


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
