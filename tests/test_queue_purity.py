"""The core is a function of its events: no clock, socket, file or chance."""

import ast
import pathlib

import pytest
from queue_builders import Row, Run, make_core, rid

from queues.core import JOURNAL, Tick
from stream_rl.wire import encode

QUEUES = pathlib.Path(__file__).parent.parent / "queues"
SHELL = {"process.py", "journal.py", "database.py", "snapshot.py"}
"""What runs around the core, and what sees its objects by their identity."""
IMPURE = {
    "time",
    "datetime",
    "random",
    "secrets",
    "os",
    "socket",
    "zmq",
    "asyncio",
    "threading",
    "io",
    "pathlib",
    "uuid",
}
IMPURE_OURS = {"stream_rl.transport", "stream_rl.runtime"} | {f"queues.{name[:-3]}" for name in SHELL}


def impurities(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] * (node.func.id in {"open", "print", "input", "hash", "id"})
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += ["np.random"] * (node.value.id == "np" and node.attr == "random")
        found += [name for name in names if name.split(".")[0] in IMPURE or name in IMPURE_OURS]
    return found


@pytest.mark.parametrize("path", sorted(p for p in QUEUES.glob("*.py") if p.name not in SHELL), ids=lambda p: p.name)
def test_the_core_reaches_for_nothing_outside(path):
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize(
    "source", ["import time", "from stream_rl import transport", "import numpy as np\nnp.random.rand()", "open('x')"]
)
def test_an_impure_core_would_be_noticed(source):
    assert impurities(source)


def test_the_same_events_give_the_same_actions():
    run = Run()
    for step in range(3):
        run.grow(2 * step, [3, 4], (0, step))
        run.grow(2 * step + 1, [2, 5], (0, step))
        run.request(step)
        run.apply(step)
    run.open(6, 2)
    run.chunks(Row(rid(6, 0), 0, [4, 5]))
    run.hello("engine", incarnation=2)
    run.hello("actor", incarnation=2)
    run.request(1, history=1)
    run.say("", Tick())
    run.shutdown()
    first, second = (replay(run) for _ in range(2))
    assert first == second
    assert len(first) > 20


def replay(run: Run) -> list[tuple[str, object]]:
    core = make_core()
    actions: list[tuple[str, object]] = []
    for now, sender, event in run.log:
        actions += core.handle(now, sender, event)
    return [(to, message if to == JOURNAL else [bytes(f) for f in encode(message)]) for to, message in actions]
