"""The trajectories that grow here, with the queue: what is asked of engines, and what is said of it.

    turn ──▶ AppendTokens ──▶ wait for Appended ──▶ wait for an engine ──▶ request ──▶ the turn is over
                                                          │ park                │ aborted, or the engine is gone
                                                          └─────────────────────┴──▶ Interrupted, wait for Resume

The queue gives the orders and may give one twice: a segment runs once, and only the newest of a trajectory runs.  What
it holds is the truth: if tokens that the player was shown are not among it, the player begins again.
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence

from actors.engine_pool import EnginePool
from actors.episodes import ENDED, ENVIRONMENT_LOST, Branch, Episode, EpisodeEnded, Episodes, Player
from actors.growing import Growing, Key, Make, append, branch_opened, closed, hold, interrupted
from actors.recent import Recent
from actors.rewards import Score
from actors.sampling import Sampling
from engines.sglang.client import EngineUnreachable
from stream_rl.errors import EngineError
from stream_rl.messages import Appended, Resume
from stream_rl.session import Session
from stream_rl.task import Prompt
from stream_rl.types import Finish, Status, make_rid

log = logging.getLogger(__name__)
UNREACHABLE_BACKOFF_SECONDS = 1.0
"""From finding an engine gone until the queue hears it, which resumes at once: a dead engine makes no hot loop."""
MAX_COUNTS = 512
"""Names of counters; reasons are the task's to choose."""
NO_MORE = sys.maxsize
"""Noted in place of a segment's number: nothing of this trajectory runs any more."""
CANCELLED = "cancelled"


class Segments:
    """The course of episodes that train.  Runs in the task group of its actor."""

    def __init__(
        self,
        run: str,
        session: Session,
        engines: EnginePool,
        player: Player,
        sampling: Sampling,
        episodes: Episodes,
        counts: Counter[str],
        tasks: asyncio.TaskGroup,
        retry_s: float,
        deadline_s: float | None = None,
    ) -> None:
        self._run, self._session, self._engines, self._player = run, session, engines, player
        self._sampling, self._episodes, self._counts = sampling, episodes, counts
        self._tasks: asyncio.TaskGroup = tasks
        self._retry_s, self._deadline_s = retry_s, deadline_s
        self._running: dict[Key, Growing] = {}
        self._over = Recent[Key]()
        """The newest segment of a trajectory that runs here no more."""
        self._members: dict[int, int] = {}
        """Of each group that has trajectories here, branches included."""
        self._branching = asyncio.Lock()
        """Branches are numbered in the order in which they are said."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Trajectories without a turn under way."""
        return sum(trajectory.turn is None for trajectory in self._running.values())

    # -- orders ------------------------------------------------------------------------------------------------

    def begin(self, prompt: Prompt, branch: Branch, members: int, opening: int) -> None:
        """Play a member of a group that was just opened, by the message with this number; unless it was cancelled."""
        if not self._closed and (branch.group, branch.member) not in self._over:
            self._begin(prompt, branch, members, opening, 0)

    def resume(self, resume: Resume, prompt: Prompt) -> None:
        """Go on from the tokens that the queue holds, unless this segment or a later one runs or ran here."""
        key = resume.group, resume.member
        running = self._running.get(key)
        if self._closed or resume.segment <= max(self._over.get(key, -1), running.segment if running else -1):
            return
        if running is not None:
            self._members[resume.group] = max(self._members[resume.group], resume.members)
            self._stop(running)
            running.segment, running.resting, running.parked = resume.segment, False, False
            self._adopt(running, resume)
        elif resume.forked:  # who began its branches is gone, or has said how they ended
            self._fail(key, resume.segment, ENVIRONMENT_LOST)
            trunk = self._running.get((resume.group, resume.episode))
            if trunk is not None:
                self.failed(trunk.episode, ENVIRONMENT_LOST)
        else:
            branch = Branch(*key)
            hold(branch, resume)
            self._begin(prompt, branch, resume.members, -1, resume.segment)

    def appended(self, message: Appended) -> None:
        """The queue holds the tokens behind the segment before."""
        running = self._running.get((message.group, message.member))
        if running is None or not running.observation or message.segment <= running.segment:
            return
        running.branch.extend(running.observation)
        running.branch.finish = ""
        running.segment, running.observation, running.parked = message.segment, [], False
        self._ask(running)

    def park(self, group: int, member: int, segment: int) -> None:
        """End the segment's request, so that it is said to be interrupted."""
        key = group, member
        running = self._running.get(key)
        if running is None:
            if self._over.get(key, -1) < segment:
                self._over.note(key, segment)
                self._say(interrupted(key, segment, "parked", -1))
        elif running.segment != segment or running.parked or running.resting or running.observation:
            pass  # of the past; said before; AppendTokens is the answer
        elif running.engine is not None:
            running.parked = True
            self._abort(running)
        elif running.turn is not None or running.branch.finish not in ENDED:
            self._stop(running)
            self._interrupt(running, "parked", 0)

    def fail(self, group: int, member: int, segment: int, reason: str) -> None:
        """Close a trajectory that cannot go on here."""
        if (running := self._running.get((group, member))) is not None:
            self.failed(running.episode, reason)
        else:
            self._fail((group, member), segment, reason)

    def cancel(self, group: int, member: int) -> None:
        """Stop the trajectory for good and say nothing of it; its episode goes on while it has others."""
        key = group, member
        if (running := self._running.get(key)) is not None:
            self._forget(running)
            if running.turn is not None and not running.turn.done():
                running.turn.set_exception(EpisodeEnded(CANCELLED))
            if not self._of(running.episode):
                self._end(running.episode, CANCELLED)
        self._over.note(key, NO_MORE)

    def close(self) -> None:
        """Cancel all, and begin nothing more."""
        self._closed = True
        for running in list(self._running.values()):
            self._forget(running)
            self._over.note(running.key, NO_MORE)
            self._end(running.episode, "drained")

    # -- of an episode -----------------------------------------------------------------------------------------

    async def branch(self, episode: Episode, token_ids: list[int]) -> Branch:
        # a caller that goes away half-way would leave a number that is never said, or a branch that nobody closes
        branch = await asyncio.shield(self._tasks.create_task(self._open_branch(episode, token_ids)))
        if branch is None:
            raise EpisodeEnded(episode.ended)
        return branch

    async def _open_branch(self, episode: Episode, token_ids: list[int]) -> Branch | None:
        """None: the episode has ended."""
        async with self._branching:
            try:
                episode.raise_if_ended()
            except EpisodeEnded:
                return None
            branch = Branch(episode.group, self._members[episode.group])
            self._members[episode.group] += 1
            opening = await self._session.post(branch_opened((branch.group, branch.member), episode.member, token_ids))
        if episode.ended:
            self._fail((branch.group, branch.member), 0, episode.ended)
            return None
        branch.extend(token_ids)
        episode.branches.append(branch)
        self._counts["branches"] += 1
        self._running[branch.group, branch.member] = Growing(episode, branch, opening)
        return branch

    def sample(
        self, branch: Branch, token_ids: list[int], end: int, stop: Sequence[str], turn: asyncio.Future[None]
    ) -> None:
        running = self._running.get((branch.group, branch.member))
        if running is None:
            turn.set_exception(EpisodeEnded(CANCELLED))
            return
        running.turn, running.observation, running.end, running.stop = turn, token_ids, end, stop
        if not running.resting:
            self._go_on(running)

    async def done(self, episode: Episode, score: Score) -> None:
        under_way = [running for running in self._of(episode) if running.turn is not None]
        for running in under_way:
            running.cut = True
            if running.engine is not None:
                self._abort(running)
            elif running.request is not None and not running.resting:  # it waits for an engine
                self._stop(running)
                self._turn_is_over(running, Finish.LENGTH)
        if turns := [running.turn for running in under_way if running.turn is not None]:
            await asyncio.wait(turns)
        for running in self._of(episode):
            self._forget(running)
            if not running.branch.num_sampled:
                self._fail(running.key, running.segment, "nothing_sampled")
                continue
            self._over.note(running.key, running.segment)
            self._say(
                closed(
                    running.key,
                    running.segment,
                    status=Status.DONE,
                    reward=score.reward,
                    reward_parts=score.parts,
                    num_sampled=running.branch.num_sampled,
                )
            )
        self._end(episode, "done")

    def failed(self, episode: Episode, reason: str) -> None:
        for running in self._of(episode):
            self._forget(running)
            self._fail(running.key, running.segment, reason)
        self._end(episode, reason)

    # -- inside ------------------------------------------------------------------------------------------------

    def _begin(self, prompt: Prompt, branch: Branch, members: int, opening: int, segment: int) -> None:
        episode = Episode(prompt, branch, self, self._player, self._sampling.limits, self._tasks, self._deadline_s)
        self._members[branch.group] = max(self._members.get(branch.group, 0), members)
        self._running[branch.group, branch.member] = Growing(episode, branch, opening, segment)
        self._episodes.add(episode)
        episode.start()

    def _of(self, episode: Episode) -> list[Growing]:
        keys = dict.fromkeys((branch.group, branch.member) for branch in (episode.trunk, *episode.branches))
        there = [self._running[key] for key in keys if key in self._running]
        return [running for running in there if running.episode is episode]

    def _end(self, episode: Episode, reason: str) -> None:
        self._episodes.discard(episode)
        episode.end(reason)

    def _forget(self, running: Growing) -> None:
        self._stop(running)
        del self._running[running.key]
        group = running.branch.group
        if not any(key[0] == group for key in self._running):
            del self._members[group]

    def _stop(self, running: Growing) -> None:
        if running.request is not None and running.request is not asyncio.current_task():
            running.request.cancel()
            if running.engine is not None:
                rid = self._rid(running)
                self._tasks.create_task(self._engines.abort(running.engine, rid))
        running.request, running.engine = None, None

    def _rid(self, running: Growing) -> str:
        return make_rid(self._run, *running.key, running.segment)

    def _say(self, make: Make) -> None:
        self._tasks.create_task(self._session.post(make))

    def _interrupt(self, running: Growing, reason: str, num_sampled: int) -> None:
        running.resting = True
        self._say(interrupted(running.key, running.segment, reason, num_sampled))

    def _fail(self, key: Key, segment: int, reason: str) -> None:
        name = f"failed.{reason}"
        known = name in self._counts or len(self._counts) < MAX_COUNTS
        self._counts[name if known else "failed.other"] += 1
        self._over.note(key, segment)
        self._say(closed(key, segment, status=Status.FAILED, reason=reason))

    def _adopt(self, running: Growing, resume: Resume) -> None:
        """What the queue holds of it, in place of what it has here."""
        branch, acted_on = running.branch, running.branch.shown
        before = branch.token_ids[:acted_on], branch.sampled[:acted_on]
        if running.turn is not None and not running.observation:
            # the observation was confirmed: it is in the branch, and must be in what the queue holds
            first = branch.sampled.index(True, acted_on) if True in branch.sampled[acted_on:] else len(branch.sampled)
            before = branch.token_ids[:first], branch.sampled[:first]
        hold(branch, resume)
        same = branch.token_ids[: len(before[0])] == before[0] and branch.sampled[: len(before[1])] == before[1]
        there = len(branch.token_ids) > acted_on
        if same and there and (said := running.observation):
            behind = acted_on + len(said)
            same = branch.token_ids[acted_on:behind] == said and not any(branch.sampled[acted_on:behind])
            running.observation = []
        if not same:
            self._counts["rebuilt"] += 1
            running.episode.rebuild()
            running.observation, running.turn, branch.sampling = [], None, None
        elif running.turn is not None:
            self._go_on(running)

    def _go_on(self, running: Growing) -> None:
        """With the turn under way."""
        if not running.observation:
            self._ask(running)
            return
        self._counts["appended_tokens"] += len(running.observation)
        self._say(append(running.key, running.segment, running.branch.num_sampled, running.observation))

    def _ask(self, running: Growing) -> None:
        branch = running.branch
        if branch.finish in ENDED:
            self._turn_is_over(running, branch.finish)
        elif running.cut or len(branch.token_ids) >= running.end:
            self._turn_is_over(running, Finish.LENGTH)
        else:
            running.request = self._tasks.create_task(self._request(running), name=self._rid(running))

    def _turn_is_over(self, running: Growing, finish: str) -> None:
        running.branch.finish = finish
        turn, running.turn, running.request = running.turn, None, None
        self._counts["turns"] += 1
        if turn is not None and not turn.done():
            turn.set_result(None)

    def _abort(self, running: Growing) -> None:
        """End its request, and hear what it had sampled."""
        if running.request is not None and running.engine is not None:
            self._tasks.create_task(self._abort_until_it_ends(running, running.request, self._rid(running)))

    async def _abort_until_it_ends(self, running: Growing, request: asyncio.Task[None], rid: str) -> None:
        """An abort that overtakes its request is lost, so it is said again."""
        while running.request is request and running.engine is not None:
            await self._engines.abort(running.engine, rid)
            await asyncio.wait([request], timeout=self._retry_s)

    async def _request(self, running: Growing) -> None:
        """Whatever goes wrong costs this segment or its episode, by name."""
        await self._session.acknowledged(running.opening)
        branch, rid = running.branch, self._rid(running)
        engine = await self._engines.pick(running.last_engine)
        running.engine = running.last_engine = engine
        parameters = self._sampling.parameters(running.end - len(branch.token_ids), running.stop)
        try:
            generation = await engine.generate(rid, branch.token_ids, parameters)
        except TimeoutError:
            self._tasks.create_task(self._engines.abort(engine, rid))
            self.failed(running.episode, "request_timeout")
            return
        except EngineUnreachable as error:
            log.warning("%s: %s", rid, error)
            self._counts["interrupted.engine_unreachable"] += 1
            await self._engines.doubt(engine)
            await asyncio.sleep(UNREACHABLE_BACKOFF_SECONDS)
            running.engine = None  # until here it is not known to have sampled nothing
            self._interrupt(running, "engine_unreachable", -1)
            return
        except EngineError as error:  # it would refuse it again, and so would the others
            log.warning("%s: %s", rid, error)
            self.failed(running.episode, "engine_refused")
            return
        running.engine = None
        self._counts["generated_tokens"] += len(generation.token_ids)
        if generation.finish is Finish.ABORT:
            reason = "parked" if running.parked else "cut" if running.cut else "interrupted"
            self._counts[f"interrupted.{reason}"] += 1
            self._interrupt(running, reason, len(generation.token_ids))
            return
        branch.extend(generation.token_ids, generation.logprobs)
        self._turn_is_over(running, generation.finish)
