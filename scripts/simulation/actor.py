"""A simulated actor: opens what it is admitted to, brings it to the engines, and carries out what the queue decides."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.simulation.clock import Clock
from scripts.simulation.engine import Engine, Request
from scripts.simulation.lengths import Episode, Lengths
from scripts.simulation.setting import Setting
from stream_rl import messages as m
from stream_rl.types import Finish, Status, make_rid


@dataclass(slots=True)
class Member:
    """A trajectory from the actor's side."""

    episode: Episode
    segment: int = 0
    request: Request | None = None
    engine: Engine | None = None
    done: int = 0
    """Tokens of the turns before."""
    first: int = -1
    """Step of the version that sampled its first token."""
    closed: bool = False


class Actor:
    def __init__(
        self,
        run: str,
        setting: Setting,
        clock: Clock,
        engines: Sequence[Engine],
        lengths: Lengths,
        say: Callable[[object], None],
        may_open: Callable[[], bool],
        too_old: Callable[[int], bool],
    ) -> None:
        """may_open: what the policy says of the next group that the queue has admitted.  too_old: whether a trajectory
        that began with this step is to be dropped."""
        self.members: dict[tuple[int, int], Member] = {}
        self.opened: list[tuple[float, int]] = []
        """(time, group)"""
        self.unfinished = 0
        """Trajectories."""
        self._run, self._setting, self._clock, self._engines = run, setting, clock, {e.name: e for e in engines}
        self._lengths, self._say, self._may_open, self._too_old = lengths, say, may_open, too_old
        self._usable: list[Engine] = []
        self._admitted: deque[int] = deque()
        self._sequence = 0

    def hello(self) -> None:
        self._say(m.Hello(run=self._run, role="actor", name="actor-0", incarnation=1, pid=1))

    def receive(self, message: object) -> None:
        match message:
            case m.Welcome():
                self._admitted = deque(message.admitted)
            case m.Admit():
                self._admitted.extend(message.groups)
            case m.Engines():
                self._usable = [self._engines[name] for name in message.names]
            case m.Park():
                member = self.members[message.group, message.member]
                if member.segment == message.segment:
                    self._abort(member)
            case m.Cancel():
                member = self.members[message.group, message.member]
                self._abort(member)
                self._forget(member)
            case m.Resume():
                member, sampled = self.members[message.group, message.member], int(message.sampled.sum())
                member.segment = message.segment
                if message.finish:
                    self._close(message.group, message.member, sampled)
                else:
                    self._ask(message.group, message.member, sampled)
            case m.Appended():
                member = self.members[message.group, message.member]
                member.segment = message.segment
                self._ask(message.group, message.member, member.done)
            case m.Refused():
                raise AssertionError(f"the actor was refused: {message.reason}: {message.detail}")
        self.open()

    def open(self) -> None:
        """Open what may be opened."""
        setting = self._setting
        while self._usable and self._admitted and self._may_open():
            group = self._admitted.popleft()
            self.opened.append((self._clock.now, group))
            prompt = np.zeros(setting.prompt_tokens, np.int32)
            self._post(m.OpenGroup, group=group, task="simulated", members=setting.group_size, prompt_ids=prompt)
            self.unfinished += setting.group_size
            episodes = self._lengths.draw(np.random.default_rng([setting.seed, group]), setting.group_size)
            for number, episode in enumerate(episodes):
                self.members[group, number] = Member(episode)
                self._ask(group, number, 0)

    def expire(self) -> None:
        """Stop every trajectory that has become too old."""
        for engine in self._engines.values():
            for request in list(engine.requests.values()):
                if request.first >= 0 and self._too_old(request.first):
                    self._fail(request.group, request.member)
                    engine.abort(request.rid)

    def _ask(self, group: int, number: int, done: int) -> None:
        """Bring a trajectory with `done` tokens to the engine that has the least to do."""
        member = self.members[group, number]
        rid = make_rid(self._run, group, number, member.segment)
        member.request = Request(
            rid, group, number, member.segment, member.episode, done, done, self._ended, first=member.first
        )
        member.engine = min(self._usable, key=lambda engine: engine.load)
        member.engine.submit(member.request)

    def _ended(self, request: Request, finish: Finish) -> None:
        """An engine's response."""
        group, number, member = request.group, request.member, self.members[request.group, request.member]
        if member.closed or request.segment != member.segment:
            return
        member.first, member.request = request.first, None
        if finish is Finish.ABORT:
            sampled = request.done - request.base
            self._post(
                m.Interrupted, group=group, member=number, segment=member.segment, reason="parked", num_sampled=sampled
            )
        elif self._too_old(request.first):
            self._fail(group, number)
        elif request.done < request.episode.tokens:
            member.done = request.done
            _, wait_s = request.episode.waits[request.turn]
            self._clock.after(wait_s, functools.partial(self._append, group, number, member.segment))
        else:
            self._close(group, number, request.done)

    def _append(self, group: int, number: int, segment: int) -> None:
        """Its environment has spoken."""
        member = self.members[group, number]
        if not member.closed and member.segment == segment:
            ids = np.zeros(1, np.int32)
            self._post(
                m.AppendTokens, group=group, member=number, segment=segment, num_sampled=member.done, token_ids=ids
            )

    def _abort(self, member: Member) -> None:
        if member.request is not None and member.engine is not None:
            member.engine.abort(member.request.rid)

    def _close(self, group: int, number: int, num_sampled: int) -> None:
        reward = float((group + number) % 2)
        self._end(group, number, status=Status.DONE, reward=reward, num_sampled=num_sampled)

    def _fail(self, group: int, number: int) -> None:
        self._end(group, number, status=Status.FAILED, reason="stale")

    def _end(self, group: int, number: int, **how: Any) -> None:
        member = self.members[group, number]
        self._forget(member)
        self._post(m.CloseTrajectory, group=group, member=number, segment=member.segment, **how)

    def _forget(self, member: Member) -> None:
        self.unfinished -= not member.closed
        member.closed, member.request, member.engine = True, None, None

    def _post(self, kind: type[Any], **fields: Any) -> None:
        self._sequence += 1
        self._say(kind(sequence=self._sequence - 1, **fields))
