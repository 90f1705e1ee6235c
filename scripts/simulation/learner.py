"""A simulated learner: leases, a time for each step, and what every lease was made of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from scripts.simulation.clock import Clock
from scripts.simulation.setting import Setting
from stream_rl import messages as m
from stream_rl.types import Int64Array, Version

_NEVER = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One step, seen from the learner."""

    began_s: float
    """When its lease was asked for."""
    leased_s: float
    applied_s: float
    groups: Int64Array
    """[S] of each trajectory, as `members`."""
    members: Int64Array
    sampled: Int64Array
    """[S] tokens."""
    trained: Int64Array
    """[S] tokens; the rest of `sampled` was masked, or dropped with its trajectory."""
    too_old: Int64Array
    """[S] 1 where the trajectory was dropped for its oldest token."""
    spanned: Int64Array
    """[S] versions between the oldest and the youngest sampled token."""
    ages: Int64Array
    """[age] trained tokens of that age."""


class Learner:
    def __init__(
        self,
        setting: Setting,
        clock: Clock,
        say: Callable[[object], None],
        publish: Callable[[Version], None],
        may_request: Callable[[], bool],
        oldest: int | None,
    ) -> None:
        """oldest: trajectories with an older token are dropped before they train."""
        self.steps: list[Trained] = []
        self._setting, self._clock, self._say, self._publish = setting, clock, say, publish
        self._may_request, self._oldest = may_request, oldest
        self._version = Version(0, 0)
        self._wants = False
        self._began = 0.0
        self._speed = setting.learner_speed * setting.engines_tokens_per_s

    def hello(self, run: str) -> None:
        self._say(m.Hello(run=run, role="learner", name="learner-0", incarnation=1, pid=1))

    def receive(self, message: object) -> None:
        match message:
            case m.Welcome() | m.Done(what="Applied"):
                self._wants, self._began = True, self._clock.now
                self.request()
            case m.Lease():
                self._train(message)
            case m.Refused():
                raise AssertionError(f"the learner was refused: {message.reason}: {message.detail}")

    def request(self) -> None:
        """Ask for the next lease, if it is time."""
        if self._wants and self._may_request():
            self._wants = False
            self._say(m.LeaseRequest(step=self._version))

    def _train(self, lease: m.Lease) -> None:
        starts = np.cumsum(lease.lengths, dtype=np.int64) - lease.lengths
        sampled = np.add.reduceat(lease.sampled, starts, dtype=np.int64)
        trained = np.add.reduceat(lease.trainable, starts, dtype=np.int64)
        oldest = np.maximum.reduceat(lease.ages, starts).astype(np.int64)
        youngest = np.minimum.reduceat(np.where(lease.sampled, lease.ages, _NEVER), starts)
        too_old = np.zeros(len(starts), np.int64) if self._oldest is None else (oldest > self._oldest).astype(np.int64)
        trainable = (lease.trainable != 0) & np.repeat(too_old == 0, lease.lengths)
        leased = self._clock.now
        busy = self._setting.learner_fixed_s + int(lease.lengths[too_old == 0].sum()) / self._speed
        step = Trained(
            began_s=self._began,
            leased_s=leased,
            applied_s=leased + busy,
            groups=lease.groups,
            members=lease.members.astype(np.int64),
            sampled=sampled,
            trained=trained * (1 - too_old),
            too_old=too_old,
            spanned=oldest - youngest,
            ages=np.bincount(lease.ages[trainable]),
        )
        self._clock.after(busy, lambda: self._apply(step))

    def _apply(self, step: Trained) -> None:
        done, self._version = self._version, Version(0, self._version.step + 1)
        self.steps.append(step)
        metrics = {"busy_seconds": step.applied_s - step.leased_s, "wall_seconds": step.applied_s - step.began_s}
        self._clock.after(self._setting.publish_s, partial(self._publish, self._version))
        self._say(m.Applied(step=done, outcome="trained", metrics=metrics))
        if self._version.step % self._setting.commit_every == 0:
            self._say(m.Committed(step=self._version))
