"""A million events of whole runs in which everything is killed, lost, repeated and lied about; see `queue_world`.

What fails names its setting: `World(Setting(...)).run(...)` fails again in the same way.
"""

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from queue_world import Setting, World

from queues import leasing, resuming
from queues.core import QueueCore
from queues.registry import Peer
from queues.resuming import Resuming
from queues.steps import Steps
from queues.store import Store
from queues.trajectories import Group, Trajectory
from queues.versions import Histories
from stream_rl import messages as m

SETTINGS: list[dict[str, Any]] = [
    {},
    {"engines": 1, "strangers": True},
    {"engines": 3, "actors": 2},
    {"engines": 1, "members": 1},
    {"queue": {"max_token_age": -1}, "strangers": True},
    {"queue": {"max_token_age": 2}, "checkpoint_every": 2},
    {"queue": {"max_token_age": 1, "max_token_age_of": {"u": -1}}, "checkpoint_every": 3},
    {"queue": {"filter": "equal_rewards", "over_provision": 3.0}, "members": 2, "strangers": True},
    {"queue": {"group_deadline_s": 8.0}, "actors": 2},
    {"queue": {"in_flight": "steered", "target_token_age": 1.0}},
    {"queue": {"mode": "rounds"}, "strangers": True},
    {"queue": {"mode": "rounds", "over_provision": 3.0}, "engines": 3, "actors": 2},
    {"queue": {"mode": "rounds", "max_token_age": 2, "filter": "equal_rewards"}, "members": 2},
    {"queue": {"mode": "rounds", "group_deadline_s": 5.0}, "engines": 3, "faults": 2.0},
    {"queue": {"mode": "synchronous"}, "engines": 2},
    {"queue": {"mode": "synchronous", "filter": "equal_rewards"}, "members": 2, "faults": 2.0},
    {"queue": {"mode": "one_step_off", "max_token_age": 1}, "engines": 2, "actors": 2},
    {"faults": 2.0, "strangers": True},
    {"actors": 2, "faults": 2.0},
    {"agents": True},
    {"agents": True, "engines": 3, "actors": 2, "faults": 2.0},
    {"agents": True, "members": 1, "strangers": True},
    {"agents": True, "queue": {"max_token_age": 1, "filter": "equal_rewards"}, "checkpoint_every": 2},
    {"agents": True, "queue": {"mode": "rounds"}, "actors": 2, "strangers": True},
    {"agents": True, "queue": {"mode": "rounds", "group_deadline_s": 5.0}},
]
EVENTS = 1_000_000
SEEDS = 3
SHARE = EVENTS // (SEEDS * len(SETTINGS)) + 1
"""Events of one world."""


HERE = pathlib.Path(__file__).parent


def live(setting: dict[str, Any]) -> tuple[int, int]:
    """One whole run in a process of its own; its events and its steps."""
    command = [sys.executable, "-m", "queue_world", json.dumps(setting), str(SHARE)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert ended.returncode == 0, f"Setting(**{setting}): {ended.stderr[-3000:]}"
    events, steps = json.loads(ended.stdout)
    return events, steps


@pytest.mark.timeout(600)  # about 30 s of CPU time a seed, on as many cores as there are
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, SEEDS), marks=pytest.mark.long)])
def test_a_million_events_lose_nothing_train_nothing_twice_and_leave_nobody_waiting(seeds: range):
    worlds = [{"seed": 100 * seed + i} | s for seed in seeds for i, s in enumerate(SETTINGS)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        lives = list(threads.map(live, worlds))
    assert sum(events for events, _ in lives) * SEEDS >= EVENTS * len(seeds)
    assert all(steps > SHARE // 100 for _, steps in lives), "too little happens"


def test_a_seed_is_a_whole_world():
    first, second = (World(Setting(seed=5, faults=3.0, strangers=True)) for _ in range(2))
    for world in (first, second):
        world.run(2000)
    assert (first.now, first.shell.events) == (second.now, second.shell.events)
    assert repr(first.core.summary()) == repr(second.core.summary())
    assert first.truth.ended == second.truth.ended


# -- the world would notice ------------------------------------------------------------------------------------


def nothing(*_: Any, **__: Any) -> None: ...


def takes_anything(core: QueueCore, peer: Peer, sequence: int) -> bool:
    peer.next_sequence = sequence + 1
    return True


def says_it_and_forgets(core: QueueCore, peer: Peer) -> None:
    core._out.send(peer.name, m.Ack(next_sequence=peer.next_sequence))


def forgets_nobody(store: Store, group: Group) -> None:
    group.release()


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        (Resuming, "engine_lost", nothing),
        (Resuming, "remind", nothing),
        (Resuming, "rest_if_orphaned", nothing),
        (Steps, "_later_than", lambda steps, step: []),
        (Histories, "effective_step", lambda histories, history, step: step),
        (Store, "retire", forgets_nobody),
        (QueueCore, "_in_sequence", takes_anything),
        (QueueCore, "_taken", says_it_and_forgets),
        (leasing, "max_token_age", lambda queue, task: queue.max_token_age + 1),
    ],
)
def test_a_fault_of_the_queue_is_found(monkeypatch, where, name, what):
    monkeypatch.setattr(where, name, what)
    tempting = [SETTINGS[6], SETTINGS[11] | {"members": 2}, SETTINGS[1]]
    settings = [Setting(seed=i, **(s | {"faults": 4.0})) for i, s in enumerate(8 * tempting)]
    with pytest.raises((AssertionError, KeyError)):
        all(World(setting).run(3000) is None for setting in settings)


def throws_it_away(trajectory: Trajectory, ids: bytes) -> None: ...


def does_not_wait(resuming: Resuming, now: float, trajectory: Trajectory) -> int:
    trajectory.appending = b""
    return 0


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        (Trajectory, "append", throws_it_away),
        (Trajectory, "said_over", property(lambda trajectory: trajectory.closed)),
        (Trajectory, "untouched_since", lambda trajectory, segment: False),
        (Trajectory, "sampled_flags", lambda trajectory: np.ones(len(trajectory.ids) // 4, np.uint8)),
        (Trajectory, "context", property(lambda trajectory: trajectory.group.prompt)),
        (Resuming, "append", does_not_wait),
        (Resuming, "remind", nothing),
        (resuming, "_appended", lambda trajectory: m.Alive()),
        (Store, "branch", nothing),
    ],
)
def test_a_fault_between_turns_is_found(monkeypatch, where, name, what):
    monkeypatch.setattr(where, name, what)
    tempting = [{}, {"queue": {"mode": "rounds"}}, {"actors": 2}]
    settings = [Setting(seed=i, agents=True, faults=4.0, **s) for i, s in enumerate(8 * tempting)]
    with pytest.raises((AssertionError, KeyError, ValueError)):
        all(World(setting).run(3000) is None for setting in settings)
