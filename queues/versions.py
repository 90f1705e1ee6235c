"""Which versions of the weights exist, and how old a token of one is.

History 0 starts at step 0.  A learner that restarts from a checkpoint opens a higher history that forks at that
step; the histories before it are dead from there on, so that a token that one of them sampled after the fork counts
as sampled at the fork: the surviving line never saw more of it.
"""

from stream_rl.types import Version

_NEVER = 1 << 62
MAX_HISTORY = (1 << 31) - 1
"""Histories travel as int32."""


class Histories:
    """Published versions of every history.  Steps of the current one only grow."""

    def __init__(self) -> None:
        self.current = 0
        self.published: dict[int, int] = {0: 0}
        """Last published step of each known history."""
        self._forks: dict[int, int] = {0: _NEVER}
        """Lowest step at which the surviving line left each history."""

    @property
    def last(self) -> Version:
        """The newest version of the current history; the next lease is for the step that starts from it."""
        return Version(self.current, self.published[self.current])

    def knows(self, version: Version) -> bool:
        """Whether it was published."""
        return 0 <= version.step <= self.published.get(version.history, -1)

    def publish(self, version: Version) -> None:
        """The successor of `last` exists from here on."""
        assert version == (self.current, self.last.step + 1), f"{version} does not follow {self.last}"
        self.published[self.current] = version.step

    def open(self, history: int, step: int) -> None:
        """A new current history, forking at `step` of the one before."""
        assert history > self.current, f"history {history} is not newer than {self.current}"
        assert 0 <= step <= self.last.step, f"a fork at step {step} is beyond {self.last}"
        self._forks = {known: min(fork, step) for known, fork in self._forks.items()}
        self._forks[history] = _NEVER
        self.published[history] = step
        self.current = history

    def effective_step(self, history: int, step: int) -> int:
        """The step of the surviving line that a token of (history, step) counts as sampled at."""
        return min(step, self._forks[history])
