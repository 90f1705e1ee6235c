"""One trajectory of a run, put together from what the run wrote down.

journal.db      what the queue was told and when, until it is reclaimed (queue.keep_journal keeps all of it)
leases/         what the learner trained on, with its own log-probs, if learner.leases = "record"
learner.jsonl   in which step
"""

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from actors import leases
from queues import journal
from queues.database import Database
from stream_rl import messages as m
from stream_rl.errors import ConfigError
from stream_rl.types import ByteArray, Float32Array, Int32Array, Version, parse_rid

Kind = Literal["prompt", "model", "observation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A trajectory's tokens, each [T].  What is None nobody wrote down."""

    ids: Int32Array
    sampled: ByteArray
    logprobs: Float32Array
    """Under the engine's weights; 0 where not sampled."""
    histories: Int32Array
    steps: Int32Array
    """Of the version that sampled the token; 0 where not sampled."""
    ages: Int32Array | None = None
    trainable: ByteArray | None = None
    learner_logprobs: Float32Array | None = None
    """Under the weights that its step began with."""

    def __len__(self) -> int:
        return len(self.ids)

    def version(self, at: int) -> Version:
        return Version(int(self.histories[at]), int(self.steps[at]))

    def gaps(self) -> Float32Array | None:
        """[T] the learner's log-prob less the engine's; 0 where not sampled."""
        if self.learner_logprobs is None:
            return None
        gaps: Float32Array = np.where(self.sampled != 0, self.learner_logprobs - self.logprobs, np.float32(0))
        return gaps


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Neighbouring tokens of one kind.  Times are the queue's, in seconds since its start, when it heard of it."""

    kind: Kind
    start: int
    end: int
    """Of its tokens in the trajectory: start <= t < end."""
    said_s: float | None = None
    """A prompt or observation: when it was there, so that the model could be asked."""
    first_s: float | None = None
    last_s: float | None = None
    """The model's first and last chunk."""
    engines: tuple[str, ...] = ()
    """One for each request that the turn took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    group: int
    member: int
    outcome: str
    """What has become of it: in flight, applied, committed, dropped, ..., and why."""
    step: Version | None
    """The newest step that trained on it."""
    reward: float | None
    reward_parts: dict[str, float]
    closed_s: float | None
    tokens: Tokens
    turns: tuple[Turn, ...]
    siblings: tuple[tuple[int, int, float], ...]
    """(member, episode, reward) of the group in its lease, this one included."""
    missing: tuple[str, ...] = ()
    """What is not known, and which setting would have kept it."""


@dataclass(slots=True)
class _Segment:
    first_s: float
    last_s: float
    engine: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Heard:
    """Of one trajectory, from the journal."""

    opened_s: float | None = None
    prompt: list[int] = field(default_factory=list)
    appended: dict[int, tuple[float, list[int]]] = field(default_factory=dict)
    """When and what, behind which segment."""
    segments: dict[int, _Segment] = field(default_factory=dict)
    closed_s: float | None = None
    closed: m.CloseTrajectory | None = None


def find(directory: pathlib.Path, run: str, label: str) -> Trajectory:
    """The trajectory "group/member" of a run.  Raises ConfigError if there is none, or nothing is known of it."""
    group, member = parse(label)
    heard = _listen(directory / "journal.db", run, group, member)
    step, lease, learner_logprobs = _leased(directory, group, member)
    outcome = _outcome(directory / "journal.db", group, member)
    missing = []
    if heard.opened_s is None:
        missing.append("waits, engines and parts of the reward: set queue.keep_journal = true")
    if lease is None and step is not None:
        missing.append('ages, the reward and the learner\'s log-probs: set learner.leases = "record"')
    if lease is None and heard.opened_s is None:
        what = outcome or f"trained on in step {step}"
        if not outcome and step is None:
            raise ConfigError(
                f"{directory} knows of no trajectory {label}; see learner.jsonl there for groups and members"
            )
        raise ConfigError(
            f"the tokens of {label} ({what}) are not there any more: a run keeps what it "
            'trains on with learner.leases = "record", and all that it heard with queue.keep_journal = true'
        )
    told, turns = _assembled(heard)
    siblings: tuple[tuple[int, int, float], ...] = ()
    reward = heard.closed.reward if heard.closed is not None and heard.closed.status == "done" else None
    tokens = told
    if lease is not None:
        at = _row(lease, group, member)
        tokens = _cut(lease, at, learner_logprobs)
        siblings = tuple(
            (int(lease.members[i]), int(lease.episodes[i]), float(lease.rewards[i]))
            for i in np.flatnonzero(lease.groups == group)
        )
        reward = float(lease.rewards[at])
        if not np.array_equal(told.ids, tokens.ids):
            turns = ()  # what the journal still has is a part only
    return Trajectory(
        group=group,
        member=member,
        outcome=outcome or ("trained" if step is not None else "in flight"),
        step=step,
        reward=reward,
        reward_parts=heard.closed.reward_parts if heard.closed is not None else {},
        closed_s=heard.closed_s,
        tokens=tokens,
        turns=turns or tuple(_runs(tokens)),
        siblings=siblings,
        missing=tuple(missing),
    )


def parse(label: str) -> tuple[int, int]:
    """group/member.  Raises ConfigError."""
    group, slash, member = label.partition("/")
    if not (slash and group.isdecimal() and member.isdecimal()):
        raise ConfigError(f"a trajectory is group/member, such as 17/3, got {label!r}")
    return int(group), int(member)


def _listen(path: pathlib.Path, run: str, group: int, member: int) -> _Heard:
    heard, prefix = _Heard(), f"{run}/{group}/{member}/"
    if not path.exists():
        return heard
    for row in journal.replay(path):
        match row.event:
            case m.OpenGroup() | m.OpenBranch() as event if event.group == group:
                if isinstance(event, m.OpenGroup) or event.member == member:
                    heard.opened_s, heard.prompt = row.at, event.prompt_ids.tolist()
            case m.AppendTokens(group=g, member=i, segment=segment) as event if (g, i) == (group, member):
                heard.appended.setdefault(segment, (row.at, event.token_ids.tolist()))
            case m.CloseTrajectory(group=g, member=i) as event if (g, i) == (group, member):
                heard.closed_s, heard.closed = row.at, event
            case m.Chunks() as event:
                for at, rid in enumerate(event.rids):
                    if rid.startswith(prefix):
                        _take(heard, event, at, parse_rid(rid)[3], row.at)
    return heard


def _take(heard: _Heard, chunks: m.Chunks, row: int, number: int, when: float) -> None:
    """Row `row` of a message of chunks; what is there already, or comes behind a gap, is passed over."""
    begin, count = int(chunks.counts[:row].sum()), int(chunks.counts[row])
    segment = heard.segments.setdefault(number, _Segment(when, when, chunks.engine))
    skip = len(segment.ids) - int(chunks.starts[row])
    if not 0 <= skip < max(count, 1):
        return
    versions = [(int(h), int(s)) for r, h, s, n in chunks.spans if r == row for _ in range(n)]
    segment.ids += chunks.token_ids[begin + skip : begin + count].tolist()
    segment.logprobs += chunks.logprobs[begin + skip : begin + count].tolist()
    segment.versions += versions[skip:]
    segment.last_s = when


def _assembled(heard: _Heard) -> tuple[Tokens, tuple[Turn, ...]]:
    """All segments with what was appended behind them, and whose turn it was when."""
    columns: list[tuple[int, bool, float, int, int]] = []
    turns: list[Turn] = []

    def put(kind: Kind, tokens: Sequence[tuple[int, bool, float, int, int]], **times: Any) -> None:
        start = len(columns)
        columns.extend(tokens)
        if tokens and turns and turns[-1].kind == kind:  # a segment that went on where another was cut
            last = turns[-1]
            turns[-1] = replace(last, end=len(columns), engines=last.engines + times.get("engines", ()))
            turns[-1] = replace(turns[-1], last_s=times.get("last_s", last.last_s))
        elif tokens:
            turns.append(Turn(kind=kind, start=start, end=len(columns), **times))

    def said(ids: Sequence[int]) -> list[tuple[int, bool, float, int, int]]:
        return [(token, False, 0.0, 0, 0) for token in ids]

    put("prompt", said(heard.prompt), said_s=heard.opened_s)
    for number in sorted(heard.segments.keys() | heard.appended.keys()):
        if (segment := heard.segments.get(number)) is not None:
            grown = zip(segment.ids, segment.logprobs, segment.versions, strict=True)
            sampled = [(token, True, logprob, *version) for token, logprob, version in grown]
            put("model", sampled, first_s=segment.first_s, last_s=segment.last_s, engines=(segment.engine,))
        if number in heard.appended:
            when, ids = heard.appended[number]
            put("observation" if columns else "prompt", said(ids), said_s=when)
    table = list(zip(*columns, strict=True)) or [()] * 5
    tokens = Tokens(
        ids=np.array(table[0], np.int32),
        sampled=np.array(table[1], np.uint8),
        logprobs=np.array(table[2], np.float32),
        histories=np.array(table[3], np.int32),
        steps=np.array(table[4], np.int32),
    )
    return tokens, tuple(turns)


def _runs(tokens: Tokens) -> Iterator[Turn]:
    """Whose turn it was, of tokens of which no times are known."""
    edges = [0, *(np.flatnonzero(np.diff(tokens.sampled)) + 1).tolist(), len(tokens)]
    for start, end in itertools.pairwise(edges):
        if start < end:
            kind: Kind = "model" if tokens.sampled[start] else "observation" if start else "prompt"
            yield Turn(kind=kind, start=start, end=end)


def _leased(
    directory: pathlib.Path, group: int, member: int
) -> tuple[Version | None, m.Lease | None, Float32Array | None]:
    """The newest step that trained on it, with its lease and the learner's log-probs of that, if they were kept."""
    step = None
    try:
        lines = (directory / "learner.jsonl").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue  # the last one, of a learner that was killed
        if (group, member) in zip(told["groups"], told["members"], strict=True):
            step = max(Version(told["history"], told["step"]), step or Version(0, 0))
    kept = leases.path_of(directory / leases.DIRECTORY, step) if step is not None else None
    if kept is None or not kept.exists():
        return step, None, None
    return step, leases.read(kept), leases.read_logprobs(kept)


def _row(lease: m.Lease, group: int, member: int) -> int:
    found = np.flatnonzero((lease.groups == group) & (lease.members == member))
    if not len(found):
        raise ConfigError(
            f"the lease of step {lease.step} does not hold {group}/{member}, learner.jsonl says that it does"
        )
    return int(found[0])


def _cut(lease: m.Lease, row: int, learner_logprobs: Float32Array | None) -> Tokens:
    end = int(lease.lengths[: row + 1].sum())
    here = slice(end - int(lease.lengths[row]), end)
    return Tokens(
        ids=lease.token_ids[here],
        sampled=lease.sampled[here],
        logprobs=lease.logprobs[here],
        histories=lease.histories[here],
        steps=lease.steps[here],
        ages=lease.ages[here],
        trainable=lease.trainable[here],
        learner_logprobs=None if learner_logprobs is None else learner_logprobs[here],
    )


def _outcome(path: pathlib.Path, group: int, member: int) -> str:
    if not path.exists():
        return ""
    database = Database(path, readonly=True)
    try:
        asked = "SELECT outcome, reason FROM outcomes WHERE group_id = ? AND member = ?"
        rows = database.query(asked, group, member)
    finally:
        database.close()
    return " ".join(rows[0]).strip() if rows else ""
