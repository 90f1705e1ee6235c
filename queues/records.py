"""What the journal tells of each trajectory and step, beside the events: for people, and for proofs after a crash."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ended:
    """What has become of a trajectory.  A later record of the same one replaces it."""

    group: int
    member: int
    outcome: str
    """applied, forked (the step that had trained it belongs to a dead history: it is leased again) or dropped."""
    reason: str = ""
    """Why it was dropped."""
    history: int = -1
    step: int = -1
    """The step that was applied, or forked away."""


@dataclass(frozen=True, slots=True)
class Step:
    """An applied step and the trajectories of its lease, in order."""

    history: int
    step: int
    outcome: str
    groups: tuple[int, ...]
    """[S]"""
    members: tuple[int, ...]
    """[S]"""
