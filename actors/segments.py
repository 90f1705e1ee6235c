"""The segments that run here: one task each, from the request to what is said of it.

    begin ──▶ wait for an engine ──▶ request ──▶ reward ──▶ CloseTrajectory
                  │ park                │ aborted, or the engine is gone
                  └─────────────────────┴──────────────────▶ Interrupted

The queue gives the orders and may give one twice: a segment runs once, and only the newest of a trajectory runs.
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.engine_pool import EnginePool
from actors.recent import Recent
from actors.rewards import RewardFailure, RewardPool
from actors.sampling import Sampling
from engines.sglang.client import EngineClient, EngineUnreachable
from stream_rl.errors import EngineError
from stream_rl.messages import CloseTrajectory, Interrupted
from stream_rl.session import Session
from stream_rl.task import Prompt
from stream_rl.types import Finish, Status, make_rid

log = logging.getLogger(__name__)
ENDED = (Finish.STOP, Finish.LENGTH)
UNREACHABLE_BACKOFF_SECONDS = 1.0
"""From finding an engine gone until the queue hears it, which resumes at once: a dead engine makes no hot loop."""
NO_MORE = sys.maxsize
"""Noted in place of a segment's number: nothing of this trajectory runs any more."""

Key = tuple[int, int]
"""(group, member)"""
Make = Callable[[int], Any]
"""The message about a segment, once it has its sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What to do: go on with a trajectory from these tokens."""

    group: int
    member: int
    number: int
    prompt: Prompt
    prompt_ids: list[int]
    token_ids: list[int]
    """Sampled in the segments before."""
    finish: str = ""
    """types.Finish of the tokens: if they have ended, only the reward is missing."""

    @property
    def key(self) -> Key:
        return self.group, self.member


@dataclass(slots=True, eq=False)
class _Running:
    segment: int
    rid: str
    task: asyncio.Task[None] | None = None
    waiting: bool = True
    """Nothing was asked of an engine yet."""
    engine: EngineClient | None = None
    """That has the request, while it has it."""
    parked: bool = False


class Segments:
    """Runs them in the task group of their actor."""

    def __init__(
        self,
        run: str,
        session: Session,
        engines: EnginePool,
        rewards: RewardPool,
        sampling: Sampling,
        counts: Counter[str],
        tasks: asyncio.TaskGroup,
        retry_s: float,
    ) -> None:
        self._run, self._session, self._engines, self._rewards = run, session, engines, rewards
        self._sampling, self._counts, self._retry_s = sampling, counts, retry_s
        self._tasks: asyncio.TaskGroup = tasks
        self._running: dict[Key, _Running] = {}
        self._over = Recent[Key]()
        """The newest segment of a trajectory that runs here no more."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, segment: Segment, after: int = -1) -> None:
        """Run it, unless it or a later one runs or ran here; an earlier one is stopped.  Its request is sent when the
        message `after` is acknowledged: the queue takes no token of a group that it does not know."""
        key, running = segment.key, self._running.get(segment.key)
        newest = max(self._over.get(key, -1), running.segment if running else -1)
        if self._closed or segment.number <= newest:
            return
        self._stop(key)
        running = _Running(segment.number, make_rid(self._run, *key, segment.number))
        running.task = self._tasks.create_task(self._play(segment, running, after), name=running.rid)
        self._running[key] = running

    def park(self, group: int, member: int, segment: int) -> None:
        """End the segment's request, so that it is said to be interrupted."""
        running = self._running.get((group, member))
        if running is None:
            if self._over.get((group, member), -1) < segment:
                self._end((group, member), segment, _interrupted((group, member), segment, "parked", -1))
        elif running.segment == segment and running.waiting:
            self._stop((group, member))
            self._end((group, member), segment, _interrupted((group, member), segment, "parked", 0))
        elif running.segment == segment and not running.parked:
            running.parked = True
            self._tasks.create_task(self._abort_until_it_ends(running))

    def fail(self, group: int, member: int, segment: int, reason: str) -> None:
        """Close a trajectory that cannot go on here."""
        self._stop((group, member))
        self._end((group, member), segment, self._failed((group, member), segment, reason))

    def cancel(self, group: int, member: int) -> None:
        """Stop the trajectory for good and say nothing of it."""
        self._stop((group, member))
        self._over.note((group, member), NO_MORE)

    def close(self) -> None:
        """Cancel all, and begin nothing more."""
        self._closed = True
        for key in list(self._running):
            self.cancel(*key)

    def _stop(self, key: Key) -> None:
        if (running := self._running.pop(key, None)) is not None:
            assert running.task is not None
            running.task.cancel()
            self._over.note(key, running.segment)
            if running.engine is not None:
                self._tasks.create_task(self._engines.abort(running.engine, running.rid))

    def _end(self, key: Key, segment: int, say: Make) -> None:
        self._over.note(key, segment)
        self._tasks.create_task(self._session.post(say))

    async def _abort_until_it_ends(self, running: _Running) -> None:
        """An abort that overtakes its request is lost, so it is said again."""
        assert running.task is not None
        while running.engine is not None:
            await self._engines.abort(running.engine, running.rid)
            await asyncio.wait([running.task], timeout=self._retry_s)

    async def _play(self, segment: Segment, running: _Running, after: int) -> None:
        await self._session.acknowledged(after)
        say = await self._outcome(segment, running)
        await self._session.post(say)
        if self._running.get(segment.key) is running:  # and not the next, if a cancellation came just too late
            del self._running[segment.key]
            self._over.note(segment.key, segment.number)

    async def _outcome(self, segment: Segment, running: _Running) -> Make:
        """Whatever goes wrong costs this segment or its trajectory, by name."""
        token_ids, budget = segment.token_ids, self._sampling.max_new_tokens - len(segment.token_ids)
        if segment.finish not in ENDED and budget > 0:
            engine = await self._engines.pick()
            running.waiting, running.engine = False, engine
            try:
                generation = await engine.generate(
                    running.rid, segment.prompt_ids + token_ids, self._sampling.parameters(budget)
                )
            except TimeoutError:
                self._tasks.create_task(self._engines.abort(engine, running.rid))
                return self._failed(segment.key, segment.number, "request_timeout")
            except EngineUnreachable as error:
                log.warning("%s: %s", running.rid, error)
                self._counts["interrupted.engine_unreachable"] += 1
                await self._engines.doubt(engine)
                await asyncio.sleep(UNREACHABLE_BACKOFF_SECONDS)
                return _interrupted(segment.key, segment.number, "engine_unreachable", -1)
            except EngineError as error:  # it would refuse it again, and so would the others
                log.warning("%s: %s", running.rid, error)
                return self._failed(segment.key, segment.number, "engine_refused")
            finally:
                running.engine = None
            self._counts["generated_tokens"] += len(generation.token_ids)
            if generation.finish is Finish.ABORT:
                reason = "parked" if running.parked else "interrupted"
                self._counts[f"interrupted.{reason}"] += 1
                return _interrupted(segment.key, segment.number, reason, len(generation.token_ids))
            token_ids = token_ids + generation.token_ids
        running.waiting = False
        try:
            score = await self._rewards.score(segment.prompt, self._sampling.decode(token_ids))
        except RewardFailure as failure:
            log.warning("%s: %s", running.rid, failure)
            return self._failed(segment.key, segment.number, failure.reason)
        done = {"status": Status.DONE, "reward": score.reward, "reward_parts": score.parts}
        return _closed(segment.key, segment.number, num_sampled=len(token_ids), **done)

    def _failed(self, key: Key, segment: int, reason: str) -> Make:
        self._counts[f"failed.{reason}"] += 1
        return _closed(key, segment, status=Status.FAILED, reason=reason)


def _closed(key: Key, segment: int, **fields: Any) -> Make:
    return lambda sequence: CloseTrajectory(sequence=sequence, group=key[0], member=key[1], segment=segment, **fields)


def _interrupted(key: Key, segment: int, reason: str, num_sampled: int) -> Make:
    return lambda sequence: Interrupted(
        sequence=sequence, group=key[0], member=key[1], segment=segment, reason=reason, num_sampled=num_sampled
    )
