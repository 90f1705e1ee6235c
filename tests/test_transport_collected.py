"""Sockets that nobody closed, when Python collects them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("kind", ["asyncio", "thread"])
def test_what_was_never_closed_does_not_stop_the_process_when_it_is_collected(kind: str) -> None:
    leak = {
        "asyncio": "import asyncio\n"
        "async def leak():\n    both = [Router.bind('tcp://127.0.0.1:0')]\n    both.append(both)\n"
        "asyncio.run(leak())",
        "thread": "both = [ThreadHub()]\nboth[0].connect('a', 'tcp://127.0.0.1:1', 'b')\nboth.append(both)\ndel both",
    }[kind]
    program = f"import gc\nfrom stream_rl.transport import Router, ThreadHub\n{leak}\ngc.collect()\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "went on" in done.stdout, done.stderr
