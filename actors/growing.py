"""What an actor knows of a trajectory that grows here, and how it says so to the queue."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.episodes import Branch, Episode
from engines.sglang.client import EngineClient
from stream_rl.messages import AppendTokens, CloseTrajectory, Interrupted, OpenBranch, Resume

Key = tuple[int, int]
"""(group, member)"""
Make = Callable[[int], Any]
"""A message, once it has its sequence."""


@dataclass(slots=True, eq=False)
class Growing:
    episode: Episode
    branch: Branch
    opening: int
    """Its request is sent when this message is acknowledged: the queue takes no token of what it does not know."""
    segment: int = 0
    resting: bool = False
    """Said to be interrupted: the queue will say how it goes on."""
    parked: bool = False
    turn: asyncio.Future[None] | None = None
    """Under way."""
    observation: list[int] = field(default_factory=list)
    """Of the turn, while the queue has not said that it holds it."""
    end: int = 0
    """Tokens that the branch may have when its turn ends."""
    cut: bool = False
    """Its turn ends as soon as the queue has what was sampled."""
    stop: Sequence[str] = ()
    request: asyncio.Task[None] | None = None
    engine: EngineClient | None = None
    """That has the request, while it has it."""
    last_engine: EngineClient | None = None
    """That has the prefix."""

    @property
    def key(self) -> Key:
        return self.branch.group, self.branch.member


def hold(branch: Branch, resume: Resume) -> None:
    """The queue's tokens, from the first."""
    prompt = resume.prompt_ids.tolist()
    branch.token_ids = prompt + resume.token_ids.tolist()
    branch.sampled = [False] * len(prompt) + [bool(flag) for flag in resume.sampled.tolist()]
    branch.logprobs = [0.0] * len(prompt) + resume.logprobs.tolist()
    branch.finish = resume.finish


def closed(key: Key, segment: int, **fields: Any) -> Make:
    return lambda sequence: CloseTrajectory(sequence=sequence, group=key[0], member=key[1], segment=segment, **fields)


def interrupted(key: Key, segment: int, reason: str, num_sampled: int) -> Make:
    return lambda sequence: Interrupted(
        sequence=sequence, group=key[0], member=key[1], segment=segment, reason=reason, num_sampled=num_sampled
    )


def append(key: Key, segment: int, num_sampled: int, token_ids: Sequence[int]) -> Make:
    ids = np.array(token_ids, np.int32)
    return lambda sequence: AppendTokens(
        sequence=sequence, group=key[0], member=key[1], segment=segment, num_sampled=num_sampled, token_ids=ids
    )


def branch_opened(key: Key, episode: int, prompt_ids: Sequence[int]) -> Make:
    ids = np.array(prompt_ids, np.int32)
    return lambda sequence: OpenBranch(sequence=sequence, group=key[0], member=key[1], episode=episode, prompt_ids=ids)
