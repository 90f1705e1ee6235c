"""What one busy engine and its actor say to the queue, known before it is said.

The engine has a fixed number of requests running and sends one message for each interval in which all of them got
another chunk, with a row for each, as the plugin does.  Groups start one after another, so that they also end one after
another and the next takes the place of the one that ended.  The queue numbers groups from 0 and messages are numbered
without gaps, so everything can be made ahead of time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stream_rl.messages import Chunks, CloseTrajectory, OpenGroup
from stream_rl.types import Finish, Status, Version, make_rid

RUN, ENGINE, TASK = "bench", "engine-0", "bench"
CHUNK_TOKENS = 16
CHUNKS = 32
"""Of one trajectory."""
RESPONSE_TOKENS = CHUNKS * CHUNK_TOKENS
MEMBERS = 8
"""Of a group."""
GROUP_TOKENS = MEMBERS * RESPONSE_TOKENS
PROMPT_TOKENS = 64
VOCABULARY = 151_936
_POOL = 1 << 20
"""Random tokens that messages take theirs from."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One message of the engine, and what its actor knows of it."""

    chunks: Chunks
    starting: Sequence[int]
    """Groups whose first chunks it has: they have to be open."""
    ending: Sequence[int]
    """Groups whose last chunks it has."""


class Traffic:
    """Rounds of traffic, each from the first chunk of its first group to the last of its last."""

    def __init__(self, requests: int, seed: int = 0) -> None:
        """requests: that run at once, a multiple of MEMBERS."""
        random = np.random.default_rng(seed)
        self._running = requests // MEMBERS
        self._ids = random.integers(0, VOCABULARY, _POOL, np.int32)
        self._logprobs = -random.exponential(1.0, _POOL).astype(np.float32)
        self._random = random
        self._sequence = 0
        self.next_group = 0

    def round(self, groups: int, version: Version) -> list[Interval]:
        """The messages of the next `groups` groups, all sampled under `version`."""
        first = [i * CHUNKS // self._running for i in range(groups)]
        """The message with each group's first chunks."""
        numbers = range(self.next_group, self.next_group + groups)
        rids = [[make_rid(RUN, group, member, 0) for member in range(MEMBERS)] for group in numbers]
        intervals, begin, end = [], 0, 0
        for number in range(first[-1] + CHUNKS):
            while end < groups and first[end] <= number:
                end += 1
            while first[begin] + CHUNKS <= number:
                begin += 1
            place = [number - first[i] for i in range(begin, end)]
            chunks = self._chunks([rid for i in range(begin, end) for rid in rids[i]], np.array(place), version)
            starting = [numbers[i] for i in range(begin, end) if first[i] == number]
            ending = [numbers[i] for i in range(begin, end) if first[i] + CHUNKS - 1 == number]
            intervals.append(Interval(chunks, starting, ending))
        self.next_group += groups
        return intervals

    def _chunks(self, rids: list[str], place_G: np.ndarray[tuple[int], np.dtype[np.int64]], version: Version) -> Chunks:
        """place: which of its chunks each group has in this message."""
        rows, self._sequence = len(rids), self._sequence + 1
        place = np.repeat(place_G, MEMBERS)
        at = int(self._random.integers(_POOL - rows * CHUNK_TOKENS))
        here = slice(at, at + rows * CHUNK_TOKENS)
        spans = np.empty((rows, 4), np.int64)
        spans[:] = (0, *version, CHUNK_TOKENS)
        spans[:, 0] = np.arange(rows)
        return Chunks(
            run=RUN,
            engine=ENGINE,
            incarnation=1,
            sequence=self._sequence - 1,
            rids=rids,
            finishes=[str(Finish.LENGTH if p == CHUNKS - 1 else Finish.NONE) for p in place.tolist()],
            starts=place * CHUNK_TOKENS,
            counts=np.full(rows, CHUNK_TOKENS, np.int32),
            token_ids=self._ids[here],
            logprobs=self._logprobs[here],
            spans=spans,
        )


def open_group(sequence: int, group: int) -> OpenGroup:
    prompt = np.arange(PROMPT_TOKENS, dtype=np.int32)
    return OpenGroup(sequence=sequence, group=group, task=TASK, members=MEMBERS, problem=b"", prompt_ids=prompt)


def close_member(sequence: int, group: int, member: int) -> CloseTrajectory:
    return CloseTrajectory(
        sequence=sequence,
        group=group,
        member=member,
        status=Status.DONE,
        reward=float(member % 2),
        num_sampled=RESPONSE_TOKENS,
    )


def num_rows(intervals: Sequence[Interval]) -> int:
    return sum(len(interval.chunks.rids) for interval in intervals)


def members(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((group, member) for group in groups for member in range(MEMBERS))
