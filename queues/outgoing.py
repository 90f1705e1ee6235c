"""What an event leads to: messages to peers by name, records for the journal."""

from collections.abc import Iterable
from typing import Any, ClassVar

from queues.tallies import Tallies
from stream_rl import messages as m

MAX_DETAIL = 400
"""Characters: details quote what peers sent."""
REPLY = ""
"""Recipient: whoever sent the event; for those who have no name here."""
JOURNAL = "journal"
"""Recipient: the run's journal, for `queues.records`."""

Action = tuple[str, Any]
"""(recipient's name, message)"""


class Outgoing:
    """The actions of the event that is being handled, and whether it has to be journaled."""

    TRANSIENT: ClassVar[tuple[str, ...]] = ("actions",)

    def __init__(self, tallies: Tallies) -> None:
        self._tallies = tallies
        self.actions: list[Action] = []
        self.durable = True
        """The event changed something that must outlive this process."""

    def begin(self) -> None:
        self.actions = []
        self.durable = True

    def send(self, recipient: str, message: Any) -> None:
        self.actions.append((recipient, message))

    def send_all(self, recipients: Iterable[str], message: Any) -> None:
        for recipient in recipients:
            self.send(recipient, message)

    def record(self, record: Any) -> None:
        self.actions.append((JOURNAL, record))

    def refuse(self, recipient: str, reason: str, detail: str) -> None:
        """Count it, and tell the sender why; the event changed nothing else."""
        self.durable = False
        self._tallies.refused[reason] += 1
        detail = detail[:MAX_DETAIL]
        self._tallies.last_refusal = f"{reason}: {detail}"
        self.send(recipient, m.Refused(reason=reason, detail=detail))
