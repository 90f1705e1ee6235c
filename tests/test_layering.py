"""Imports only go down, each library has one home, and no file is too long to read."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

LAYER = {"stream_rl": 0, "engines": 1, "queues": 1, "algorithms": 1, "actors": 2, "scripts": 3}
HOMES = {
    "zmq": ("stream_rl/transport.py",),
    "msgpack": ("stream_rl/wire.py", "stream_rl/plain.py"),
    "uvloop": ("stream_rl/runtime.py",),
    "sglang": ("engines/",),
    "sgl_kernel": ("engines/",),
    "megatron": ("engines/",),
    "torch": ("engines/", "algorithms/"),
    "torchvision": ("engines/",),
    "triton": ("engines/",),
    "safetensors.torch": ("engines/",),
}
"""Where ours may import a library; tests may import it anywhere."""
BANNED = (
    *("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("multiprocessing", "torch.multiprocessing"),
)
"""Nowhere, tests included: bytes of a peer must never run code, and our processes are started by name."""
HEAVY = ("torch", "sglang", "megatron", "transformers")
MAX_LINES = 450


def violations(root: pathlib.Path) -> list[str]:
    """Everything that is wrong in a tree, each as `file:line: what`."""
    return [problem for path in sources(root) for problem in problems(path, root)]


def sources(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for package in [*LAYER, "tests"] for path in (root / package).rglob("*.py"))


def problems(path: pathlib.Path, root: pathlib.Path) -> Iterator[str]:
    name = path.relative_to(root).as_posix()
    package = name.split("/")[0]
    text = path.read_text()
    if (lines := text.count("\n")) > MAX_LINES:
        yield f"{name}:{lines}: {lines} lines; at most {MAX_LINES}, so divide it by what its parts are for"
    helpers = {helper.stem for helper in (root / "tests").glob("*.py")}
    for module, line in imports(ast.parse(text, name), name):
        if (banned := within(module, BANNED)) is not None:
            yield f"{name}:{line}: imports {banned}; nothing of ours may"
        if package == "tests":
            continue
        top = module.split(".")[0]
        if top in LAYER and top != package and LAYER[top] >= LAYER[package]:
            yield f"{name}:{line}: {package} imports {top}, which is {relation(package, top)}"
        if top == "tests" or top in helpers:
            yield f"{name}:{line}: imports {module}, which belongs to the tests"
        if (library := within(module, HOMES)) is not None and not name.startswith(HOMES[library]):
            yield f"{name}:{line}: imports {library}, whose home is {' and '.join(HOMES[library])}"


def imports(tree: ast.AST, name: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, also within functions and by name.  `from a import b` gives a.b as well."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parents = name.split("/")[: -node.level]
                    base = ".".join([*parents, *filter(None, [base])])
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module, node.lineno


def within(module: str, names: tuple[str, ...] | dict[str, tuple[str, ...]]) -> str | None:
    """The longest of `names` that is `module` or one of its parents."""
    found = [name for name in names if module == name or module.startswith(name + ".")]
    return max(found, key=len, default=None)


def relation(package: str, top: str) -> str:
    return "its sibling" if LAYER[top] == LAYER[package] else "above it"


def test_the_tree_keeps_to_its_layers_and_homes() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_checker_reads_every_package() -> None:
    """A checker that walks nothing finds nothing."""
    seen = {path.relative_to(ROOT).parts[0] for path in sources(ROOT)}
    assert seen == {*LAYER, "tests"}
    assert len(sources(ROOT)) > 60


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("stream_rl/a.py", "import queues.core", "stream_rl/a.py:1: stream_rl imports queues, which is above it"),
        ("queues/a.py", "\nfrom engines.sglang import client", "queues/a.py:2: queues imports engines, which is its"),
        ("engines/a.py", "from algorithms.losses import PPOClip", "engines/a.py:1: engines imports algorithms, which"),
        ("algorithms/a.py", "import engines", "algorithms/a.py:1: algorithms imports engines, which is its sibling"),
        ("actors/a.py", "from scripts import cli", "actors/a.py:1: actors imports scripts, which is above it"),
        ("queues/a.py", "def f():\n    import actors.rollout", "queues/a.py:2: queues imports actors, which is above"),
        ("queues/a.py", "from ..actors import rollout", "queues/a.py:1: queues imports actors, which is above it"),
        ("queues/a.py", "import importlib\nimportlib.import_module('actors')", "queues/a.py:2: queues imports actors"),
        ("scripts/a.py", "from helper import x", "scripts/a.py:1: imports helper.x, which belongs to the tests"),
        ("queues/a.py", "import zmq.asyncio", "queues/a.py:1: imports zmq, whose home is stream_rl/transport.py"),
        ("stream_rl/a.py", "import msgpack", "stream_rl/a.py:1: imports msgpack, whose home is stream_rl/wire.py and"),
        ("actors/a.py", "def f():\n    import uvloop", "actors/a.py:2: imports uvloop, whose home is stream_rl/"),
        ("actors/a.py", "from sglang.srt import plugins", "actors/a.py:1: imports sglang, whose home is engines/"),
        ("scripts/a.py", "import megatron.core", "scripts/a.py:1: imports megatron, whose home is engines/"),
        ("actors/a.py", "from torch import Tensor", "actors/a.py:1: imports torch, whose home is engines/ and"),
        ("scripts/a.py", "from safetensors import torch", "scripts/a.py:1: imports safetensors.torch, whose home is"),
        ("engines/a.py", "import pickle", "engines/a.py:1: imports pickle; nothing of ours may"),
        ("engines/a.py", "from torch import multiprocessing", "engines/a.py:1: imports torch.multiprocessing; nothing"),
        ("tests/test_a.py", "import multiprocessing.pool", "tests/test_a.py:1: imports multiprocessing; nothing"),
        ("queues/a.py", "x = 1\n" * 451, "queues/a.py:451: 451 lines; at most 450"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_named(tmp_path: pathlib.Path, file: str, source: str, expected: str) -> None:
    plant(tmp_path, "tests/helper.py", "")
    plant(tmp_path, file, source)
    [found] = violations(tmp_path)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("actors/a.py", "import engines.x, queues.y, algorithms.z, stream_rl.types"),
        ("queues/a.py", "from queues import core\nfrom . import store"),
        ("engines/a.py", "import torch, sglang, megatron.core, safetensors.torch"),
        ("scripts/a.py", "from safetensors.numpy import save_file"),
        ("stream_rl/transport.py", "import zmq, zmq.asyncio"),
        ("tests/test_a.py", "import zmq, torch, helper, scripts.cli"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: pathlib.Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def plant(root: pathlib.Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source)


@pytest.mark.parametrize("modules", ["queues.process, actors.rollout", "scripts.cli, scripts.preflight"])
def test_what_must_start_quickly_loads_nothing_heavy(modules: str) -> None:
    """What the AST cannot see: an import through someone else's module."""
    code = f"import {modules}, sys; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
