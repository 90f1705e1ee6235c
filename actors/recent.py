"""What was done lately, so that an order that comes again is known."""

from typing import TypeVar

K = TypeVar("K")
KEPT = 4096
"""More than the messages that a session holds unacknowledged and unreceived: an order comes again only while one of
the two, its answer or the order itself, is still on its way."""


class Recent(dict[K, int]):
    """The last `KEPT` keys and what was noted of each."""

    def note(self, key: K, value: int = 0) -> None:
        self.pop(key, None)
        self[key] = value
        if len(self) > KEPT:
            del self[next(iter(self))]
