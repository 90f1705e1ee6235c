"""Small builders for the tests of trajectories of many turns."""

import numpy as np
from queue_builders import Row, Run, make_core, rid

from stream_rl import messages as m


def orders(actions: list[tuple[str, object]]) -> list[tuple[object, ...]]:
    """What an actor is told of its trajectories: (kind, group, member, segment or reason)."""
    found: list[tuple[object, ...]] = []
    for _, message in actions:
        if isinstance(message, m.Resume | m.Appended | m.Park):
            found.append((type(message).__name__, message.group, message.member, message.segment))
        elif isinstance(message, m.Cancel):
            found.append(("Cancel", message.group, message.member, message.reason))
    return found


def a_turn(run: Run, tokens: list[int], member: int = 0, segment: int = 0, group: int = 0) -> None:
    run.chunks(Row(rid(group, member, segment), 0, tokens, finish="stop", logprobs=[-0.25] * len(tokens)))


def two_turns(members: int = 2, **queue: object) -> Run:
    """0/0 has sampled 5 6, seen 70 71 and may ask for segment 1."""
    run = Run(make_core(**queue))
    run.open(0, members)
    a_turn(run, [5, 6])
    assert orders(run.append(0, 0, 2, [70, 71])) == [("Appended", 0, 0, 1)]
    return run


def held(run: Run, member: int = 0) -> list[int]:
    return np.frombuffer(run.core.store.groups[0].members[member].ids, np.int32).tolist()


def close_1(run: Run) -> None:
    """The other member of group 0."""
    a_turn(run, [4, 4, 4, 4], member=1)
    run.close(0, 1, 4)
