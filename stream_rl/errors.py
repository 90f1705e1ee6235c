"""What can go wrong, by boundary.

Every message says what was expected, what came, and what to do about it.  A class names the boundary that was
crossed (recipe, wire, engine, weights, task, peer), not the place that noticed.
"""


class StreamRLError(Exception):
    """Base of every error that this project raises on purpose."""


class WouldOnlyRepeat(StreamRLError, RuntimeError):
    """What a new start of the process would run into again: the run ends with it."""


class ConfigError(StreamRLError, ValueError):
    """A recipe, a command line or a model folder cannot be used as it is."""


class WireError(StreamRLError, ValueError):
    """Bytes from a peer that are not one of our messages.  `reason` is a short, countable name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class EngineError(StreamRLError, RuntimeError):
    """SGLang or megatron-core did something that we cannot go on from."""


class WeightsError(StreamRLError, RuntimeError):
    """A weight update that does not fit: wrong base, wrong shape, wrong hash."""


class TaskError(StreamRLError, RuntimeError):
    """The user's task raised where no single trajectory can pay for it (loading it, or making prompts)."""


class PeerTimeout(StreamRLError, TimeoutError):
    """A peer stayed silent for longer than the configured timeout."""
