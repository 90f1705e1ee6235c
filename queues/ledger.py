"""The books: where every trajectory and every sampled token is, kept incrementally.

Two laws hold after every event:

    trajectories  admitted = in flight + ready + leased + applied + committed + dropped (by reason)
    tokens        received = in flight + ready + leased + applied + dropped (by reason) + trained + masked (by reason)

`admitted` and `received` are counted where things enter, the right-hand sides where they move, so a thing that is
counted twice or forgotten breaks a law instead of going unnoticed.
"""

from collections import Counter
from enum import StrEnum


class State(StrEnum):
    """Where a trajectory is.  Exactly one at any moment."""

    IN_FLIGHT = "in_flight"
    """Growing, or waiting for the other members of its group."""
    READY = "ready"
    LEASED = "leased"
    APPLIED = "applied"
    """The optimizer step was taken or skipped."""
    COMMITTED = "committed"
    """A durable checkpoint holds that step."""
    DROPPED = "dropped"


LIVE = (State.IN_FLIGHT, State.READY, State.LEASED, State.APPLIED)
"""States in which a trajectory's tokens are still on their way."""


class Ledger:
    """Counts only; knows no trajectory."""

    def __init__(self) -> None:
        self.admitted = 0
        self.received = 0
        self.trajectories: dict[State, int] = dict.fromkeys(State, 0)
        self.tokens: dict[State, int] = dict.fromkeys(LIVE, 0)
        self.dropped: Counter[str] = Counter()
        self.dropped_tokens: Counter[str] = Counter()
        self.trained = 0
        """Tokens in committed steps that were trained."""
        self.masked: Counter[str] = Counter()
        """Tokens in committed steps that were not."""

    def admit(self, trajectories: int) -> None:
        self.admitted += trajectories
        self.trajectories[State.IN_FLIGHT] += trajectories

    def receive(self, tokens: int) -> None:
        """Sampled tokens of trajectories in flight."""
        self.received += tokens
        self.tokens[State.IN_FLIGHT] += tokens

    def move(self, source: State, target: State, tokens: int) -> None:
        """One trajectory with `tokens` sampled tokens goes on; not for dropping or committing."""
        self.trajectories[source] -= 1
        self.tokens[source] -= tokens
        self.trajectories[target] += 1
        self.tokens[target] += tokens

    def drop(self, source: State, tokens: int, reason: str) -> None:
        self.trajectories[source] -= 1
        self.tokens[source] -= tokens
        self.trajectories[State.DROPPED] += 1
        self.dropped[reason] += 1
        self.dropped_tokens[reason] += tokens

    def commit(self, trajectories: int, trained: int, masked: dict[str, int]) -> None:
        """The trajectories of one applied step and what became of their tokens."""
        self.trajectories[State.APPLIED] -= trajectories
        self.trajectories[State.COMMITTED] += trajectories
        self.tokens[State.APPLIED] -= trained + sum(masked.values())
        self.trained += trained
        self.masked.update(masked)

    def uncommit(self, trajectories: int, trained: int, masked: dict[str, int]) -> None:
        """Inverse of `commit`: the learner went back to an older checkpoint."""
        self.trajectories[State.COMMITTED] -= trajectories
        self.trajectories[State.APPLIED] += trajectories
        self.tokens[State.APPLIED] += trained + sum(masked.values())
        self.trained -= trained
        self.masked.subtract(masked)

    def violations(self) -> list[str]:
        """Broken laws in words, naming both sides; empty when the books balance."""
        found = []
        if self.admitted != sum(self.trajectories.values()):
            found.append(f"trajectories: admitted {self.admitted} != {self._text(self.trajectories)}")
        if self.trajectories[State.DROPPED] != sum(self.dropped.values()):
            found.append(f"dropped: {self.trajectories[State.DROPPED]} trajectories != by reason {dict(self.dropped)}")
        gone = sum(self.dropped_tokens.values()) + self.trained + sum(self.masked.values())
        if self.received != sum(self.tokens.values()) + gone:
            found.append(
                f"sampled tokens: received {self.received} != {self._text(self.tokens)} "
                f"+ dropped {dict(self.dropped_tokens)} + trained {self.trained} + masked {dict(self.masked)}"
            )
        counts = (*self.trajectories.values(), *self.tokens.values(), self.trained, *self.masked.values())
        if min(counts) < 0:
            found.append(f"negative counts: {self._text(self.trajectories)}; {self._text(self.tokens)}")
        return found

    @staticmethod
    def _text(counts: dict[State, int]) -> str:
        return " + ".join(f"{state} {count}" for state, count in counts.items())
