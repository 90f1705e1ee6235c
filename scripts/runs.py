"""A run's directory: begun, moved aside, gone on with.

run.json      whose it is; first, so that whatever follows can be gone on with
recipe.toml   the resolved recipe
journal.db, learner.jsonl, metrics.jsonl, logs/, checkpoints/      grow over all of the run's lives
summary.json  last: the run came to its end
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from queues.store import OF_THE_PROCESS
from scripts import records
from stream_rl import config
from stream_rl.errors import ConfigError

MAY_CHANGE: Mapping[str, Sequence[str]] = {
    "run": ("name", "directory", "steps", "seconds"),
    "rollout": ("heldout_concurrency", "reward_processes", "reward_timeout_s", "request_timeout_s"),
    "queue": OF_THE_PROCESS,
    "learner": ("micro_batch_tokens", "threads", "processes", "devices", "checkpoint_every", "max_skipped_steps",
                "capsules", "peak_flops"),
    "learner.model": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
                      "recompute_granularity", "recompute_method", "recompute_num_layers"),
    "learner.ddp": ("*",),
    "weights": ("*",),
    "engine": ("*",),
    "supervise": [each.name for each in dataclasses.fields(config.Supervise) if each.name != "silence_timeout_s"],
    "sglang": ("*",),
}  # fmt: skip
"""What of a recipe may be another when a run goes on, by table; "*" is all that is in one.  All else decides what is
sampled and trained, or is what the queue's journal was written under."""
PATIENCE_SECONDS = 0.2
"""Between two looks at processes that are ending."""


class _Unreadable(ConfigError):
    """run.json."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run in its directory, about to live."""

    id: str
    recipe: config.Recipe
    model: str
    """model.path of the recipe as it was given: a warm start puts another in its place."""
    lives: int = 0
    """That it has had before this one."""
    seconds: float = 0.0
    """That they took."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Of each process, over them."""

    @property
    def directory(self) -> pathlib.Path:
        return self.recipe.run_directory

    def write_recipe(self) -> None:
        """Where the run's processes read it."""
        _write(self.directory / "recipe.toml", lambda path: config.dump(self.recipe, path))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The run has come to its end."""
        _write(self.directory / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))


def begin(recipe: config.Recipe, note: Callable[[str], object] = lambda text: None) -> Run:
    """A run of its own, in an empty directory.  Raises as `empty`."""
    directory = empty(recipe, note)
    run = Run(f"{recipe.run.name}-{secrets.token_hex(4)}", recipe, recipe.model.path)
    about = {"run": run.id, "model": run.model}
    _write(directory / "run.json", lambda path: path.write_text(json.dumps(about) + "\n"))
    run.write_recipe()
    return run


def empty(recipe: config.Recipe, note: Callable[[str], object] = lambda text: None) -> pathlib.Path:
    """The recipe's run directory with nothing in it; what was there is kept beside it, under a number.

    note: told what of an earlier run a person should know.  Raises ConfigError if that one still goes on.
    """
    directory = recipe.run_directory
    if directory.exists():
        number = next(n for n in range(1, 1 << 30) if not directory.with_name(f"{directory.name}.{n}").exists())
        aside = directory.with_name(f"{directory.name}.{number}")
        if is_unfinished(directory):
            with contextlib.suppress(_Unreadable):
                _wait_for_its_processes(directory, _read(directory)["run"], recipe.supervise.stop_timeout_s)
            note(f"{directory} held a run that had not come to its end; it is {aside} now.  --resume goes on with one")
        directory.rename(aside)
    for name in ("logs", "checkpoints"):
        (directory / name).mkdir(parents=True)
    return directory


def resume(recipe: config.Recipe) -> Run:
    """The run in the recipe's directory, to go on under `recipe`.

    Raises ConfigError if there is none, if it still goes on, and for a recipe that differs where it must not, naming
    every difference.
    """
    directory = recipe.run_directory
    about = _read(directory)
    held = config.load(directory / "recipe.toml")
    if recipe.model.path == about["model"]:
        recipe = dataclasses.replace(recipe, model=held.model)
    if differing := differences(held, recipe):
        raise ConfigError(
            f"the run in {directory} cannot go on under this recipe: {'; '.join(differing)}.  Take them back, or begin "
            f"a run of another name (its model.path may be a checkpoint of this one)"
        )
    _wait_for_its_processes(directory, about["run"], recipe.supervise.stop_timeout_s)
    told = records.read(directory)
    last = max((record["wall_s"] for kind in told.values() for record in kind), default=0.0)
    restarts = Counter(record["name"] for record in told["restart"])
    run = Run(about["run"], recipe, about["model"], 1 + len(told["resume"]), last, restarts)
    run.write_recipe()
    return run


def summary_of(directory: pathlib.Path) -> dict[str, Any] | None:
    """Of a run that has come to its end, None of any other."""
    path = directory / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def is_unfinished(directory: pathlib.Path) -> bool:
    """Whether there is a run that can be gone on with."""
    return (directory / "run.json").exists() and not (directory / "summary.json").exists()


def differences(held: config.Recipe, given: config.Recipe) -> list[str]:
    """Where a run's recipe and the one given for it differ and must not: "run.seed was 0, is 1"."""
    was, now = (_flat(dataclasses.asdict(recipe), "") for recipe in (held, given))
    fixed = [key for key in sorted(was.keys() | now.keys()) if not _may_change(key)]
    return [
        f"{key} was {was.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}"
        for key in fixed
        if key not in was or key not in now or was[key] != now[key]
    ]


def _may_change(key: str) -> bool:
    """Whether a dotted key is one of MAY_CHANGE."""
    *tables, name = key.split(".")
    above = [".".join(tables[: n + 1]) for n in range(len(tables))]
    return name in MAY_CHANGE.get(above[-1], ()) or any("*" in MAY_CHANGE.get(table, ()) for table in above)


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _read(directory: pathlib.Path) -> dict[str, str]:
    path = directory / "run.json"
    try:
        about = json.loads(path.read_text())
        return {name: str(about[name]) for name in ("run", "model")}
    except OSError as error:
        raise _Unreadable(
            f"there is no run in {directory} to go on with: cannot read {path} ({error.strerror}); begin it without "
            "--resume"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Unreadable(f"{path} is not what a run writes there: {error!r}") from error


def _wait_for_its_processes(directory: pathlib.Path, run: str, timeout: float) -> None:
    """What a supervisor that was killed left behind ends by itself, which takes a moment."""
    left = [process for process in psutil.process_iter(["cmdline"]) if _is_of(process, run)]
    end = time.monotonic() + timeout
    while left and time.monotonic() < end:
        psutil.wait_procs(left, timeout=PATIENCE_SECONDS)
        left = [process for process in left if _lives(process)]
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise ConfigError(
            f"the run in {directory} still goes on: its processes {pids} live; stop it with Ctrl-C, or choose another "
            "run.name"
        )


def _is_of(process: psutil.Process, run: str) -> bool:
    """Whether a supervisor started it for this run; a relay serves a run, too, but belongs to nobody's directory."""
    words = process.info["cmdline"] or []
    return run in words and "--ready-fd" in words and process.pid != os.getpid()


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs; one that has ended may wait for long to be reaped by whoever adopted it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _write(path: pathlib.Path, fill: Callable[[pathlib.Path], object]) -> None:
    """Durably, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    fill(new)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
