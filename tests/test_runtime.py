"""How a process ends: by its first failure, by a signal, or when its work is done; nothing is left running."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Coroutine
from typing import Any

import pytest

from stream_rl import runtime
from stream_rl.runtime import Stopped, supervise

ROOT = pathlib.Path(__file__).parent.parent


class Boom(Exception):
    pass


class Journal:
    """What the loops of a test did."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def forever(self, name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.lines.append(f"{name} ended")

    async def fail(self, error: BaseException, after: float = 0.0) -> None:
        await asyncio.sleep(after)
        raise error

    async def work(self, name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.lines.append(f"{name} done")


def play(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main

    asyncio.run(bounded())


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_the_first_failure_ends_the_others_and_is_raised_itself() -> None:
    journal, boom = Journal(), Boom("first")
    with pytest.raises(Boom) as caught:
        play(supervise(a=journal.forever("a"), b=journal.fail(boom, 0.01), c=journal.forever("c")))
    assert caught.value is boom
    assert sorted(journal.lines) == ["a ended", "c ended"]


def test_a_failure_while_the_others_clean_up_does_not_hide_the_first() -> None:
    async def clumsy() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise Boom("second")

    with pytest.raises(Boom, match="first"):
        play(supervise(a=clumsy(), b=Journal().fail(Boom("first"), 0.01)))


def test_a_failure_inside_a_loops_own_group_is_raised_itself() -> None:
    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(Journal().fail(Boom("inner")))

    with pytest.raises(Boom, match="inner"):
        play(supervise(a=grouped(), b=Journal().forever("b")))


def test_a_loop_that_says_stopped_ends_the_others_as_a_stop() -> None:
    journal = Journal()
    with pytest.raises(Stopped):
        play(supervise(a=journal.forever("a"), b=journal.fail(Stopped(), 0.01)))
    assert journal.lines == ["a ended"]


def test_a_failure_is_news_even_when_a_stop_came_first() -> None:
    async def clumsy() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise Boom("while stopping")

    with pytest.raises(Boom, match="while stopping"):
        play(supervise(a=clumsy(), b=Journal().fail(Stopped(), 0.01)))


def test_a_loop_that_returns_lets_the_others_go_on() -> None:
    journal = Journal()
    play(supervise(a=journal.work("a", 0.0), b=journal.work("b", 0.05), c=journal.work("c", 0.1)))
    assert journal.lines == ["a done", "b done", "c done"]


def test_a_failure_after_another_loop_returned_is_still_raised() -> None:
    with pytest.raises(Boom):
        play(supervise(a=Journal().work("a", 0.0), b=Journal().fail(Boom(), 0.05)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_every_loop_and_gives_the_handlers_back(number: signal.Signals) -> None:
    journal, before = Journal(), handlers()

    async def signalling() -> None:
        await asyncio.sleep(0.02)
        assert handlers() != before
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    async def main() -> None:
        with pytest.raises(Stopped):
            await supervise(a=journal.forever("a"), b=signalling())
        assert signal.getsignal(signal.SIGTERM) == before[0], "given back here, not only when the event loop closes"

    play(main())
    assert journal.lines == ["a ended"]
    assert handlers() == before


def test_cancelling_the_supervision_ends_every_loop_and_gives_the_handlers_back() -> None:
    journal, before = Journal(), handlers()

    async def main() -> None:
        inside = asyncio.current_task()
        assert inside is not None
        task = asyncio.create_task(supervise(a=journal.forever("a"), b=journal.forever("b")))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(journal.lines) == ["a ended", "b ended"]
        assert asyncio.all_tasks() == {inside}

    play(main())
    assert handlers() == before


def script(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_process_that_gets_sigterm_ends_cleanly_and_cleans_up() -> None:
    process = script(
        """
        import asyncio
        from stream_rl import runtime
        async def loop():
            try:
                print("up", flush=True)
                await asyncio.Event().wait()
            finally:
                print("cleaned", flush=True)
        async def main():
            await runtime.supervise(loop=loop())
        runtime.run(main())
        print("after", flush=True)
        """
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "cleaned\nafter\n"), errors


def test_a_process_whose_loop_fails_ends_by_that_failure() -> None:
    process = script(
        """
        import asyncio
        from stream_rl import runtime
        async def fails():
            await asyncio.sleep(0.01)
            raise KeyError("the reason")
        async def main():
            await runtime.supervise(fails=fails(), other=asyncio.sleep(60))
        runtime.run(main())
        """
    )
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.rstrip().endswith("KeyError: 'the reason'")
    assert "ExceptionGroup" not in errors


def test_a_process_dies_with_the_one_that_started_it() -> None:
    parent = script(
        """
        import subprocess, sys
        child = subprocess.Popen(
            [sys.executable, "-c",
             "import os, time; from stream_rl import runtime; runtime.die_with_parent(); "
             "print(os.getpid(), flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE, text=True)
        print(child.stdout.readline(), end="", flush=True)
        child.wait()
        """
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    watch = os.pidfd_open(child)
    parent.kill()
    parent.communicate(timeout=20)
    import select

    ended, _, _ = select.select([watch], [], [], 20)
    os.close(watch)
    assert ended, f"process {child} outlived its parent"


def test_readiness_is_one_json_line_and_the_pipe_stays_open() -> None:
    reader, writer = os.pipe()
    runtime.report_ready(None, address="nobody listens")
    runtime.report_ready(writer, address="tcp://127.0.0.1:1", pid=3)
    assert json.loads(os.read(reader, 1000)) == {"address": "tcp://127.0.0.1:1", "pid": 3}
    os.write(writer, b"still open")
    os.close(writer)
    assert os.read(reader, 1000) == b"still open"
    os.close(reader)
