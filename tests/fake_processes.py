"""Stand-ins for the processes of a run, started by the real supervisor: `python -m fake_processes RECIPE ... --role R`.

They do what files in the run directory say (`queue.finish`, `NAME.fails.2`), write a line to `lives.jsonl` at each
start, so that a test knows every process that there ever was, and make `NAME.ready.2` when they are ready.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import psutil

from stream_rl import config, runtime
from stream_rl.messages import Hello, Refused, Shutdown, Status, Welcome
from stream_rl.transport import Router

STATUS_SECONDS = 0.1


def recipe(directory: pathlib.Path, **supervise: Any) -> config.Recipe:
    return config.Recipe(
        run=config.Run(name=directory.name, steps=3, directory=str(directory.parent)),
        model=config.Model(path="none"),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=1, max_tokens=2),
        engine=config.Engine(start_timeout_s=20),
        supervise=config.Supervise(**({"stop_timeout_s": 5.0, "retry_s": 0.2} | supervise)),
    )


def lives(directory: pathlib.Path, name: str = "") -> list[dict[str, Any]]:
    """Every start so far, of the process `name` or of all."""
    path = directory / "lives.jsonl"
    text = path.read_text() if path.exists() else ""
    told = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [life for life in told if name in ("", life["name"])]


def is_up(directory: pathlib.Path, name: str, incarnation: int) -> bool:
    """Whether that process has reported that it is ready: one that is killed before never came up."""
    return _ready(directory, name, incarnation).exists()


def _ready(directory: pathlib.Path, name: str, incarnation: int) -> pathlib.Path:
    return directory / f"{name}.ready.{incarnation}"


def left(directory: pathlib.Path, patience: float = 5.0) -> set[int]:
    """Processes of the run that still run, the children of its processes included.  One that was killed has a moment
    to go: the signal is sent, not the end awaited."""
    found = []
    for life in lives(directory):
        for pid in (life["pid"], life["grandchild"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
    running = set()
    for process in psutil.wait_procs(found, timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.add(process.pid)
    return running


class FakeQueue:
    """Welcomes everyone and says each moment how things are."""

    def __init__(self, options: argparse.Namespace, router: Router) -> None:
        self._options, self._router = options, router
        self._directory = pathlib.Path(options.recipe).parent
        self._observers: set[bytes] = set()

    async def serve(self) -> None:
        while True:
            peer, message = await self._router.receive()
            match message:
                case Hello():
                    self._observers.add(peer)
                    await self._router.send(peer, Welcome(run=self._options.run_id, next_sequence=0))
                case _ if peer not in self._observers:
                    await self._router.send(peer, Refused(reason="not_registered", detail="say Hello"))
                case Shutdown():
                    if self._options.incarnation == 1 and (self._directory / "queue.dies-at-shutdown").exists():
                        os.kill(os.getpid(), signal.SIGKILL)
                    (self._directory / "closed").touch()

    async def tell(self) -> None:
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            fields = {"steps": 3.0, "queue.trajectories.in_flight": float(not (self._directory / "closed").exists())}
            fields["received_tokens"] = asyncio.get_running_loop().time()
            texts = {"queue.version": "0.2"}
            fields |= {"queue.version_step": 2.0} | {
                f"peers.{life['name']}-0.incarnation": float(life["incarnation"])
                for life in lives(self._directory)
                if life["name"] != "queue"
            }
            if (self._directory / "learner.done").exists():
                texts["weights_hash_learner"] = "0x1"
            if (lost := self._directory / "queue.loses").exists():
                name, incarnation = lost.read_text().split()
                fields |= {f"peers.{name}.lost": 1, f"peers.{name}.silent_s": 31.0}
                fields[f"peers.{name}.incarnation"] = float(incarnation)
            finished = (self._directory / "queue.finish").exists()
            for peer in self._observers:
                await self._router.send(peer, Status(fields=fields, texts=texts, finished=finished))


def report_ready(options: argparse.Namespace, address: str) -> None:
    runtime.report_ready(options.ready_fd, address=address)
    _ready(pathlib.Path(options.recipe).parent, options.role, options.incarnation).touch()


async def serve_queue(options: argparse.Namespace) -> None:
    async with Router.bind(options.bind or "tcp://127.0.0.1:0") as router:
        queue = FakeQueue(options, router)
        report_ready(options, address=router.address)
        await runtime.supervise(serve=queue.serve(), tell=queue.tell())


def give_up(name: str) -> None:
    """As `runtime.execute` ends a process whose next incarnation would end in the same way."""
    print(f"{name}: it would only repeat", file=sys.stderr, flush=True)
    sys.exit(runtime.NOT_AGAIN)


def main() -> None:
    parser = runtime.arguments(__doc__)
    parser.add_argument("--role", required=True)
    parser.add_argument("--bind", default="")
    parser.add_argument("--queue", default="")
    options = parser.parse_args()
    runtime.die_with_parent()
    directory, name, incarnation = pathlib.Path(options.recipe).parent, options.role, options.incarnation
    # a child that does not end with its parent by itself, as SGLang has them
    grandchild = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    life = {"name": name, "incarnation": incarnation, "pid": os.getpid(), "grandchild": grandchild.pid}
    with (directory / "lives.jsonl").open("a") as file:
        file.write(json.dumps(life | {"bind": options.bind, "queue": options.queue}) + "\n")
    print(f"{name} says hello", flush=True)
    if (directory / f"{name}.refuses.{incarnation}").exists():
        sys.exit(f"{name}: the recipe makes no sense")
    if (directory / f"{name}.fails.{incarnation}").exists():
        sys.exit(3)
    if (directory / f"{name}.hangs.{incarnation}").exists():
        signal.pause()
    signal.signal(signal.SIGUSR1, lambda *_: give_up(name))
    if name == "queue":
        runtime.execute(name, serve_queue, options)
    else:
        report_ready(options, address=options.bind or f"of {name}")
        signal.pause()


if __name__ == "__main__":
    main()
