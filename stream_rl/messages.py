"""Everything that crosses a process boundary, one declared type each.

Who says what to whom, all DEALER to ROUTER:

    engine    -> queue      Hello, Chunks, EngineStats            <- Welcome, ChunksAck, Refused
    actor     -> queue      Hello, OpenGroup, CloseTrajectory ... <- Welcome, Admit, Cancel, Drain
    learner   -> queue      Hello, LeaseRequest, Applied ...      <- Welcome, Lease, Done
    publisher -> queue      Hello, VersionReport, EngineVerified  <- Welcome
    observer  -> queue      Hello, StatusRequest, Shutdown        <- Welcome, Status, StepRecord
    learner   -> publisher  Snapshot, LearnerDone                 <- SnapshotTaken
    engine    -> publisher  EngineHello, Staged, Live, HashReport <- UpdatePart, CommitOrder, HashOrder
"""

from dataclasses import field

from stream_rl.types import ByteArray, Float32Array, Int32Array, Int64Array, Version
from stream_rl.wire import message

# -- everyone and the queue ------------------------------------------------------------------------------------


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
    """For an engine: the first chunk message that the queue has not taken from this incarnation."""


@message
class Refused:
    """Something was not accepted; it was counted under `reason` and changed nothing."""

    reason: str
    detail: str


@message
class Done:
    """Plain acknowledgement of the request named `what`."""

    what: str


# -- engine -> queue -------------------------------------------------------------------------------------------


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
class ChunksAck:
    """Every chunk message below `next_sequence` is taken; the engine may forget it.  Sent again for a gap, so that
    the engine resends from there."""

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


# -- actor <-> queue -------------------------------------------------------------------------------------------


@message
class Admit:
    """Permission to start `groups` more groups."""

    groups: int


@message
class OpenGroup:
    """The actor starts all members of one prompt's group, using up one admission."""

    group: int
    task: str
    members: int
    prompt_ids: Int32Array
    """[tokens] of the prompt; never trained."""


@message
class CloseTrajectory:
    """A trajectory ended by itself (and has a reward) or failed (and has a reason)."""

    group: int
    member: int
    status: str
    """types.Status."""
    reason: str = ""
    """Why it failed; the drop is counted under this name."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    num_sampled: int = 0
    """Tokens that the engine said it sampled; the stream must bring exactly as many."""


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

    label: str
    """first or last."""
    version: Version
    rewards: Float32Array
    """[prompts]"""


@message
class ActorStats:
    """What the actor has counted since its start, about once a second."""

    counters: dict[str, float]


# -- learner <-> queue -----------------------------------------------------------------------------------------


@message
class LeaseRequest:
    """The learner wants the batch of the step that turns version `step` into the next."""

    step: Version


@message
class Lease:
    """Whole groups for one named optimizer step, as columns over trajectories (S) and tokens (T)."""

    step: Version
    groups: Int64Array
    """[S] group of each trajectory; members of a group are adjacent."""
    members: Int32Array
    """[S]"""
    rewards: Float32Array
    """[S]"""
    lengths: Int32Array
    """[S] tokens of each trajectory; they sum to T."""
    token_ids: Int32Array
    """[T]"""
    sampled: ByteArray
    """[T] 1 where the policy sampled the token, 0 for the prompt and the environment's tokens."""
    trainable: ByteArray
    """[T] 1 where it was sampled and is not older than the bound."""
    logprobs: Float32Array
    """[T] behaviour log-prob; 0 where not sampled."""
    histories: Int32Array
    """[T] history of the version that sampled the token; 0 where not sampled."""
    steps: Int32Array
    """[T] step of the version that sampled the token; 0 where not sampled."""
    ages: Int32Array
    """[T] `step` minus the token's version, at the fork for a token of a dead history; 0 where not sampled."""


@message
class Applied:
    """The optimizer step named `step` was taken (or skipped): version `step.step + 1` exists from here on."""

    step: Version
    outcome: str
    """trained or skipped."""
    metrics: dict[str, float]


@message
class Committed:
    """A durable checkpoint holds every step below `step`."""

    step: Version


@message
class LearnerDone:
    """The last step is taken, its checkpoint written, its weights handed to the publisher."""

    final: Version
    weights_hash: str
    """Of the learner's own weights: see engines.weights.fingerprint."""


# -- weights ---------------------------------------------------------------------------------------------------


@message
class Snapshot:
    """Learner to publisher: some of the tensors of a version, in checkpoint names and layout."""

    run: str
    version: Version
    part: int
    parts: int
    names: list[str]
    dtypes: list[str]
    """torch names: float32, bfloat16."""
    shapes: list[list[int]]
    payload: ByteArray
    """The tensors' bytes back to back."""


@message
class SnapshotTaken:
    """Publisher to learner: the version is in the publisher's hands; the next may be sent."""

    version: Version


@message
class EngineHello:
    """Engine to publisher: who it is and which weights it holds, by hash of its live parameters."""

    run: str
    engine: str
    incarnation: int
    rank: int
    ranks: int
    version: Version
    weights_hash: str


@message
class UpdatePart:
    """One part of one update.  An engine stages it in the background and answers Staged after the last."""

    run: str
    base: Version
    """The update applies only on top of this version; equal to `target` in an anchor, which needs none."""
    target: Version
    anchor: bool
    part: int
    parts: int
    names: list[str]
    codes: list[str]
    """How each tensor is coded: see engines.weights.codec."""
    sizes: list[list[int]]
    """Byte sizes of each tensor's buffers within `payload`, in order."""
    dtypes: list[str]
    checksum: int
    """crc32 of `payload`."""
    target_hash: str
    """Fingerprint of the whole model at `target`."""
    attempt: int = 0
    """Counts what the publisher has sent to this engine: a newer attempt replaces whatever was staged before it."""
    payload: ByteArray


@message
class Staged:
    """Engine rank to publisher: every part of `target` is here, checked and ready to be written."""

    engine: str
    incarnation: int
    rank: int
    target: Version
    attempt: int = 0
    """Of the parts; an answer to an older one is ignored."""
    problem: str = ""
    """Why it cannot be applied, if it cannot: base, checksum, shape.  The publisher answers with an anchor."""


@message
class CommitOrder:
    """Publisher to rank 0 of an engine: all ranks have staged `target`; make it live at the next step boundary."""

    target: Version


@message
class Live:
    """Engine rank to publisher: `target` is live."""

    engine: str
    incarnation: int
    rank: int
    target: Version
    weights_hash: str
    """Incremental fingerprint of the live weights."""
    stage_seconds: float
    stall_seconds: float
    """Wall time that the scheduler thread spent on the commit."""
    problem: str = ""


@message
class HashOrder:
    """Publisher to an engine: recompute the fingerprint from the live parameters, all of them."""

    version: Version


@message
class HashReport:
    """Answer to HashOrder.  `version` is what was live; the publisher asks again if it moved meanwhile."""

    engine: str
    incarnation: int
    rank: int
    version: Version
    weights_hash: str


@message
class VersionReport:
    """Publisher to queue: what one version cost to bring to one engine."""

    engine: str
    version: Version
    anchor: bool
    update_bytes: int
    full_bytes: int
    changed: int
    """Elements whose bits differ."""
    elements: int
    encode_seconds: float
    stage_seconds: float
    stall_seconds: float
    commit_seconds: float
    """From handing the update to the engine's socket until it said Live."""
    weights_hash: str
    hash_matches: bool


@message
class EngineVerified:
    """Publisher to queue: the full recomputation of an engine's hash."""

    engine: str
    version: Version
    weights_hash: str
    expected: str


# -- observers -------------------------------------------------------------------------------------------------


@message
class StatusRequest:
    """Anyone to the queue: how are things."""


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
class Shutdown:
    """Observer to the queue: close the books (what is still in flight is dropped as run_end) and answer Status."""

    reason: str
