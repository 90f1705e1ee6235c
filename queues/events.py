"""What the shell itself tells the core, beside what peers say."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tick:
    """The shell's timer, about once a second."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The shell could not reach the peer `name`; an observer is forgotten, others are awaited."""

    name: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """The shell has replayed the journal; nobody could have been heard since its last row."""
