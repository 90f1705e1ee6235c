"""Observers with the queue: how things are, and the end."""

from stream_rl.types import Version
from stream_rl.wire import message


@message
class StatusRequest:
    """Anyone to the queue: how are things."""

    why: bool = False
    """Also say in the answer what everything waits for: texts queue.why.0, queue.why.1, ..."""


@message
class Status:
    """Answer to StatusRequest, and pushed to observers about once a second."""

    fields: dict[str, float]
    """Numbers by dotted name."""
    texts: dict[str, str]
    """Names, hashes and verdicts by dotted name."""
    finished: bool
    """The learner is done and the last evaluation is in."""


@message
class StepRecord:
    """Queue to observers, once for each applied step: one line of the run's metrics."""

    step: Version
    fields: dict[str, float]


@message
class DrainEngine:
    """Observer to the queue: move everything off this engine and send nothing to it; answered by Done."""

    engine: str


@message
class Shutdown:
    """Observer to the queue: close the books (what is still in flight is dropped as run_end) and answer Status."""

    reason: str
