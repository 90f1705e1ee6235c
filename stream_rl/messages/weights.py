"""The learner, the publisher and the engines: versions of the weights on their way."""

from stream_rl.types import ByteArray, Version
from stream_rl.wire import message


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
class SnapshotOffer:
    """Learner to publisher, now and then: this is the newest version.  Answered by SnapshotTaken, or by SnapshotWanted
    from a publisher that was restarted and has it no more."""

    version: Version


@message
class SnapshotWanted:
    """Publisher to learner: send all parts of the version (again)."""

    version: Version


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
