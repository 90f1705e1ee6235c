"""One engine, as the publisher knows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from engines.weights.chain import Update
from stream_rl.messages import EngineHello, HashReport, Live
from stream_rl.types import Version


class Total(Protocol):
    """What every rank says of the weights that it holds: EngineHello, Live, HashReport."""

    @property
    def weights_hash(self) -> str: ...

    @property
    def replicas(self) -> dict[str, str]: ...


def combined(ranks: Mapping[int, Total]) -> tuple[str, str]:
    """Fingerprint of a model from those of all ranks, and what contradicts it.

    What several ranks hold alike is in the sum of one of them, and must be equal in all.  A rank that could not compute
    its fingerprint says why in its place.
    """
    copies: dict[str, set[str]] = {}
    for each in ranks.values():
        for group, fingerprint in each.replicas.items():
            copies.setdefault(group, set()).add(fingerprint)
    problem = "; ".join(
        f"ranks {group} hold different copies of the same weights" for group, found in copies.items() if len(found) > 1
    )
    try:
        return f"{sum(int(each.weights_hash, 16) for each in ranks.values()) % (1 << 64):016x}", problem
    except ValueError:
        words = "; ".join(each.weights_hash for each in ranks.values())
        return words, problem or words


@dataclass(slots=True)
class Recipient:
    """An engine and the update on its way to it, if there is one."""

    name: str
    incarnation: int
    ranks: int
    held: Version | None = None
    """The version that is live there; None if that is not known to be any that was published."""
    peers: dict[int, bytes] = field(default_factory=dict)
    """Identity of each rank that has said hello."""
    seen: dict[int, float] = field(default_factory=dict)
    """When each rank last said anything."""
    hellos: dict[int, EngineHello] = field(default_factory=dict)
    """Of each rank, until they were believed or not."""
    update: Update | None = None
    attempt: int = 0
    """Number of the update sent last; answers name the one they mean."""
    sent_at: float = 0.0
    staged_at: float = 0.0
    spoken_at: float = 0.0
    """When it was last told something new, or reminded."""
    live: dict[int, Live] = field(default_factory=dict)
    hashes: dict[int, HashReport] = field(default_factory=dict)
    verify: bool = False
    """A full recomputation is due when no update is under way."""
    verifying: bool = False
    counted_from: Version | None = None
    """Of the last full recomputation, or what was newest when it came: the next one is counted from here."""
    corrupt: int = 0
    """Parts of this update that arrived corrupt."""
    failures: int = 0
    """Updates in a row that did not become live as published."""
    mismatches: int = 0
    """Full recomputations in a row that found something else than what was published."""
    verified: bool = False
    """A full recomputation has found the final version, as published."""
    _sent: dict[int, int] = field(default_factory=dict)
    """Parts that each rank was sent: the first so many."""
    _taken: dict[int, set[int]] = field(default_factory=dict)

    def begin(self, update: Update, attempt: int, now: float) -> None:
        """This update is on its way from now on."""
        self.update, self.attempt, self.sent_at, self.spoken_at = update, attempt, now, now
        self.live.clear()
        self.corrupt = 0
        self._sent = dict.fromkeys(self.peers, 0)
        self._taken = {rank: set() for rank in self.peers}

    def drop_update(self) -> None:
        """Nothing is on its way."""
        self.update = None

    def credited(self, rank: int, ahead: int) -> range:
        """The next parts that a rank may be sent, at most `ahead` beyond what it has taken; counted as sent."""
        assert self.update is not None
        first = self._sent[rank]
        self._sent[rank] = max(first, min(len(self._taken[rank]) + ahead, len(self.update.parts)))
        return range(first, self._sent[rank])

    def in_flight(self, rank: int) -> list[int]:
        """Parts that were sent and are not known to be there."""
        return [part for part in range(self._sent[rank]) if part not in self._taken[rank]]

    def take(self, rank: int, part: int) -> bool:
        """A rank has taken a part; False if that was known, or it never was sent."""
        if part in self._taken[rank] or part >= self._sent[rank]:
            return False
        self._taken[rank].add(part)
        return True

    def is_staged(self) -> bool:
        """Every rank has taken every part."""
        return self.update is not None and all(len(taken) == len(self.update.parts) for taken in self._taken.values())
