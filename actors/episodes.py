"""Episodes while they are played: turns of the model in, sampled tokens out, whatever happens to engines meanwhile.

    player (a reward, an environment process, the endpoint) ──turn──▶ Episode ──sample──▶ Course (queue and engines)

An episode begins as one member of its group.  Its trajectories are its branches: one, unless its context is edited or
compacted or a sub-agent starts.  What a branch holds is what the queue holds, or will; what its player was shown of
that may be less, after a restart: then turns are answered from the tokens that are there, as long as the player says
again what it had said.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.rewards import RewardFailure, Score
from actors.sampling import Limits
from stream_rl.episode import EpisodeFailed
from stream_rl.errors import StreamRLError
from stream_rl.task import Prompt
from stream_rl.types import Finish

log = logging.getLogger(__name__)
ENDED = (Finish.STOP, Finish.LENGTH)
ENVIRONMENT_LOST = "environment_lost"
MAX_DEATHS = 3
"""Of an episode's player: one that ends its process each time must not do so for ever."""


class EpisodeEnded(StreamRLError):
    """There is no further turn: the episode was cancelled, failed or drained, or has had its turns.  `reason` is
    countable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ContextFull(StreamRLError):
    """The tokens do not fit, or nothing could be sampled behind them; the branch is as it was."""

    reason = "context_full"


class PlayerGone(StreamRLError):
    """What played the episode has died; it may be played again.  `reason` counts if it may not."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sampled:
    """One turn of the model, over all of its segments."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token, under the weights that sampled it."""
    finish: Finish
    """STOP or LENGTH."""


@dataclass(slots=True, eq=False)
class Branch:
    """One trajectory of an episode."""

    group: int
    member: int
    token_ids: list[int] = field(default_factory=list)
    """Prompt and all behind it."""
    sampled: list[bool] = field(default_factory=list)
    """[tokens]"""
    logprobs: list[float] = field(default_factory=list)
    """[tokens] 0 where not sampled."""
    finish: str = ""
    """types.Finish of the last token, if a turn ends there."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """[begin, end) of each turn that its player was shown."""
    shown: int = 0
    """Tokens that its player knows of."""
    sampling: asyncio.Future[None] | None = None
    """The turn under way, whether anybody waits for it or not."""
    awaited: bool = False
    """Somebody waits for its turn."""

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Without log-probs: tokens that nobody sampled."""
        self.token_ids += token_ids
        self.sampled += [logprobs is not None] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs


class Course(Protocol):
    """Where an episode's turns are sampled and its end is told."""

    async def branch(self, episode: "Episode", token_ids: list[int]) -> Branch:
        """A further trajectory, with this prompt; from when it is open it is among the episode's branches, whether
        its caller has gone away or not."""
        ...

    def sample(
        self, branch: Branch, token_ids: list[int], end: int, stop: Sequence[str], turn: asyncio.Future[None]
    ) -> None:
        """Append these, sample until the model ends its turn or the branch has `end` tokens, then resolve `turn`; the
        branch's `finish` says which."""
        ...

    async def done(self, episode: "Episode", score: Score) -> None:
        """It ended by itself; a turn under way is cut where it is."""
        ...

    def failed(self, episode: "Episode", reason: str) -> None: ...


class Player(Protocol):
    """What an episode is: asks for turns, and knows the reward."""

    async def play(self, episode: "Episode") -> Score:
        """Raises RewardFailure, EpisodeFailed or EpisodeEnded if there is none, PlayerGone if another try may do."""
        ...


class Episode:
    """One member of a group while it is played.  Not safe to share between event loops."""

    def __init__(
        self,
        prompt: Prompt,
        trunk: Branch,
        course: Course,
        player: Player,
        limits: Limits,
        tasks: asyncio.TaskGroup,
        deadline_s: float | None = None,
    ) -> None:
        """trunk: the trajectory that it begins as, with what is there of it already."""
        self.key = secrets.token_urlsafe(24)
        """By which the endpoint knows it; nobody else does."""
        self.prompt, self.trunk = prompt, trunk
        self.group, self.member = trunk.group, trunk.member
        self.branches: list[Branch] = []
        """Those that were begun, in order."""
        self.ended = ""
        """Why there are no more turns."""
        self.reward_so_far: float | None = None
        self.exposed = False
        """Its endpoint was used: what asked there does not ask again after a restart."""
        self.num_turns = 0
        self._course, self._player, self._limits = course, player, limits
        self._tasks: asyncio.TaskGroup = tasks
        self._loop = asyncio.get_running_loop()
        self._deadline = None if deadline_s is None else self._loop.time() + deadline_s
        self._active_at = self._loop.time()
        self._deaths = 0
        self._task: asyncio.Task[None] | None = None

    # -- for its player ----------------------------------------------------------------------------------------

    async def turn(
        self, branch: Branch | None, token_ids: Sequence[int], *, max_new_tokens: int = 0, stop: Sequence[str] = ()
    ) -> tuple[Branch, Sampled]:
        """The model's next turn behind `token_ids`, which nobody sampled.

        branch: to append to; None begins one, with `token_ids` as its prompt.  One turn at a time on each.
        max_new_tokens, stop: of this turn, within the recipe's limits; strings that end it.

        A caller that goes away leaves the turn to its end; the same tokens again on that branch give its result.
        Raises EpisodeEnded, ContextFull, EpisodeFailed if there is nothing to follow, StreamRLError for a busy branch.
        """
        self.raise_if_ended()
        ids = list(token_ids)
        if branch is None and not ids:
            raise EpisodeFailed("empty_prompt", "a trajectory begins with one token at least")
        if branch is None:
            self._check_room(0, len(ids), 0)
            self._check_turns()
            if self.trunk not in self.branches:
                branch = self.trunk
                self.branches.append(branch)
            else:
                branch, ids = await self._course.branch(self, ids), []
                branch.shown = len(branch.token_ids)
        if branch.awaited:
            raise StreamRLError(f"trajectory {branch.group}/{branch.member} is in a turn; wait for it, or branch")
        branch.awaited = True
        try:
            return branch, await self._turn(branch, ids, max_new_tokens, stop)
        finally:
            branch.awaited = False
            self._active_at = self._loop.time()

    def raise_if_ended(self) -> None:
        if self.ended:
            raise EpisodeEnded(self.ended)

    def begun(self) -> None:
        """What plays it is there now: only from here on is its silence its own."""
        self._active_at = self._loop.time()

    @property
    def quiet_s(self) -> float:
        """Seconds since the model's last turn, or since it was begun; 0 while it has a turn."""
        busy = any(branch.awaited or branch.sampling for branch in self.branches)
        return 0.0 if busy else self._loop.time() - self._active_at

    # -- for its course ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._task = self._tasks.create_task(self._play(), name=f"episode {self.group}/{self.member}")

    def rebuild(self, reason: str = ENVIRONMENT_LOST) -> None:
        """Play it again from the tokens that its trunk has, or fail it for `reason`."""
        forked = any(branch is not self.trunk for branch in self.branches)
        if self.ended or self.exposed or forked or self._deaths > MAX_DEATHS:
            self._course.failed(self, reason)
            return
        log.info("episode %d/%d is played again from %d tokens", *self._name, len(self.trunk.token_ids))
        self._cancel()
        self.branches.clear()
        self.num_turns, self.reward_so_far, self._active_at = 0, None, self._loop.time()
        trunk = self.trunk
        trunk.shown, trunk.awaited = 0, False
        trunk.turns.clear()
        self.start()

    def end(self, reason: str) -> None:
        """No more turns; who waits for one hears it."""
        self.ended = self.ended or reason
        for branch in {*self.branches, self.trunk}:
            if branch.sampling is not None and not branch.sampling.done():
                branch.sampling.set_exception(EpisodeEnded(self.ended))
        self._cancel()

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> tuple[int, int]:
        return self.group, self.member

    def _cancel(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def _play(self) -> None:
        task, deadline = asyncio.current_task(), asyncio.timeout_at(self._deadline)
        try:
            try:
                async with deadline:
                    score = await self._player.play(self)
            except TimeoutError:
                if not deadline.expired():
                    raise
                if self.reward_so_far is None:
                    raise EpisodeEnded("deadline") from None
                score = Score(self.reward_so_far, {})
        except PlayerGone as gone:
            self._deaths += 1
            if not self.ended:
                self.rebuild(gone.reason)
        except (RewardFailure, EpisodeFailed, EpisodeEnded, ContextFull) as failure:
            if task is self._task and not self.ended:
                log.warning("episode %d/%d: %s", *self._name, failure)
                self._course.failed(self, failure.reason)
        else:
            self.ended = self.ended or "done"
            await self._course.done(self, score)

    async def _turn(self, branch: Branch, ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Sampled:
        if branch.sampling is not None:  # its caller went away
            await asyncio.shield(branch.sampling)
            branch.sampling = None
            self.raise_if_ended()
        begin = branch.shown + len(ids)
        held = self._held(branch, ids)
        before = sum(branch.sampled[: branch.shown])
        room = self._check_room(branch.shown, len(ids), before)
        self._check_turns()
        if not ids and (not begin or branch.sampled[begin - 1]):
            raise EpisodeFailed("empty_observation", "a turn must follow one token at least that nobody sampled")
        end = begin + min(room, max_new_tokens or room)
        self._active_at = self._loop.time()
        over = self._end_of_turn(branch, begin) if held else begin
        if over == len(branch.token_ids) or not held:
            if held and over >= end and branch.finish not in ENDED:
                branch.finish = Finish.LENGTH
            if not held or branch.finish not in ENDED:
                await self._sample(branch, [] if held else ids, end, stop)
            over = len(branch.token_ids)
            finish = Finish(branch.finish)
        else:
            finish = Finish.LENGTH if over >= end else Finish.STOP
        self.num_turns += 1
        branch.shown = over
        branch.turns.append((begin, over))
        return Sampled(branch.token_ids[begin:over], branch.logprobs[begin:over], finish)

    async def _sample(self, branch: Branch, ids: list[int], end: int, stop: Sequence[str]) -> None:
        turn = branch.sampling = self._loop.create_future()
        turn.add_done_callback(lambda turn: turn.cancelled() or turn.exception())  # nobody may be waiting
        self._course.sample(branch, ids, end, stop, turn)
        try:
            await asyncio.shield(turn)
        finally:
            if turn.done() and branch.sampling is turn:
                branch.sampling = None
        self.raise_if_ended()

    def _held(self, branch: Branch, ids: list[int]) -> bool:
        """Whether the branch holds these tokens already.  Ends the episode if it holds others: its past cannot be
        played again."""
        there = len(branch.token_ids) - branch.shown
        if not there and ids:
            return False
        begin = branch.shown + len(ids)
        same = branch.token_ids[branch.shown : begin] == ids and not any(branch.sampled[branch.shown : begin])
        if not same or (begin < len(branch.token_ids) and not branch.sampled[begin]):
            self._course.failed(self, ENVIRONMENT_LOST)
            raise EpisodeEnded(ENVIRONMENT_LOST)
        return True

    @staticmethod
    def _end_of_turn(branch: Branch, begin: int) -> int:
        try:
            return branch.sampled.index(False, begin)
        except ValueError:
            return len(branch.sampled)

    def _check_room(self, shown: int, more: int, sampled: int) -> int:
        """Tokens that the next turn may have."""
        limits = self._limits
        room = min(
            limits.max_turn_tokens,
            limits.max_new_tokens - sampled,
            limits.max_context_tokens - shown - more,
        )
        if room < 1:
            raise ContextFull(
                f"{shown} tokens, {sampled} of them sampled, and {more} more; a trajectory has "
                f"{limits.max_context_tokens} at most, {limits.max_new_tokens} of them sampled"
            )
        return room

    def _check_turns(self) -> None:
        if self.num_turns >= self._limits.max_turns:
            raise EpisodeEnded("max_turns")


class Episodes:
    """Those that are played here now, by their keys."""

    def __init__(self) -> None:
        self._by_key: dict[str, Episode] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, episode: Episode) -> None:
        self._by_key[episode.key] = episode

    def discard(self, episode: Episode) -> None:
        self._by_key.pop(episode.key, None)

    def by_key(self, key: str) -> Episode | None:
        """For the endpoint: the episode is played there from now on, too."""
        if (episode := self._by_key.get(key)) is not None:
            episode.exposed = True
        return episode
