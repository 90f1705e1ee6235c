"""How our processes run: one event loop each, one task group, a clean end.

A process of a run is started by the supervisor (`scripts.train`), tells it through an inherited pipe when it is up,
runs its named loops until the first of them fails or SIGTERM comes, and dies with its parent.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from stream_rl.errors import StreamRLError, WouldOnlyRepeat

log = logging.getLogger(__name__)
Main = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]
PARENT = "STREAM_RL_PARENT"
"""Environment variable with the starting process's pid; taken out at once, so that grandchildren do not inherit it."""
_PR_SET_PDEATHSIG = 1
NOT_AGAIN = 65
"""Exit status of a process that need not be started again: it would end in the same way."""


class Stopped(Exception):
    """SIGTERM or SIGINT came, or a loop said that the work is done."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a process's main coroutine to its end on uvloop; a stop signal is a clean end."""
    die_with_parent()
    with contextlib.suppress(Stopped):
        uvloop.run(main)


def arguments(description: str | None, *links: str) -> argparse.ArgumentParser:
    """The command line that every process of a run takes; `links` are addresses of the processes it talks to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the resolved recipe, as `stream-rl train` writes it")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--incarnation", type=int, default=1, help="grows with every start of this process")
    parser.add_argument("--ready-fd", type=int, help="an inherited pipe on which to say that it is up")
    for link in links:
        parser.add_argument(f"--{link}", required=True, metavar="ADDRESS")
    return parser


def execute(
    name: str, main: Callable[[argparse.Namespace], Coroutine[Any, Any, None]], options: argparse.Namespace
) -> None:
    """Run a process's `main`; what is wrong in our own words ends it with one line and status 1, or NOT_AGAIN."""
    log_to_stderr(name)
    try:
        run(main(options))
    except WouldOnlyRepeat as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(NOT_AGAIN)
    except StreamRLError as error:
        sys.exit(f"{name}: {error}")


def die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone, however it went (Linux).

    A parent that names itself in `PARENT` is also missed if it went before this call, while we were importing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if (parent := os.environ.pop(PARENT, None)) is not None and os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")


async def supervise(**loops: Coroutine[Any, Any, Any]) -> None:
    """Run named loops together until one fails, one raises Stopped, or a stop signal comes; then end them all.

    A loop may return when its work is done; the others go on.  The first failure is raised as it is, not as a group.
    """

    async def stop_on_signal() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            await stop.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        raise Stopped

    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(stop_on_signal(), name="signals")
            tasks = [group.create_task(loop, name=name) for name, loop in loops.items()]
            await asyncio.wait(tasks)
            watch.cancel()
    except BaseExceptionGroup as failures:
        first = _first(failures)
        if not isinstance(first, Stopped):
            log.error("ended by %s: %s", type(first).__name__, first)
        raise first from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A failure is news; a stop that came with it is not."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in leaves if not isinstance(error, Stopped)), leaves[0])


def report_ready(fd: int | None, **fields: str | int) -> None:
    """Tell the supervisor that this process is up."""
    if fd is not None:
        os.write(fd, (json.dumps(fields) + "\n").encode())


def log_to_stderr(name: str) -> None:
    """One line an event, with the process's name; the supervisor keeps stderr in the run's folder."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {name} %(levelname).1s %(name)s: %(message)s"
    )
