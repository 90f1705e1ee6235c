"""Virtual time: callbacks in the order of their time, and of their arrangement where that is equal."""

import heapq
from collections.abc import Callable


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._arranged = 0

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, self._arranged, do))
        self._arranged += 1

    def run(self, until: Callable[[], bool]) -> None:
        """Let time pass until `until()`.  Raises AssertionError when nothing would ever happen again."""
        while not until():
            assert self._events, "nothing is left to happen"
            self.now, _, do = heapq.heappop(self._events)
            do()
