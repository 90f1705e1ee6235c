"""Compiled loops: kept where that is possible, by several processes at once, and all of them tested."""

import importlib.util
import inspect
import pathlib
import subprocess
import sys

import pytest

from engines.weights.codes import arrays, kernels
from engines.weights.codes.kernels import Kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
PREPARE = """
import sys
from engines.weights.codes import kernels, payload
kernels.PLACES = tuple(sys.argv[1:])
payload.prepare()
assert kernels.kernels().__name__.endswith("loops")
"""


def prepare(*places: pathlib.Path | str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", PREPARE, *map(str, places)])


def files(folder: pathlib.Path) -> dict[str, int]:
    """Machine code and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}


def functions(module: object) -> set[str]:
    public = {name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")}
    return {name for name in public if vars(module)[name].__module__ == getattr(module, "__name__", "")}


def test_both_forms_have_all_the_functions_and_no_more() -> None:
    from engines.weights.codes import fast_loops, loops

    promised = {name for name, value in vars(Kernels).items() if inspect.isfunction(value) and name[0] != "_"}
    assert functions(arrays) - {"check_positions"} == promised
    assert functions(loops) | functions(fast_loops) == promised


def test_machine_code_is_kept_in_the_first_place_that_can_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    barred = str(tmp_path / "file" / "folder")
    assert kernels._writable([barred, str(tmp_path / "a"), str(tmp_path / "b")]) == str(tmp_path / "a")
    assert kernels._writable([barred]) == ""
    assert not (tmp_path / "b").exists()


@pytest.mark.long
def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(tmp_path: pathlib.Path) -> None:
    together = [prepare(tmp_path) for _ in range(3)] + [prepare("/proc/nowhere")]
    assert [process.wait(120) for process in together] == [0, 0, 0, 0]
    kept = files(tmp_path)
    assert {name.split(".")[1].split("-")[0] for name in kept} >= {"_diff", "_apply", "_fast_decode", "_select"}
    assert prepare(tmp_path).wait(60) == 0
    assert files(tmp_path) == kept, "everything was there already"
