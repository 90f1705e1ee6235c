"""What the queue holds: groups of trajectories while their tokens arrive and until they are trained.

A trajectory's tokens and log-probs are kept as growing byte strings (4 bytes a token each, no object per chunk) and
its versions as runs; they become arrays once, when the group is leased.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from queues.ledger import State
from stream_rl.types import Int32Array


@dataclass(slots=True, eq=False)
class Trajectory:
    group: "Group"
    member: int
    rid: str
    """Of its current segment."""
    segment: int = 0
    """Counts the requests to engines; a resume starts a new one."""
    base: int = 0
    """Tokens of the segments before this one."""
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
    """(history, step, tokens) in order; neighbours differ."""
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

    def release(self) -> None:
        """Let go of the tokens; the counts stay."""
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
    pending: int = 0
    """Members neither complete nor dropped."""
    versions: dict[tuple[int, int], int] = field(default_factory=dict)
    """Sampled tokens of the survivors by version, from when it is ready."""
    total_tokens: int = 0
    """Of the survivors, prompts included, from when it is ready."""
    reward_mean: float = 0.0
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
        rewards = [t.reward for t in self.survivors()]
        self.reward_mean, self.reward_range = sum(rewards) / len(rewards), max(rewards) - min(rewards)
        for trajectory in self.survivors():
            self.total_tokens += len(self.prompt) + trajectory.received
            for history, step, count in trajectory.spans:
                key = (history, step)
                self.versions[key] = self.versions.get(key, 0) + count
