"""What the hooks count, in the scheduler's thread.  Read from the plugin's own thread (one value at a time: the GIL
makes that safe, and a sum that is one step old does no harm)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stream_rl.metrics import Histogram


class Counters:
    """Monotone since the scheduler's start; the names travel in `messages.EngineStats.counters`."""

    def __init__(self) -> None:
        self.pauses = 0
        """pause_generation requests."""
        self.aborts = 0
        """Requests of the run that ended by an abort, whoever asked for it."""
        self.retractions = 0
        """Requests put back for lack of KV memory; they go on later and lose nothing."""
        self.commits = 0
        self.faults = 0
        """Exceptions in our own hooks or thread.  The engine went on; the plugin did not."""
        self.generated_tokens = 0
        self.hook_cpu_seconds = 0.0
        self.thread_cpu_seconds = 0.0
        self.busy_seconds = 0.0
        """Wall time of event-loop turns that ran a batch, since the run's first request."""
        self._started: float | None = None
        """When the run's first request was admitted."""
        self._cpu_started = time.process_time()
        """Imports and model loading are not the scheduler's work."""
        self.decode_step_seconds = Histogram()
        """From one decode launch to the next, while nothing else came between."""
        self._turn_started = 0.0
        self._turn_ran_batch = False
        self._last_decode: float | None = None

    @contextmanager
    def hook(self) -> Iterator[None]:
        """Charge the CPU time of a hook's body."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.hook_cpu_seconds += time.thread_time() - start

    def turn(self, now: float) -> None:
        """The scheduler's event loop begins a turn."""
        if self._turn_ran_batch and self._started is not None:
            self.busy_seconds += now - self._turn_started
        else:
            self._last_decode = None
        self._turn_started, self._turn_ran_batch = now, False

    def admitted(self, now: float) -> None:
        """A request of the run came in; the clock of busy and wall time starts with the first."""
        if self._started is None:
            self._started = now

    def launch(self, now: float, decode: bool) -> None:
        """A batch is launched."""
        self._turn_ran_batch = True
        if decode and self._last_decode is not None:
            self.decode_step_seconds.add(now - self._last_decode)
        self._last_decode = now if decode else None

    def values(self) -> dict[str, float]:
        """By the names that travel."""
        return {
            "pauses": self.pauses,
            "aborts": self.aborts,
            "retractions": self.retractions,
            "commits": self.commits,
            "faults": self.faults,
            "generated_tokens": self.generated_tokens,
            "hook_cpu_seconds": self.hook_cpu_seconds,
            "thread_cpu_seconds": self.thread_cpu_seconds,
            "scheduler_cpu_seconds": time.process_time() - self._cpu_started,
            "busy_seconds": self.busy_seconds,
            "wall_seconds": time.perf_counter() - self._started if self._started is not None else 0.0,
        }
