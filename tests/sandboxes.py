"""What is done to a sandbox in the tests: programs that try to get out or to take all."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from engines.sandbox.box import Limits, Result, Sandbox

T = TypeVar("T")
needs_sandbox = pytest.mark.skipif(bool(Sandbox.problem()), reason=Sandbox.problem())
SMALL = Limits(seconds=20.0, memory_bytes=192 << 20, processes=16, disk_bytes=4 << 20, files=500, output_bytes=1000)

FORK_BOMB = """
import os, time
def fork():
    try:
        return os.fork()
    except OSError:
        return -1
children = 0
while (child := fork()) > 0:
    children += 1
if not child:
    time.sleep(100)
print(children)
"""
MEMORY_BOMB = """
import os, time
for _ in range(6):
    if not os.fork():
        hoard = bytearray(os.urandom(1 << 20) * 60)
        time.sleep(100)
time.sleep(100)
"""
DAEMON = """
import os, signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
if not os.fork():
    os.setsid()
    if not os.fork():
        while True: time.sleep(0.01); open("/work/beat", "w").close()
time.sleep(0.3)
"""


def inside(play: Callable[[Sandbox], Awaitable[T]], limits: Limits = SMALL) -> T:
    async def go() -> T:
        async with Sandbox(limits) as box:
            return await play(box)

    return asyncio.run(go())


def python(source: str, limits: Limits = SMALL, seconds: float | None = None) -> Result:
    """What becomes of a program; afterwards nobody is left in its sandbox, and it works as before."""

    async def play(box: Sandbox) -> Result:
        result = await box.run(["python3", "-c", source], seconds=seconds)
        others = await box.run(["sh", "-c", "echo /proc/[0-9]*"])
        assert len(others.stdout.split()) == 2, "process 1 and sh"
        return result

    return inside(play, limits)


def all_attacks() -> None:
    """For a process of an ordinary user: the same holds there."""
    assert not Sandbox.problem(), Sandbox.problem()
    bomb = python(FORK_BOMB)
    assert int(bomb.stdout) < SMALL.processes, bomb
    assert python(MEMORY_BOMB).ended == "memory"
    assert python(DAEMON).ended == "exit"
    assert python("while True: pass", seconds=0.3).ended == "timeout"
    for attack in (
        "import os; os.unshare(0x10000000)" if sys.version_info >= (3, 12) else "import os; os.chroot('/')",
        "open('/usr/mine', 'w')",
        "open('/mine', 'w')",
        "open('/proc/1/mem', 'rb')",
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "import os; os.setuid(0); open('/usr/mine', 'w')",
    ):
        result = python(attack)
        assert result.exit == 1 and b"Error" in result.stderr, (attack, result)
    killed = python("import os; os.kill(1, 9); os.kill(1, 19); print('still here')")
    assert killed.stdout == b"still here\n", killed


if __name__ == "__main__":
    all_attacks()
    print("contained")
