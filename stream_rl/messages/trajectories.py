"""Engines and actors with the queue: trajectories while they grow."""

from dataclasses import field

from stream_rl.types import ByteArray, Float32Array, Int32Array, Int64Array, Version
from stream_rl.wire import message


@message
class Chunks:
    """New tokens of many requests, as columns: row i is one chunk of request `rids[i]`."""

    run: str
    engine: str
    incarnation: int
    sequence: int
    """Counts this incarnation's chunk messages from 0 without gaps; acknowledged cumulatively."""
    rids: list[str]
    finishes: list[str]
    """types.Finish of each row; "" while the request goes on."""
    starts: Int64Array
    """[rows] position in the segment's output of the row's first token; (rid, start) makes a chunk idempotent."""
    counts: Int32Array
    """[rows] tokens of the row; 0 is allowed when it carries only a finish."""
    token_ids: Int32Array
    """[tokens] rows back to back."""
    logprobs: Float32Array
    """[tokens] log-prob at the sampling temperature under the weights that sampled the token."""
    spans: Int64Array
    """[spans, 4] (row, history, step, count): versions of the row's tokens in order, counts summing to the row's."""


@message
class Ack:
    """Every sequenced message below `next_sequence` is in the journal; its sender may forget it.  With `resend`, the
    rest is to be sent again, from there."""

    next_sequence: int
    resend: bool = False


@message
class EngineStats:
    """What the hooks inside an engine have counted since its start, about twice a second."""

    engine: str
    incarnation: int
    version: Version
    """The live weights."""
    counters: dict[str, float]
    """Monotone counts and seconds by name: see engines.sglang.counters."""
    histograms: dict[str, dict[str, int]]
    """Log-bucket counts by name, for quantiles: see metrics.Histogram."""


@message
class Admit:
    """Permission to start these groups.  The queue numbers them, from 0 up: group g is of the task's prompt g."""

    groups: list[int]


@message
class OpenGroup:
    """The actor starts all members of one prompt's group, which it was admitted to."""

    sequence: int
    """Counts this incarnation's sequenced messages from 0 without gaps, over all their types."""
    group: int
    task: str
    members: int
    problem: bytes = b""
    """The prompt in its task's own terms (`stream_rl.plain`).  Not for the queue: it comes back with `Resume`, so that
    any actor can go on with the group."""
    prompt_ids: Int32Array
    """[tokens] of the prompt; never trained.  Empty: each member brings its own, as its first `AppendTokens`."""


@message
class OpenBranch:
    """An episode goes on as a further trajectory of its group, with a context of its own: its history was edited or
    compacted, or a sub-agent was started.  Its first segment is 0, and it is closed like any other."""

    sequence: int
    """As in OpenGroup."""
    group: int
    member: int
    """Of the new trajectory: the group's members are numbered in the order of their opening.  One that comes when its
    group is settled is dropped, and cancelled as `group_over`."""
    episode: int
    """The member that the episode began as; they share its reward and count as one in the group's normalisation."""
    prompt_ids: Int32Array
    """[tokens] of the context; never trained here, whoever sampled them elsewhere."""


@message
class AppendTokens:
    """A segment ended by itself, and the trajectory goes on after tokens that nobody sampled: what the environment, a
    tool or the user said.  The queue answers with Appended once the stream has brought the whole segment; with Resume,
    if a part of it was lost with its engine, and then the append is void; with Cancel, if it was not as it was said."""

    sequence: int
    """As in OpenGroup."""
    group: int
    member: int
    segment: int
    """That ended, or that nothing was asked in yet."""
    num_sampled: int
    """As in CloseTrajectory: over all segments so far."""
    token_ids: Int32Array
    """[tokens], one at least; never trained.  The prompt, if the trajectory has none."""


@message
class CloseTrajectory:
    """A trajectory ended by itself (and has a reward) or failed (and has a reason)."""

    sequence: int
    """As in OpenGroup."""
    group: int
    member: int
    segment: int = 0
    """The segment that it ended in; void if the queue has let it go on in a later one since, unless an append began
    that and nothing was asked in it."""
    status: str
    """types.Status."""
    reason: str = ""
    """Why it failed; the drop is counted under this name."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    num_sampled: int = 0
    """Tokens that engines said they sampled, over all segments; the stream must bring exactly as many.  If none of them
    is of this segment, nothing was asked in it and no finish is awaited."""


@message
class Interrupted:
    """A segment ended before its trajectory did: aborted by its engine, or its engine cannot be reached.  The queue
    answers with Resume (at once, when the stream is complete, or in the next round), Cancel or nothing."""

    sequence: int
    """As in OpenGroup."""
    group: int
    member: int
    segment: int
    reason: str
    num_sampled: int = -1
    """Tokens that the engine said it sampled in this segment; -1 if nobody knows."""


@message
class Resume:
    """Queue to actor: go on with this trajectory as a new segment, from the tokens that the queue holds; a request of
    an earlier segment is void.  Everything that an actor needs which has never heard of it is here."""

    group: int
    member: int
    segment: int
    members: int
    """Trajectories of the group so far, branches included."""
    problem: bytes
    """As in OpenGroup."""
    episode: int
    """The member that its episode began as; itself if it is no branch."""
    forked: bool = False
    """Its episode has branches."""
    finish: str = ""
    """types.Finish of the tokens: if they have ended, what comes after them is the environment's or the reward's to
    say."""
    prompt_ids: Int32Array
    """[tokens]"""
    token_ids: Int32Array
    """[tokens] behind the prompt, over all segments."""
    sampled: ByteArray
    """[tokens] 1 where the policy sampled the token, 0 where it was appended."""
    logprobs: Float32Array
    """[tokens] behaviour log-prob; 0 where not sampled."""


@message
class Appended:
    """Queue to actor: a segment is whole and the tokens behind it are here; `segment` may be asked for."""

    group: int
    member: int
    segment: int
    """The next."""


@message
class Park:
    """Queue to actor: stop the request of this segment, keep its trajectory; a Resume will follow.  The actor answers
    with Interrupted, or with AppendTokens or CloseTrajectory if it had ended already."""

    group: int
    member: int
    segment: int


@message
class Engines:
    """Queue to actor: the engines that take requests, in place of those said before."""

    names: list[str]
    addresses: list[str]
    """HTTP base addresses."""
    incarnations: list[int]


@message
class Cancel:
    """Queue to actor: stop this trajectory; it is already counted as dropped."""

    group: int
    member: int
    reason: str


@message
class Drain:
    """Queue to actor: the learner is done.  Cancel what is in flight, evaluate, then say Evaluated."""

    final: Version
    """Evaluate on this version."""


@message
class Evaluated:
    """Mean reward of the held-out prompts at a version."""

    sequence: int
    """As in OpenGroup."""
    label: str
    """first or last."""
    version: Version
    rewards: Float32Array
    """[prompts]"""


@message
class ActorStats:
    """What the actor has counted since its start, about once a second."""

    counters: dict[str, float]
