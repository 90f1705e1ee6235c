"""What a state of the queue waits for, in words: liveness that people can read."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from queues.ledger import State
from queues.trajectories import Trajectory

if TYPE_CHECKING:
    from queues.core import QueueCore


def awaits(core: "QueueCore", most: int) -> list[str]:
    """At most `most` of the inputs that can take this state further.  Never empty: liveness."""
    if core.closed:
        return ["nothing: shut down"]
    return list(islice(_inputs(core), most))


def why(core: "QueueCore", most: int) -> list[str]:
    """What each object waits for, processes first, then trajectories, the longest wait first."""
    if core.closed:
        return ["nothing: the run has ended"]
    lines = [line for line in _run(core) if line]
    those = sorted(growing(core), key=lambda trajectory: trajectory.seen)
    for trajectory in those[: max(0, most - len(lines))]:
        quiet = f"{core.now - trajectory.seen:.0f} s ago"
        last = f"last token {quiet}" if trajectory.engine else f"asked for {quiet}"
        lines.append(f"group {trajectory.group.id} waits for {_waits_for(trajectory)}, {last}")
    if rest := len(those) - (most - len(lines)):
        lines += [f"and {rest} more trajectories"] if rest > 0 and len(lines) >= most else []
    return lines or ["nothing is under way"]


def _run(core: "QueueCore") -> Iterator[str]:
    for peer in core.registry.peers.values():
        if peer.lost:
            yield f"{peer.name} is lost: silent for {core.now - peer.seen:.0f} s; its restart is awaited"
    yield from (f"the run waits for {line}" for line in _steps(core))
    if core.steps.waiting is not None:
        store, least = core.store, core.settings.queue.min_tokens
        have = f"{store.ready.trainable_tokens} of {least} trainable tokens are ready in {len(store.ready)} groups"
        if store.admission.by_batch:
            have = f"{len(store.ready)} of its groups are ready, and all of them are awaited"
        yield f"{core.steps.waiting} waits for the lease of step {core.histories.last}: {have}"
    for actor, groups in core.admitted.items():
        if groups:
            yield f"{len(groups)} admitted groups wait for {actor} to open them"


def _inputs(core: "QueueCore") -> Iterator[str]:
    for role, words in (("learner", "the learner"), ("actor", "an actor"), ("engine", "an engine")):
        if not any(core.registry.living(role)):
            yield f"hello of {words}"
    yield from _steps(core)
    for actor, groups in core.admitted.items():
        if groups:
            yield f"{actor} to open {len(groups)} groups"
    yield from (_waits_for(trajectory) for trajectory in growing(core))


def _steps(core: "QueueCore") -> Iterator[str]:
    done = core.tallies.learner_done
    if core.drained and core.finished:
        yield "shutdown"
    elif core.drained and done is not None:
        if "last" not in core.tallies.evaluated:
            yield "the evaluation of the last version"
        yield from (f"the hash of all of {name}'s live weights" for name in core.unverified())
    elif done is not None:
        yield from (f"{peer.name} to hold version {done.final}" for peer in core.behind(done.final))
    elif core.steps.lease is not None:
        yield f"step {core.steps.lease.message.step} to be applied"
    elif core.steps.waiting is None:
        yield f"the lease request for step {core.histories.last}"
    elif core.settings.queue.mode == "synchronous":
        yield from (f"{peer.name} to hold version {core.histories.last}" for peer in core.behind(core.histories.last))


def growing(core: "QueueCore") -> Iterator[Trajectory]:
    """Trajectories in flight that are not complete."""
    for group in core.store.groups.values():
        if group.state is State.IN_FLIGHT:
            yield from (t for t in group.members if t.state is State.IN_FLIGHT and not t.complete)


def _waits_for(trajectory: Trajectory) -> str:
    name, actor = f"trajectory {trajectory.label}", trajectory.group.actor
    if trajectory.resting:
        return f"{name} to be resumed in the next round"
    if not trajectory.finish and not trajectory.asks_nobody:
        stopping = " (told to stop it)" if trajectory.parking else ""
        return f"{name} on {trajectory.engine or 'an engine'}{stopping}"
    if trajectory.asks_nobody:
        return f"{actor} to go on with {name} or to close it: what its environment or its reward says"
    return f"{actor} to {'say how it was interrupted' if trajectory.finish == 'abort' else 'close'}: {name}"
