"""What the queue holds: groups of trajectories while their tokens arrive and until they are trained.

A trajectory's tokens and log-probs are kept as growing byte strings (4 bytes a token each, no object per chunk) and
its versions as runs; they become arrays once, when the group is leased.  Tokens that an actor appended are among them,
as runs of the version `APPENDED` with log-prob 0; every count of tokens that has no other name is of sampled ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from queues.ledger import State
from stream_rl.types import ByteArray, Finish, Int32Array

APPENDED = (-1, 0)
"""(history, step) of tokens that nobody sampled."""


@dataclass(slots=True, eq=False)
class Trajectory:
    group: "Group"
    member: int
    rid: str
    """Of its current segment."""
    episode: int
    """The member that its episode began as; another one if this is a branch."""
    prompt: Int32Array | None = None
    """Its own, of a branch or of a member that brought one; None: the group's."""
    segment: int = 0
    """Counts the requests to engines; a resume or an append starts a new one."""
    base: int = 0
    """Tokens of the segments before this one."""
    appending: bytes = b""
    """int32 tokens that come behind the current segment as soon as it is whole."""
    appended_before: int = -1
    """The segment that the last append began; -1: none."""
    turns: int = 0
    """Of the model, that have ended."""
    turned_at: int = 0
    """Sampled tokens when the last of them had."""
    began: float = 0.0
    """When its current turn did: it was opened, or got the last append."""
    spoke: float = 0.0
    """When its actor appended last."""
    state: State = State.IN_FLIGHT
    reason: str = ""
    """Why it was dropped."""
    engine: str = ""
    """The engine whose tokens of this segment were taken first; no other may add any."""
    losses: int = 0
    """Engines that had been lost when its segment began."""
    seen: float = 0.0
    """When it was opened, resumed, or last got a token."""
    ids: bytearray = field(default_factory=bytearray)
    """int32 tokens, back to back."""
    logprobs: bytearray = field(default_factory=bytearray)
    """float32, one a token."""
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    """(history, step, tokens) of all tokens behind the prompt, in order; neighbours differ."""
    received: int = 0
    """Sampled tokens taken so far; stays after the data is let go."""
    lost: int = 0
    """The stream reached this far in rows that were refused (a finish counts as one more token); beyond `received`,
    there is a hole that nobody will fill."""
    finish: str = ""
    """Of its current segment."""
    parking: bool = False
    """Its actor was told to stop the request; it will be resumed."""
    interrupted: str = ""
    """Why its current segment ended before the trajectory did, once anybody said so."""
    resting: bool = False
    """Interrupted, and everything that will come of the segment is here: to be resumed."""
    closed: bool = False
    failed: bool = False
    """Closed by its actor without a reward."""
    cancelled: bool = False
    """Counted as cancelled: an abort of its request is explained."""
    complete: bool = False
    """Finished, closed, and both sides agree on the tokens."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    num_sampled: int = 0
    """What its actor said was sampled."""

    @property
    def label(self) -> str:
        return f"{self.group.id}/{self.member}"

    @property
    def context(self) -> Int32Array:
        """The prompt that it goes on from; empty while it is to bring its own."""
        return self.group.prompt if self.prompt is None else self.prompt

    @property
    def num_tokens(self) -> int:
        """All that are here, sampled or not."""
        return len(self.context) + len(self.ids) // 4

    @property
    def said_over(self) -> bool:
        """Its actor has said that the current segment ended by itself, after `num_sampled` tokens."""
        return self.closed or bool(self.appending)

    @property
    def asks_nobody(self) -> bool:
        """Its engine is done, and its actor has not said what comes after: an environment or a reward is awaited."""
        begun = self.finish not in ("", Finish.ABORT) or not len(self.context)
        return begun and not (self.said_over or self.interrupted or self.complete)

    def untouched_since(self, segment: int) -> bool:
        """An append began the segment after `segment`, and nothing is known to have been asked in it."""
        began = segment + 1 == self.segment == self.appended_before
        return began and not self.engine and self.received == self.base

    def append(self, ids: bytes) -> None:
        """Tokens behind all that are here; the first are the prompt, where there is none."""
        if not (len(self.context) or self.ids):
            self.prompt = np.frombuffer(ids, np.int32)
            return
        count = len(ids) // 4
        self.ids += ids
        self.logprobs += bytes(len(ids))
        if self.spans and self.spans[-1][:2] == APPENDED:
            count += self.spans.pop()[2]
        self.spans.append((*APPENDED, count))

    def sampled_flags(self) -> ByteArray:
        """[tokens behind the prompt] 1 where sampled."""
        counts = [count for _, _, count in self.spans]
        return np.repeat(np.array([span[:2] != APPENDED for span in self.spans], np.uint8), counts)

    def release(self) -> None:
        """Let go of the tokens; the counts stay."""
        self.prompt, self.appending = None, b""
        self.ids = bytearray()
        self.logprobs = bytearray()
        self.spans = []
        self.reward_parts = {}


@dataclass(slots=True, eq=False)
class Group:
    """All trajectories of one prompt."""

    id: int
    actor: str
    task: str
    prompt: Int32Array
    problem: bytes
    """For its actor: the prompt in its task's own terms."""
    opened: float
    state: State = State.IN_FLIGHT
    """Of its surviving members; IN_FLIGHT until all are settled."""
    members: list[Trajectory] = field(default_factory=list)
    """All of its trajectories, branches included, in the order of their opening."""
    pending: int = 0
    """Members neither complete nor dropped."""
    versions: dict[tuple[int, int], int] = field(default_factory=dict)
    """Sampled tokens of the survivors by version, from when it is ready."""
    total_tokens: int = 0
    """Of the survivors, with all that nobody sampled, from when it is ready."""
    reward_mean: float = 0.0
    """Of the survivors' episodes, from when it is complete."""
    reward_range: float = 0.0
    """Largest less smallest reward of the survivors, from when it is complete."""

    def release(self) -> None:
        """Let go of everything but the counts and names."""
        self.prompt, self.problem = np.empty(0, np.int32), b""
        self.versions = {}
        for trajectory in self.members:
            trajectory.release()

    def survivors(self) -> Iterator[Trajectory]:
        return (t for t in self.members if t.state is not State.DROPPED)

    def summarise(self) -> None:
        """Fill in what filters and leasing need to know of a group that is whole; once."""
        rewards = list({t.episode: t.reward for t in self.survivors()}.values())
        self.reward_mean, self.reward_range = sum(rewards) / len(rewards), max(rewards) - min(rewards)
        for trajectory in self.survivors():
            self.total_tokens += trajectory.num_tokens
            for history, step, count in trajectory.spans:
                if (key := (history, step)) != APPENDED:
                    self.versions[key] = self.versions.get(key, 0) + count
