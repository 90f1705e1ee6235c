"""mypy and ruff have nothing to say, and the rules of CONTRIBUTING.md that they cannot check hold."""

import ast
import io
import pathlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("stream_rl", "engines", "queues", "algorithms", "actors", "scripts")

# -- mypy and ruff -------------------------------------------------------------------------------------------


def tool(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """One of the tools, with the project's configuration."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


RUFF, FORMAT, MYPY = ("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)
CONFIGURED = {RUFF: ("--config", ROOT / "pyproject.toml"), FORMAT: ("--config", ROOT / "pyproject.toml"), MYPY: ()}


@pytest.mark.parametrize("command", [RUFF, FORMAT, MYPY], ids=" ".join)
def test_the_tree_passes(command: tuple[str, ...]) -> None:
    done = tool(*command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "source", "says"),
    [
        (RUFF, "import os\n", "F401"),
        (RUFF, "try:\n    x = 1\nexcept Exception:\n    pass\n", "BLE001"),
        (RUFF, "import time\n\n\nasync def f() -> None:\n    time.sleep(1)\n", "ASYNC251"),
        (FORMAT, "x = {  'a':1 }\n", "would be reformatted"),
        (MYPY, "def f(x):\n    return x\n", "no-untyped-def"),
        (MYPY, "x: int = 'one'\n", "assignment"),
        (MYPY, "def f(x: list) -> None: ...\n", "type-arg"),
        (MYPY, "def f(x: int) -> int:\n    return 1\n    return 2\n", "unreachable"),
    ],
)
def test_a_planted_violation_fails(tmp_path: pathlib.Path, command: tuple[str, ...], source: str, says: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(source)
    done = tool(*command, *CONFIGURED[command], planted)
    assert done.returncode == 1
    assert says in done.stdout


# -- our own -------------------------------------------------------------------------------------------------

BROAD = {"Exception", "BaseException"}
DIRECTIVE = re.compile(r"#\s*(noqa(:\s*[A-Z0-9, ]+)?|type:\s*ignore(\[[^]]*\])?|fmt:\s*\w+|pragma:.*?$)", re.IGNORECASE)


def offences(source: str, name: str) -> list[str]:
    tree = ast.parse(source, name)
    comments = reasons(source)
    groups = task_groups(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler() if catches_everything(node.type):
                if node.lineno not in comments and not raises(node):
                    caught = ast.unparse(node.type) if node.type else "everything"
                    found.append((node.lineno, f"catches {caught}: raise again, or give the reason on that line"))
            case ast.Attribute(attr="ensure_future") | ast.ImportFrom(module="asyncio") if starts_loose_task(node):
                found.append((node.lineno, "starts a task that nobody awaits: use a TaskGroup"))
            case ast.Attribute(attr="create_task", value=owner) if ast.unparse(owner) not in groups:
                found.append(
                    (node.lineno, f"{ast.unparse(owner)}.create_task is no TaskGroup's: nobody awaits the task")
                )
            case ast.Attribute(attr="sleep", value=ast.Name(id="time")):
                found.append((node.lineno, "time.sleep: wait for what you wait for, with a timeout"))
            case ast.ImportFrom(module="time", names=names) if any(alias.name == "sleep" for alias in names):
                found.append((node.lineno, "time.sleep: wait for what you wait for, with a timeout"))
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def reasons(source: str) -> set[int]:
    """Lines with a comment that says something to a reader, not only to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)
    return {line for line, comment in comments if re.search(r"[a-zA-Z]{2}", DIRECTIVE.sub("", comment))}


def catches_everything(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    parts = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(part, ast.Name) and part.id in BROAD for part in parts)


def raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends by raising, so that nothing is swallowed."""
    return isinstance(handler.body[-1], ast.Raise)


def starts_loose_task(node: ast.Attribute | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Attribute):
        return True
    return any(alias.name in {"create_task", "ensure_future"} for alias in node.names)


def task_groups(tree: ast.AST) -> set[str]:
    """Names that are a TaskGroup wherever they occur in a file: `async with TaskGroup() as name`, `name: TaskGroup`."""

    def named(kind: ast.expr | None) -> bool:
        return kind is not None and ast.unparse(kind) in {"asyncio.TaskGroup", "TaskGroup"}

    def found() -> Iterator[str]:
        for node in ast.walk(tree):
            match node:
                case ast.withitem(context_expr=ast.Call(func=function), optional_vars=ast.expr() as name):
                    if named(function):
                        yield ast.unparse(name)
                case ast.arg(arg=name, annotation=kind) if named(kind):
                    yield name
                case ast.AnnAssign(target=name, annotation=kind) if named(kind):
                    yield ast.unparse(name)

    return set(found())


def test_the_tree_keeps_the_house_rules() -> None:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert len(paths) > 40
    found = [offence for path in paths for offence in offences(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "line", "says"),
    [
        ("try: f()\nexcept Exception: pass", 2, "catches Exception"),
        ("try: f()\nexcept BaseException as error:\n    log(error)", 2, "catches BaseException"),
        ("try: f()\nexcept (OSError, Exception):\n    pass", 2, "catches (OSError, Exception)"),
        ("try: f()\nexcept:\n    pass", 2, "catches everything"),
        ("try: f()\nexcept Exception:  # noqa: BLE001\n    pass", 2, "catches Exception"),
        ("try: f()\nexcept Exception:\n    if x:\n        raise\n    y()", 2, "catches Exception"),
        ("import asyncio\nasyncio.create_task(f())", 2, "asyncio.create_task is no TaskGroup's"),
        ("loop.create_task(f())", 1, "loop.create_task is no TaskGroup's"),
        ("asyncio.get_running_loop().create_task(f())", 1, "create_task is no TaskGroup's"),
        ("asyncio.ensure_future(f())", 1, "nobody awaits"),
        ("from asyncio import create_task", 1, "nobody awaits"),
        ("import time\ntime.sleep(1)", 2, "time.sleep"),
        ("from time import sleep", 1, "time.sleep"),
    ],
)
def test_a_planted_offence_is_named(source: str, line: int, says: str) -> None:
    [offence] = offences(source, "planted.py")
    assert offence.startswith(f"planted.py:{line}: ")
    assert says in offence


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept OSError: pass",
        "try: f()\nexcept Exception:  # noqa: BLE001  the user's code may raise anything\n    pass",
        "try: f()\nexcept Exception as error:\n    raise TaskError() from error",
        "try: f()\nexcept BaseException:\n    close()\n    raise",
        "async def f():\n    async with asyncio.TaskGroup() as group:\n        group.create_task(g())",
        "def f(group: asyncio.TaskGroup) -> None:\n    group.create_task(g())",
        "from asyncio import TaskGroup, sleep",
        "import asyncio\nasync def f():\n    await asyncio.sleep(1)",
    ],
)
def test_what_is_allowed_is_no_offence(source: str) -> None:
    assert offences(source, "planted.py") == []
