"""Programs and files go into the sandbox and come out of it, and it ends with whoever opened it."""

import asyncio
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from sandboxes import SMALL, inside, needs_sandbox

from engines.sandbox import box as module
from engines.sandbox.box import Result, Sandbox, SandboxLost
from stream_rl.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = needs_sandbox


def test_a_program_reads_its_stdin_and_says_how_it_ended() -> None:
    async def play(box: Sandbox) -> list[Result]:
        await box.write(
            "deep/er/add.sh", b"#!/bin/sh\nread a b; echo $((a + b)); echo so >&2; exit 7\n", executable=True
        )
        return [
            await box.run(["deep/er/add.sh"], stdin=b"2 40\n"),
            await box.run(["sh", "-c", "kill -SEGV $$"]),
            await box.run(["/no/such/program"]),
            await box.run(["sh", "-c", "echo $MINE $HOME"], environment={"MINE": "yes"}),
        ]

    added, signalled, absent, told = inside(play)
    assert (added.exit, added.ended, added.stdout, added.stderr) == (7, "exit", b"42\n", b"so\n")
    assert signalled.exit == -signal.SIGSEGV
    assert absent.exit == 127 and b"No such file" in absent.stderr
    assert told.stdout == b"yes /work\n"


def test_much_stdin_goes_through_and_a_program_that_reads_none_does_not_wait_for_it() -> None:
    async def play(box: Sandbox) -> None:
        data = bytes(range(256)) * 8192
        counted = await box.run(["wc", "-c"], stdin=data)
        assert counted.stdout == b"%d\n" % len(data)
        assert (await box.run(["true"], stdin=data)).exit == 0

    inside(play)


def test_files_go_in_and_come_back_out_whole() -> None:
    async def play(box: Sandbox) -> None:
        data = os.urandom(300_000)
        await box.write("a/b.bin", data)
        await box.run(["cp", "a/b.bin", "c.bin"])
        assert await box.read("c.bin") == data
        with pytest.raises(OSError, match="more than 1000 bytes"):
            await box.read("c.bin", limit=1000)
        with pytest.raises(OSError, match=r"c\.bin/d"):
            await box.write("c.bin/d", b"")
        with pytest.raises(OSError, match="No such file"):
            await box.read("none")
        with pytest.raises(OSError, match=r"space|too large"):
            await box.write("large", bytes(SMALL.disk_bytes + 1))

    inside(play)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        ("ln -s /inside.py x", "x"),
        ("ln -s /usr/bin d", "d/env"),
        ("ln -s /proc/self/fd/0 x", "x"),
        ("ln -s /proc/1/fd d", "d/0"),
        ("mkfifo x", "x"),
        ("mkdir x", "x"),
        ("true", "../inside.py"),
        ("true", "a/../../inside.py"),
        ("true", "/inside.py"),
        ("true", ""),
        ("true", ".."),
    ],
)
def test_a_read_follows_no_link_and_waits_for_no_pipe(make: str, path: str) -> None:
    async def play(box: Sandbox) -> None:
        assert (await box.run(["sh", "-c", make])).exit == 0
        with pytest.raises(OSError, match=r".+: .+"):
            await box.read(path)
        assert (await box.run(["true"])).exit == 0

    inside(play)


def test_a_write_takes_the_place_of_a_link_and_does_not_follow_it() -> None:
    async def play(box: Sandbox) -> None:
        await box.run(["sh", "-c", "echo old > target; ln -s target link; ln -s /tmp away; mkfifo pipe"])
        await box.write("link", b"new")
        await box.write("pipe", b"file")
        with pytest.raises(OSError, match="away/x"):
            await box.write("away/x", b"")
        assert await box.read("target") == b"old\n" and await box.read("link") == b"new"
        assert await box.read("pipe") == b"file"

    inside(play)


def test_everything_ends_when_the_one_who_opened_it_is_killed() -> None:
    source = """
import asyncio, sys
from engines.sandbox.box import Sandbox
async def main():
    async with Sandbox() as box:
        print("open", flush=True)
        await box.run(["sleep", "987654"], seconds=1000.0)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None and parent.stdout.readline() == b"open\n"
    deadline = time.monotonic() + 30
    family: list[psutil.Process] = []
    while not any("987654" in _words(process) for process in family) and time.monotonic() < deadline:
        family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and len(gone) == len(family)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def test_a_run_that_is_cancelled_takes_the_sandbox_with_it() -> None:
    async def play() -> None:
        async with Sandbox(SMALL) as box:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await box.run(["sleep", "1000"])
            with pytest.raises(SandboxLost):
                await box.run(["true"])
        with pytest.raises(SandboxLost, match="async with"):
            await box.run(["true"])

    asyncio.run(play())


def test_a_sandbox_that_is_killed_says_so_at_once() -> None:
    async def play(box: Sandbox) -> None:
        assert box._process is not None
        asyncio.get_running_loop().call_later(0.3, box._process.kill)
        with pytest.raises(SandboxLost, match="ended"):
            await box.run(["sleep", "1000"], seconds=1000.0)

    inside(play)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions.*needs"),
        ("exit 0", "does not start"),
    ],
)
def test_where_it_does_not_work_the_reason_is_said(
    script: str, said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module, "find_bubblewrap", lambda: str(broken))
    module._problem.cache_clear()
    try:
        with pytest.raises(SandboxLost, match="ended"):
            inside(None)  # type: ignore[arg-type]
        assert re.search(said, Sandbox.problem())
        monkeypatch.setattr(module, "find_bubblewrap", lambda: None)
        module._problem.cache_clear()
        assert "install the package bubblewrap" in Sandbox.problem()
        with pytest.raises(ConfigError, match="bubblewrap"):
            inside(None)  # type: ignore[arg-type]
    finally:
        module._problem.cache_clear()
