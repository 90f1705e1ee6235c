"""Proof that a run lost nothing and trained nothing twice, from its journal and from the learner's own log."""

import json
import pathlib
import sqlite3
from typing import Any

from queues.journal import replay
from stream_rl import messages as m

Member = tuple[int, int]


def surviving(steps: dict[tuple[int, int], list[Member]]) -> dict[int, list[Member]]:
    """Of steps by (history, step): those of the line of training that the run ended with.  A history forks at its
    lowest step, and what the ones before it had from there on is dead."""
    line: dict[int, list[Member]] = {}
    for history in sorted({history for history, _ in steps}):
        own = {step: members for (h, step), members in steps.items() if h == history}
        line = {step: members for step, members in line.items() if step < min(own)} | own
    return line


def journal_steps(database: sqlite3.Connection) -> dict[tuple[int, int], list[Member]]:
    rows = database.execute("SELECT history, step, groups, members FROM steps")
    return {(h, s): list(zip(json.loads(g), json.loads(n), strict=True)) for h, s, g, n in rows}


def learner_steps(path: pathlib.Path) -> dict[tuple[int, int], list[Member]]:
    """What the learner wrote before it told anybody; a line that its death tore is no step that counts."""
    steps = {}
    for line in path.read_text().splitlines():
        try:
            step: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        steps[step["history"], step["step"]] = list(zip(step["groups"], step["members"], strict=True))
    return steps


def prove(directory: pathlib.Path, steps: int) -> dict[str, int]:
    """Raises AssertionError for a run (with keep_journal) that lost a trajectory or trained one twice."""
    path = directory / "journal.db"
    opened: set[Member] = set()
    for _, _, _, event in replay(path):
        if isinstance(event, m.OpenGroup):
            opened |= {(event.group, member) for member in range(event.members)}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        of_journal = surviving(journal_steps(database))
        ended = {(g, n): (outcome, reason, step) for g, n, outcome, reason, step in database.execute(
            "SELECT group_id, member, outcome, reason, step FROM outcomes"
        )}  # fmt: skip
    of_learner = surviving(learner_steps(directory / "learner.jsonl"))
    assert sorted(of_journal) == list(range(steps)), f"surviving steps of the journal: {sorted(of_journal)}"
    assert {step: of_learner.get(step) for step in of_journal} == of_journal, "the learner trained other leases"
    trained = [member for members in of_journal.values() for member in members]
    assert len(trained) == len(set(trained)), "a trajectory was trained twice in the surviving history"
    applied = {key for key, (outcome, _, _) in ended.items() if outcome == "applied"}
    assert applied == set(trained), f"{applied ^ set(trained)} are applied by one account only"
    assert all(ended[key][2] == step for step, keys in of_journal.items() for key in keys), "applied in another step"
    assert set(ended) == opened, f"{opened ^ set(ended)} were opened and have no end, or the other way round"
    assert not [key for key, (outcome, _, _) in ended.items() if outcome not in ("applied", "dropped")]
    assert all(reason for outcome, reason, _ in ended.values() if outcome == "dropped"), "dropped without a reason"
    return {"opened": len(opened), "trained": len(trained), "dropped": len(ended) - len(trained)}
