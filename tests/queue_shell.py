"""The queue's process and its journal, in memory: what it says leaves only with the commit of the events that it rests
on, a crash loses what was not committed, and a restart replays the journal on the newest snapshot."""

from dataclasses import dataclass
from typing import Any

from queue_peers import Link
from queue_truth import Truth, portrait

from queues import snapshot
from queues.core import JOURNAL, REPLY, QueueCore, Recovered
from queues.records import Ended, Step
from stream_rl import messages as m

ORDERS = m.Resume | m.Park | m.Cancel


@dataclass
class Held:
    """An event that was handled, and what waits for it to be committed."""

    row: tuple[float, str, Any] | None
    """For the journal; None for what changed nothing."""
    actions: list[tuple[Link | None, Any]]
    """To the connection that the recipient had then: its next incarnation has nothing to do with them."""


class Shell:
    """The queue's process and its journal."""

    def __init__(self, core: QueueCore, truth: Truth) -> None:
        self.core, self.truth = core, truth
        self.bound: dict[str, Link] = {}
        """Connections by the name that was welcomed on them."""
        self.snapshot = snapshot.dump(core)
        self.journal: list[tuple[float, str, Any]] = []
        self.held: list[Held] = []
        self.events = 0
        self.recounts = False
        """Count everything again after every event."""

    def take(self, now: float, link: Link | None, event: Any) -> list[tuple[str, Any]]:
        sender = link.name if link is not None and self.bound.get(link.name) is link else REPLY
        actions = self.core.handle(now, sender, event)
        self.events += 1
        (self.core.recount if self.recounts else self.core.check)()
        assert self.core.awaits(most=1), "nothing is awaited"
        if isinstance(event, m.Hello) and any(isinstance(message, m.Welcome) for _, message in actions):
            assert link is not None
            self.bound[event.name] = link
        for recipient, message in actions:
            assert (recipient == JOURNAL) == isinstance(message, Ended | Step)
        going = [(link if to == REPLY else self.bound.get(to), message) for to, message in actions]
        self.held.append(Held((now, sender, event) if self.core.durable else None, going))
        return actions

    def commit(self, most: int | None = None) -> list[tuple[Link, Any]]:
        """Make the events that wait for it durable, or the first so many.  Returns what may leave now."""
        leaving: list[tuple[Link, Any]] = []
        durable, self.held = self.held[:most], self.held[len(self.held[:most]) :]
        for held in durable:
            if held.row is not None:
                self.journal.append(held.row)
                if not any(isinstance(message, m.Refused) for _, message in held.actions):
                    self.truth.committed(held.row[2])
                for _, message in held.actions:
                    self.truth.said(message)
            leaving += [(to, message) for to, message in held.actions if to is not None]
        return leaving

    def crash(self, now: float, durable: int, compare: bool) -> None:
        """Die when `durable` of the events that wait are committed, and nobody has heard; come back from the journal.
        `compare` the state before and after, if nothing is lost."""
        self.commit(durable)
        before = portrait(self.core) if compare and not self.held else None
        self.held, self.bound = [], {}
        core: QueueCore = snapshot.load(self.snapshot)
        for row in self.journal:
            core.handle(*row)
            assert core.durable, f"{type(row[2]).__name__} changes nothing when it is replayed"
        core.recount()
        assert before is None or portrait(core) == before, "a replay leads to another state"
        self.core = core
        self.take(now, None, Recovered())

    def has_orders(self) -> bool:
        """Something was decided that an actor has to hear of."""
        return any(isinstance(message, ORDERS) for held in self.held for _, message in held.actions)

    def save(self) -> None:
        """A snapshot of the state after the last committed event."""
        if not self.held:
            self.snapshot, self.journal = snapshot.dump(self.core), []
            self._check_size()

    def _check_size(self) -> None:
        """What is kept of the past is a little of each step, of each trained trajectory and of each restart."""
        tallies, tokens = self.core.tallies, sum(self.core.ledger.tokens.values())
        past = 60 * len(tallies.windows) + 8 * len(tallies.lengths) + 400 * len(tallies.engine_counters)
        assert len(self.snapshot) <= 50_000 + past + 20 * tokens, f"a snapshot of {len(self.snapshot)} bytes"
