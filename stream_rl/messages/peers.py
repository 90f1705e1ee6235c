"""What every process and the queue say to each other."""

from dataclasses import field

from stream_rl.types import Version
from stream_rl.wire import message


@message
class Hello:
    """First message of every process to the queue."""

    run: str
    role: str
    """engine, actor, learner, publisher or observer."""
    name: str
    """Unique within the run, the same after a restart: engine-0."""
    incarnation: int
    """Grows with every start of the same name; an older one is fenced."""
    pid: int
    address: str = ""
    """Where others reach it: an engine's HTTP base address, the publisher's ZeroMQ address."""


@message
class Welcome:
    """The queue's answer to Hello."""

    run: str
    next_sequence: int
    """The first sequenced message that the queue has not taken from this incarnation; it and what follows are sent
    again."""
    version: Version = Version(0, 0)
    """The newest published version.  A learner that was restarted opens the history after it."""
    admitted: list[int] = field(default_factory=list)
    """To an actor: the groups that it may open, in place of every Admit before; it has opened those that its
    unacknowledged messages open."""
    evaluated: list[str] = field(default_factory=list)
    """To an actor: labels of the evaluations that are in."""


@message
class Alive:
    """Sign of life of a peer that has nothing else to say, about once a second."""


@message
class Refused:
    """Something was not accepted; it was counted under `reason` and changed nothing."""

    reason: str
    detail: str


@message
class Done:
    """Plain acknowledgement of the request named `what`."""

    what: str
