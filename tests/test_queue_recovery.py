"""A core that comes back from a snapshot, from rows, or from both is the core that was."""

import dataclasses
import pathlib
import sqlite3
from typing import Any

import numpy as np
import pytest
from journal_builders import tidy
from queue_builders import Run, make_core

from queues import snapshot
from queues.core import JOURNAL, QueueCore, Tick
from queues.journal import Journal, recover_core
from queues.snapshot import dump, load
from stream_rl import wire


def test_every_class_of_the_queue_and_every_message_may_be_part_of_the_state_but_nothing_of_the_shell() -> None:
    names = snapshot.classes()
    for name in ("core.QueueCore", "store.Store", "trajectories.Trajectory", "ledger.State", "tallies.Window"):
        assert f"queues.{name}" in names
    assert set(wire.registered().values()) <= set(names.values())
    assert {"stream_rl.types.Version", "stream_rl.config.Queue", "stream_rl.metrics.Histogram"} <= set(names)
    shell = tuple(f"queues.{module}" for module in ("process", "journal", "database", "snapshot"))
    assert not [name for name in names if name.startswith(shell)]


def said(actions: list[tuple[str, Any]]) -> list[Any]:
    """Actions in a form that can be compared."""
    return [
        (to, message) if to == JOURNAL else (to, [bytes(np.frombuffer(f, np.uint8)) for f in wire.encode(message)])
        for to, message in actions
    ]


def some_run() -> Run:
    run = Run()
    run.grow(0, [3, 4])
    run.grow(1, [2, 5])
    run.request(0)
    run.apply(0)
    run.commit(1)
    run.open(2)
    return run


def test_a_loaded_core_goes_on_as_the_one_it_was_taken_from() -> None:
    run = some_run()
    copy = dataclasses.replace(run, core=load(dump(run.core)), joined=False, log=[])
    for step in (
        lambda run: run.grow(3, [6, 6], (0, 1)),
        lambda run: run.request(1),
        lambda run: run.hello("engine", incarnation=2),
        lambda run: run.apply(1),
        lambda run: run.hello("actor", incarnation=2),
        lambda run: run.shutdown(),
    ):
        ours, theirs = step(run), step(copy)
        assert said(ours) == said(theirs)
        assert len(ours) > 0
    assert dump(run.core) == dump(copy.core)


def write(run: Run, path: pathlib.Path, snapshot_after: int | None) -> QueueCore:
    """What the shell does with the events of a run; the core at the end."""
    core = make_core()
    with Journal.open(path, "r") as journal:
        for number, (now, sender, event) in enumerate(run.log, start=1):
            actions = core.handle(now, sender, event)
            if core.durable:
                frames = () if isinstance(event, Tick) else wire.encode(event)
                records = [record for to, record in actions if to == JOURNAL]
                journal.append(now, sender, type(event).__name__, frames, records)
            if number == snapshot_after:
                journal.snapshot(dump(core))
        journal.commit()
        tidy(journal)
    return core


@pytest.mark.parametrize("snapshot_after", [None, 7, 14])
def test_a_core_is_recovered_from_rows_and_from_a_snapshot_and_what_follows_it(
    tmp_path: pathlib.Path, snapshot_after: int | None
) -> None:
    path, run = tmp_path / "journal.db", some_run()
    core = write(run, path, snapshot_after)
    with Journal.open(path, "r") as journal:
        assert (journal.num_rows < journal.appended) == (snapshot_after is not None)
        found = recover_core(journal, core.settings)
        journal.commit()
    found.recount()
    found.tallies.refused, core.tallies.refused = core.tallies.refused, found.tallies.refused
    for each in (found, core):  # whose Hellos are not journaled
        each.registry.forget_observers()
    assert found.now == core.now
    assert dump(found) == dump(core)
    with sqlite3.connect(path) as database:
        outcomes = database.execute("SELECT group_id, member, outcome, history, step FROM outcomes").fetchall()
        assert outcomes == [(group, member, "applied", 0, 0) for group in (0, 1) for member in (0, 1)]
        steps = database.execute("SELECT history, step, outcome, groups, members FROM steps").fetchall()
        assert steps == [(0, 0, "trained", "[0, 0, 1, 1]", "[0, 1, 0, 1]")]
