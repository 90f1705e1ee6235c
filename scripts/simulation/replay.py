"""A recorded run through a fresh core: it must lease the same trajectories for the same steps."""

import json
import pathlib
from dataclasses import dataclass

import msgspec

from queues.core import JOURNAL, QueueCore, Settings
from queues.database import Database
from queues.journal import Journal
from queues.records import Step
from stream_rl.errors import ConfigError, StreamRLError


class ReplayDiffers(StreamRLError):
    """A replayed run came to other batches than the recorded one."""


@dataclass(frozen=True, slots=True)
class Replayed:
    rows: int
    steps: int
    trajectories: int
    """That these steps were made of."""


def replay(path: pathlib.Path) -> Replayed:
    """Replay the journal at `path`.

    Raises ReplayDiffers naming the first difference, ConfigError if the journal does not go back to the run's start,
    and JournalError if it cannot be read.
    """
    recorded = {(step.history, step.step): step for step in _recorded(path)}
    rows, replayed = _replayed(path)
    for at, step in recorded.items():
        if replayed.get(at) != step:
            raise ReplayDiffers(f"{path}: {_difference(step, replayed.get(at))}")
    # A run that still goes on has taken more steps since they were read.
    for history, number in sorted(replayed.keys() - recorded.keys()):
        if (history, number) < max(recorded, default=(0, 0)):
            raise ReplayDiffers(f"{path}: the replay takes step {history}.{number}, which was not recorded")
    return Replayed(rows, len(recorded), sum(len(step.groups) for step in recorded.values()))


def _recorded(path: pathlib.Path) -> list[Step]:
    database = Database(path, readonly=True)
    try:
        rows = database.query("SELECT history, step, outcome, groups, members FROM steps ORDER BY history, step")
    finally:
        database.close()
    return [
        Step(history, step, outcome, tuple(json.loads(groups)), tuple(json.loads(members)))
        for history, step, outcome, groups, members in rows
    ]


def _replayed(path: pathlib.Path) -> tuple[int, dict[tuple[int, int], Step]]:
    steps: dict[tuple[int, int], Step] = {}
    rows = 0
    with Journal.inspect(path) as journal:
        core = QueueCore(msgspec.json.decode(journal.meta["settings"], type=Settings))
        for row in journal.rows():
            if row.seq != rows + 1:
                raise ConfigError(
                    f"{path} has no row {rows + 1}: what a snapshot made superfluous was reclaimed; a run that is to "
                    "be replayed needs queue.keep_journal = true in its recipe"
                )
            rows = row.seq
            for recipient, record in core.handle(row.at, row.sender, row.event):
                if recipient == JOURNAL and isinstance(record, Step):
                    steps[record.history, record.step] = record
    core.check()
    return rows, steps


def _difference(step: Step, again: Step | None) -> str:
    name = f"step {step.history}.{step.step}"
    if again is None:
        return f"{name} was recorded, the replay does not take it"
    if again.outcome != step.outcome:
        return f"{name} was {step.outcome}, the replay has it {again.outcome}"
    was, now = (list(zip(each.groups, each.members, strict=True)) for each in (step, again))
    at = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    names = [f"{pairs[at][0]}/{pairs[at][1]}" if at < len(pairs) else "nothing" for pairs in (was, now)]
    return f"{name}: trajectory {at} of its batch was {names[0]}, the replay has {names[1]}"
