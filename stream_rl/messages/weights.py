"""The learner, the publisher and the engines: versions of the weights on their way."""

from dataclasses import field

from stream_rl.types import ByteArray, Version
from stream_rl.wire import message


@message
class VersionOffer:
    """Learner to publisher, now and then: `target` is the newest version, and `base` is what its changes are against.
    Answered by VersionTaken, or by VersionWanted from a publisher that has it not."""

    base: Version
    """Equal to `target` if there is nothing before it."""
    target: Version


@message
class VersionWanted:
    """Publisher to learner: send all parts of the version (again)."""

    target: Version
    anchor: bool
    """All of the weights, since the publisher does not hold the offer's base.  They may be those of a newer version."""


@message
class VersionTaken:
    """Publisher to learner: the version is in the publisher's hands; the next may be sent."""

    target: Version


@message
class UpdatePart:
    """One part of what leads from one version to another, on its way from the learner to the publisher and on to the
    engines.  Made and read by engines.weights.parts."""

    run: str
    base: Version
    """The update applies only on top of this version; equal to `target` in an anchor, which needs none."""
    target: Version
    anchor: bool
    part: int
    parts: int
    source: int = 0
    """Of a learner of several ranks, the one that sends this; each sends its own parts from 0."""
    sources: int = 1
    names: list[str]
    """Of a slice of a checkpoint tensor each, as are the next three."""
    starts: list[int]
    """Flat position in the tensor at which the slice begins."""
    counts: list[int]
    """Elements of the slice."""
    dtypes: list[str]
    """torch names: float32, bfloat16."""
    checksum: int
    """crc32 of everything else in here."""
    target_hash: str = ""
    """Fingerprint of the whole model at `target`; the learner leaves it to the publisher."""
    attempt: int = 0
    """Counts what the publisher has sent to this engine: a newer attempt replaces whatever was staged before it."""
    payload: ByteArray
    """The slices' changes: see engines.weights.codes.payload."""


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
    """This rank's part of the sum."""
    replicas: dict[str, str]
    """As in Live."""
    address: str = ""
    """HTTP base address, for `weights.delivery = "reload"`."""


@message
class PartTaken:
    """Engine rank to publisher: a part is here and has been checked, which gives credit for another.  When the last
    is, the whole update is staged: ready to be written."""

    engine: str
    incarnation: int
    rank: int
    attempt: int
    """Of the part; an answer to an older one is ignored."""
    part: int
    corrupt: bool = False
    """It is not here, and wanted again."""
    problem: str = ""
    """Why the update cannot be applied, if it cannot: base, shape, hash.  The publisher answers with an anchor."""


@message
class CommitOrder:
    """Publisher to all ranks of an engine: all of them have staged `target`; make it live at the next step boundary.
    Rank 0 carries it out on all of them.  Said again until each has said Live, and answered by that if it is live."""

    target: Version
    attempt: int


@message
class Live:
    """Engine rank to publisher: `target` is live."""

    engine: str
    incarnation: int
    rank: int
    target: Version
    attempt: int
    weights_hash: str
    """Incremental fingerprint of the live weights: this rank's part of the sum."""
    replicas: dict[str, str]
    """Fingerprints of what several ranks hold alike, by those ranks ("0,1"): they must be equal, and the sum counts
    them at the first of them only."""
    stage_seconds: float
    stall_seconds: float
    """Wall time that the scheduler thread spent on the commit, and on a GPU the time that the writes took there."""
    forward_count: int = 0
    """Forward passes that this rank had launched before the commit: as many as every other rank of the engine."""
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
    replicas: dict[str, str]
    """As in Live."""


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
    code: str
    """fast or small: see engines.weights.codes."""
    encode_seconds: float
    send_seconds: float
    """From handing the first part to the engine's socket until every rank had taken the last."""
    stage_seconds: float
    stall_seconds: float
    commit_seconds: float
    """From handing the update to the engine's socket until it said Live."""
    weights_hash: str
    hash_matches: bool
    forward_counts: list[int] = field(default_factory=list)
    """As each rank had it in Live: one number, or the ranks switched at different steps."""


@message
class EngineVerified:
    """Publisher to queue: the full recomputation of an engine's hash."""

    engine: str
    version: Version
    weights_hash: str
    expected: str


@message
class StockReport:
    """Publisher to queue: an update of an SGLang server without our plugin, or what came in the way of it."""

    server: str
    version: Version
    pause_seconds: float
    """From asking it to pause until it went on."""
    write_seconds: float
    """Of the checkpoint that it read."""
    problem: str = ""
