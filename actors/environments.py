"""Environments, in processes of their own: each plays many episodes of the user's `play` at once.

    Episode ──play──▶ process: the user's coroutine ──turn──▶ here: tokens ──▶ Episode.turn ──▶ engines, queue

User code may hang, crash or print; none of that may reach the actor's event loop, and little of it the other episodes
of its process: those are played again in a fresh one, from the tokens that they have (actors.episodes).

    raises                             the episode fails: environment_raised, or the reason in its EpisodeFailed
    is silent for agent.turn_gap_s     it fails: environment_hung; if it blocks its process, that is killed
    dies with its process              it is played again, and fails as environment_died if that does not help
    misses agent.deadline_s            it ends with its reward so far, or fails: deadline
    gives no number, or no finite one  it fails: bad_reward, reward_not_finite
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from actors.chat import ChatFormat
from actors.chat_template import TemplateRefused
from actors.engine_pool import EnginePool
from actors.episodes import Branch, ContextFull, Episode, EpisodeEnded, PlayerGone, Sampled
from actors.rewards import EXIT_WAIT_S, Score
from actors.sampling import Sampling
from stream_rl import config, runtime
from stream_rl.episode import EpisodeFailed
from stream_rl.errors import ConfigError, EngineError, StreamRLError, TaskError, WireError
from stream_rl.plain import pack, unpack

log = logging.getLogger(__name__)
MAX_FRAME_BYTES = 64 << 20
MAX_WAITING = 4
"""Frames of one episode that nobody has read; an honest process has one, for it waits for the answer."""
CANCEL_SECONDS = 30.0
"""Longest that a cancelled `play` may clean up; then its process is taken for hung."""
START_SECONDS = 60.0
SILENT_SECONDS = 3.0
"""A process says each second that its loop runs; after this long without, nobody's silence is held against them."""
LETTERS_IN_THE_LOOP = 20_000
"""Longer observations are tokenized in a thread: they take milliseconds, and everything else would wait for them."""
DIED, HUNG = "environment_died", "environment_hung"


class Environments:
    """The player of tasks that have `play`.  `async with Environments(...) as player`: entering starts every process,
    and raises ConfigError or TaskError if the task cannot be loaded in one; leaving leaves none behind."""

    def __init__(
        self,
        recipe: config.Recipe,
        sampling: Sampling,
        engines: EnginePool,
        chat: ChatFormat | ConfigError,
        base_url: str = "",
    ) -> None:
        """chat: or why there is none, for who says something in messages.  base_url: of the endpoint."""
        self._agent, self._sampling, self._engines, self._chat = recipe.agent, sampling, engines, chat
        no_endpoint = str(chat) if isinstance(chat, ConfigError) else "there is no endpoint"
        opening = {
            "use": recipe.task.use,
            "options": dict(recipe.task.options),
            "base_url": base_url,
            "no_endpoint": no_endpoint,
        }
        self._opening = pack(opening)
        self._hosts: list[_Host] = []

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            count = self._agent.processes
            self._hosts = [_Host(self._opening, self._agent.turn_gap_s, tasks) for _ in range(count)]
            for host in self._hosts:
                stack.push_async_callback(host.close)
            # All of them to their end, also after a failure: none may be half started when we close.
            outcomes = await asyncio.gather(*(host.start() for host in self._hosts), return_exceptions=True)
            for outcome in outcomes:
                if outcome is not None:
                    raise outcome
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def play(self, episode: Episode) -> Score:
        """Raises EpisodeFailed, or PlayerGone when its process has died."""
        host = min(self._hosts, key=lambda host: len(host.frames))
        number = await host.begin(episode)
        branch: Branch | None = None
        try:
            while True:
                match await self._next(host, number, episode):
                    case {"turn": _, "observation": observation, "tools": list(tools)}:
                        branch, answer = await self._turn(episode, branch, observation, tools)
                        await host.write({**answer, next(iter(answer)): number})
                    case {"over": _, "reward": float(reward), "parts": dict(parts)}:
                        return Score(reward, parts)
                    case {"over": _, "failure": str(reason), "detail": str(detail)}:
                        raise EpisodeFailed(reason, detail)
                    case frame:
                        host.kill(f"it said {frame!r:.200}")
                        raise PlayerGone(DIED)
        finally:
            host.leave(number)

    async def _next(self, host: "_Host", number: int, episode: Episode) -> dict[str, Any]:
        """The episode's next frame.  Turns at the endpoint are signs of life, too."""
        frames, patient = host.frames[number], True
        while True:
            left = self._agent.turn_gap_s - episode.quiet_s
            if left <= 0 and (patient or host.blocked_by) and not host.runs_for(number):
                left, patient = self._agent.turn_gap_s, False  # another one's fault, whose own time is running
            if left <= 0:
                if host.blocked_by is not None or not host.runs_for(number):
                    host.kill(f"an episode blocked it for {self._agent.turn_gap_s} s")
                raise EpisodeFailed(HUNG, f"nothing from play() for agent.turn_gap_s = {self._agent.turn_gap_s}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    frame = await frames.get()
                if frame is None:
                    raise PlayerGone(DIED)
                return frame

    async def _turn(
        self, episode: Episode, branch: Branch | None, observation: Any, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Branch | None, dict[str, Any]]:
        """The first key of the answer is what it is."""
        try:
            ids = await self._tokens(episode, branch, observation, tools)
            branch, sampled = await episode.turn(branch, ids)
            return branch, await self._said(branch, sampled, tools)
        except (EpisodeEnded, ContextFull, EpisodeFailed) as failure:
            return branch, {"refused": 0, "reason": failure.reason, "detail": str(failure)}
        except TemplateRefused as refused:
            return branch, {"refused": 0, "reason": "bad_observation", "detail": str(refused)}
        except ConfigError as error:
            return branch, {"refused": 0, "reason": "no_chat_template", "detail": str(error)}
        except (EngineError, TimeoutError) as error:  # of the parsers; the turn is there
            return branch, {"refused": 0, "reason": "not_parsed", "detail": str(error)}
        except StreamRLError as error:
            return branch, {"refused": 0, "reason": "turn_in_progress", "detail": str(error)}

    async def _tokens(
        self, episode: Episode, branch: Branch | None, observation: Any, tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        encode: Callable[[], list[int]]
        if isinstance(observation, str):
            letters, encode = len(observation), partial(self._sampling.encode_observation, observation)
        elif isinstance(self._chat, ConfigError):
            raise self._chat
        elif not isinstance(observation, list) or not observation:
            raise EpisodeFailed("bad_observation", f"expected a text or messages, got {observation!r:.100}")
        else:
            letters = sum(len(str(message)) for message in observation)
            if branch is None:
                encode = partial(self._chat.prompt, observation, tools)
            else:
                encode = partial(self._chat.suffix, observation, branch.token_ids[-1:])
        first = branch is None and episode.prompt.text
        prompt = self._sampling.encode(episode.prompt.text) if first else []
        return prompt + (encode() if letters < LETTERS_IN_THE_LOOP else await asyncio.to_thread(encode))

    async def _said(self, branch: Branch, sampled: Sampled, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = {"turn": 0, "finish": str(sampled.finish), "reasoning": "", "tool_calls": []}
        if isinstance(self._chat, ConfigError):
            return {**answer, "text": self._sampling.decode(sampled.token_ids)}
        seed = f"{branch.group}/{branch.member}/{len(branch.turns)}"
        said = await self._chat.parse(sampled.token_ids, tools, self._engines, seed)
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in said.tool_calls]
        return {**answer, "text": said.text, "reasoning": said.reasoning, "tool_calls": calls}


class _Host:
    """An environment process, or the place of one that was killed."""

    def __init__(self, opening: bytes, patience_s: float, tasks: asyncio.TaskGroup) -> None:
        self._opening, self._patience_s = opening, patience_s
        self._tasks: asyncio.TaskGroup = tasks
        self.frames: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        """What the episodes that are played here have said and nobody has read; None: the process is gone."""
        self.blocked_by: int | None = None
        """The episode in whose code the process stands still; 0: nobody knows whose."""
        self._alive_at = 0.0
        """When its loop ran last."""
        self._numbers = itertools.count(1)
        self._episodes: dict[int, Episode] = {}
        self._leaving: dict[int, asyncio.TimerHandle] = {}
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._killed: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """Start the process and load the task in it.  Raises ConfigError or TaskError if that fails."""
        # The same search path as ours, so that the task's module is found there if it is found here.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "actors.environment_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, runtime.PARENT: str(os.getpid())},
            start_new_session=True,  # what it starts itself is ended with it
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                self._send(self._opening)
                reply = await self._read(process)
        except TimeoutError:
            self.kill("it did not load the task")
            raise TaskError(f"the task did not load in an environment process within {START_SECONDS} s") from None
        except (EOFError, ConnectionError, WireError) as error:
            self.kill("it ended while it loaded the task")
            raise TaskError(
                f"an environment process ended while it loaded the task, see its stderr: {error}"
            ) from error
        except BaseException:
            self.kill("we end")
            raise
        if "error" in reply:
            self.kill("the task cannot be loaded")
            raise (ConfigError if reply["kind"] == "ConfigError" else TaskError)(reply["error"])
        self._alive_at = asyncio.get_running_loop().time()
        self._reading = self._tasks.create_task(self._dispatch(process))

    def runs_for(self, number: int) -> bool:
        """Whether the process would run this episode's code, or stands still in it."""
        if self.blocked_by is not None:
            return self.blocked_by in (0, number)
        return asyncio.get_running_loop().time() - self._alive_at < SILENT_SECONDS

    async def begin(self, episode: Episode) -> int:
        """Play it; its number."""
        number = next(self._numbers)
        self.frames[number] = asyncio.Queue()
        try:
            async with self._starting:
                if self._process is None:
                    await self.start()
            # not before: a process that ended while it started was not this episode's
            self.frames[number], self._episodes[number] = asyncio.Queue(), episode
            episode.begun()
            prompt = episode.prompt
            await self.write({"start": number, "text": prompt.text, "data": dict(prompt.data), "key": episode.key})
        except (ConfigError, TaskError) as error:
            self.leave(number)
            raise EpisodeFailed(DIED, f"its process could not be started again: {error}") from error
        except BaseException:
            self.leave(number)
            raise
        return number

    def leave(self, number: int) -> None:
        """It is over, or else it is to end."""
        self.frames.pop(number, None)
        if self._episodes.pop(number, None) is not None and self._process is not None:
            self._send(pack({"cancel": number}))
            hung = asyncio.get_running_loop().call_later(CANCEL_SECONDS, self.kill, "play() did not end when cancelled")
            self._leaving[number] = hung

    async def write(self, frame: dict[str, Any]) -> None:
        """Raises PlayerGone if nobody reads it."""
        process = self._process
        if process is None or process.stdin is None:
            raise PlayerGone(DIED)
        try:
            self._send(pack(frame))
            async with asyncio.timeout(self._patience_s):
                await process.stdin.drain()
        except (ConnectionError, TimeoutError) as error:
            if process is self._process:
                self.kill(f"it takes nothing: {error!r}")
            raise PlayerGone(DIED) from None

    def _send(self, body: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(len(body).to_bytes(4, "big") + body)

    @staticmethod
    async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        length = int.from_bytes(await process.stdout.readexactly(4), "big")
        if length > MAX_FRAME_BYTES:
            raise WireError("frame_too_long", f"an environment process announced {length} bytes")
        frame = unpack(await process.stdout.readexactly(length))
        if not isinstance(frame, dict):
            raise WireError("bad_frame", f"expected a map, got {frame!r:.100}")
        return frame

    async def _dispatch(self, process: asyncio.subprocess.Process) -> None:
        """Consumes: the process's frames.  Waits for: the next.  Produces: frames of each episode.  Unblocked by: the
        process, or its end."""
        why = "it ended"
        try:
            while process is self._process:
                self._take(await self._read(process))
        except (EOFError, ConnectionError, WireError) as error:
            why = f"it ended: {error}"
        if process is self._process:
            self.kill(why)

    def _take(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"turn": int(number)} if number in self.frames:
                self._hand_over(number, frame)
            case {"over": int(number)}:
                self._episodes.pop(number, None)
                if (hung := self._leaving.pop(number, None)) is not None:
                    hung.cancel()
                if number in self.frames:
                    self._hand_over(number, frame)
            case {"so_far": int(number), "reward": float(reward)} if number in self._episodes:
                self._episodes[number].reward_so_far = reward
            case {"blocked": int(number)}:
                self.blocked_by = number
                log.warning("episode %d keeps its environment process from everything else", number)
            case {"alive": True}:
                self.blocked_by, self._alive_at = None, asyncio.get_running_loop().time()
            case {"turn": int()} | {"so_far": int()}:
                pass  # of one that was cancelled
            case _:
                raise WireError("bad_frame", f"no use for {frame!r:.100}")

    def _hand_over(self, number: int, frame: dict[str, Any]) -> None:
        if self.frames[number].qsize() >= MAX_WAITING:
            raise WireError("too_many_frames", f"episode {number} does not wait for answers")
        self.frames[number].put_nowait(frame)

    def kill(self, why: str) -> None:
        """Its episodes hear that it is gone."""
        if self._process is None:
            return
        log.warning("environment process %d is ended: %s", self._process.pid, why)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._killed = [process for process in self._killed if process.returncode is None]
        self._killed.append(self._process)
        self._process, self.blocked_by = None, None
        for hung in self._leaving.values():
            hung.cancel()
        self._leaving.clear()
        self._episodes.clear()
        for frames in self.frames.values():
            frames.put_nowait(None)

    async def close(self) -> None:
        """Wait until every process that was ever here has ended."""
        self.kill("the actor ends")
        if self._reading is not None:
            await asyncio.wait([self._reading])
        for process in self._killed:
            try:
                async with asyncio.timeout(EXIT_WAIT_S):
                    await process.wait()
            except TimeoutError as error:
                raise TaskError(f"environment process {process.pid} does not die; end it by hand") from error
        self._killed.clear()
