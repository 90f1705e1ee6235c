"""What a state of the queue waits for, in words: liveness that people can read."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from queues.ledger import State

if TYPE_CHECKING:
    from queues.core import QueueCore


def awaits(core: "QueueCore", most: int) -> list[str]:
    """At most `most` of the inputs that can take this state further.  Never empty: liveness."""
    if core.closed:
        return ["nothing: shut down"]
    return list(islice(_inputs(core), most))


def _inputs(core: "QueueCore") -> Iterator[str]:
    for role, words in (("learner", "the learner"), ("actor", "an actor"), ("engine", "an engine")):
        if not any(core.registry.of_role(role)):
            yield f"hello of {words}"
    done = core.tallies.learner_done
    if core.drained and core.finished:
        yield "shutdown"
    elif core.drained:
        if "last" not in core.tallies.evaluated:
            yield "evaluation of the last version"
        yield from (f"the hash of all of {name}'s live weights" for name in core.unverified())
    elif done is not None:
        yield from (f"{peer.name} to hold version {done.final}" for peer in core.behind(done.final))
    elif core.lease is not None:
        yield f"step {core.lease.message.step} to be applied"
    elif core.waiting is None:
        yield f"lease request for step {core.histories.last}"
    yield from _growth(core)


def _growth(core: "QueueCore") -> Iterator[str]:
    for actor, credits in core.credits.items():
        if credits:
            yield f"{actor} to open {credits} groups"
    for group in core.store.groups.values():
        if group.state is not State.IN_FLIGHT:
            continue
        for trajectory in group.members:
            if trajectory.state is not State.IN_FLIGHT or trajectory.complete:
                continue
            if not trajectory.finish:
                yield f"tokens of {trajectory.label} from {trajectory.engine or 'an engine'}"
            if not trajectory.closed:
                yield f"close of {trajectory.label} by {group.actor}"
