"""One environment process: `python -m actors.environment_process`, spoken to by `actors.environments` over its pipes.

Both ways a frame is 4 bytes of big-endian length and that many bytes of `stream_rl.plain`.  It plays many episodes at
once, each known by its number:

    -> {"use", "options", "base_url", "no_endpoint"}
                                <- {"ready": True}  or  {"error", "kind"}, and it ends
    -> {"start", "text", "data", "key"}
                                <- {"turn", "observation", "tools"}
    -> {"turn", "text", "finish", "reasoning", "tool_calls"}  or  {"refused", "reason", "detail"}
                                <- {"so_far", "reward"}
    -> {"cancel"}               <- {"over", "reward", "parts"}  or  {"over", "failure", "detail"}
                                <- {"alive"} each second, or {"blocked"}: by the episode with this number, or 0

End of input ends the process.  The task's prints go to stderr, and its standard input is empty.
"""

import asyncio
import contextvars
import signal
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, cast

from actors.reward_worker import checked_reward, take_pipes
from actors.reward_worker import write as write_frame
from stream_rl import runtime
from stream_rl.episode import EpisodeFailed, EpisodeTask, Message, ToolCall, Turn
from stream_rl.errors import ConfigError, TaskError, WireError
from stream_rl.plain import unpack
from stream_rl.task import Prompt, load_task

WATCH_SECONDS = 1.0
"""A loop that runs nothing for this long is blocked."""
MAX_REASON = 64
_episode: contextvars.ContextVar[int] = contextvars.ContextVar("episode", default=0)


class Process:
    """Everything that runs on the process's loop."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._writing = threading.Lock()
        self._playing: dict[int, asyncio.Task[None]] = {}
        self._turns: dict[int, asyncio.Future[Turn]] = {}
        """Asked for and not answered yet, whether anybody waits or not."""
        self._asking: set[int] = set()
        self._owners: weakref.WeakKeyDictionary[asyncio.Task[Any], int] = weakref.WeakKeyDictionary()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._make_task)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._incoming)
        opening = await _read(reader)
        if opening is None:
            return
        try:
            task = cast(EpisodeTask, load_task(opening["use"], opening["options"]))
        except (ConfigError, TaskError) as error:
            self.write({"error": str(error), "kind": type(error).__name__})
            return
        self.write({"ready": True})
        threading.Thread(target=self._watch, args=(loop,), daemon=True).start()
        async with asyncio.TaskGroup() as tasks:
            while (frame := await _read(reader)) is not None:
                match frame:
                    case {"start": number, "text": text, "data": data, "key": key}:
                        model = EpisodeModel(self, number, key, opening["base_url"], opening["no_endpoint"])
                        prompt = Prompt(text=text, data=data)
                        playing = self._playing[number] = tasks.create_task(self._play(task, prompt, model))
                        playing.add_done_callback(partial(self._never_began, number))
                    case {"turn": number, **said}:
                        self._answer(number, _turn(said))
                    case {"refused": number, "reason": reason, "detail": detail}:
                        self._answer(number, EpisodeFailed(reason, detail))
                    case {"cancel": number}:
                        if number in self._playing:
                            self._playing[number].cancel()
            for playing in self._playing.values():
                playing.cancel()

    def write(self, frame: dict[str, Any]) -> None:
        """Blocks while the actor does not read.  Raises WireError for what is not plain."""
        with self._writing:
            write_frame(self._outgoing, frame)

    async def ask(self, number: int, frame: dict[str, Any]) -> Turn:
        """One that was given up on has its answer first: the next is behind it, and must not be taken for it."""
        if number in self._asking:
            raise RuntimeError("one turn at a time: await the last one before asking for the next")
        self._asking.add(number)
        try:
            if (given_up := self._turns.get(number)) is not None:
                await asyncio.wait([given_up])
            self.write(frame)
            turn = self._turns[number] = asyncio.get_running_loop().create_future()
            turn.add_done_callback(lambda turn: turn.cancelled() or turn.exception())  # nobody may be waiting
            return await asyncio.shield(turn)
        finally:
            self._asking.discard(number)

    def _answer(self, number: int, answer: Turn | EpisodeFailed) -> None:
        turn = self._turns.pop(number, None)
        if turn is None:
            return  # its episode is over
        if isinstance(answer, Turn):
            turn.set_result(answer)
        else:
            turn.set_exception(answer)

    async def _play(self, task: EpisodeTask, prompt: Prompt, model: "EpisodeModel") -> None:
        _episode.set(model.number)
        self._owners[cast(asyncio.Task[Any], asyncio.current_task())] = model.number
        over: dict[str, Any]
        try:
            given = await task.play(prompt, model)
            over = checked_reward(given, "bad_reward")
        except EpisodeFailed as failure:
            over = {"failure": str(failure.reason)[:MAX_REASON] or "environment_raised", "detail": str(failure.detail)}
        except asyncio.CancelledError:
            over = {"failure": "cancelled", "detail": ""}
        except Exception as error:  # noqa: BLE001  the user's code, at our process boundary: it costs this episode only
            over = {"failure": "environment_raised", "detail": f"{type(error).__name__}: {error}"}
        self._playing.pop(model.number, None)
        self._turns.pop(model.number, None)
        self.write({"over": model.number, **over})

    def _never_began(self, number: int, task: asyncio.Task[None]) -> None:
        """One that is cancelled before its first step says nothing itself."""
        if task.cancelled() and self._playing.pop(number, None) is not None:
            self.write({"over": number, "failure": "cancelled", "detail": ""})

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        self._owners[task] = _episode.get()
        return task

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell when the loop stands still, and in whose code: the actor ends that episode and spares the others."""
        between = threading.Event()
        while True:
            ran = threading.Event()
            loop.call_soon_threadsafe(ran.set)
            if not ran.wait(WATCH_SECONDS):
                task = asyncio.current_task(loop)
                self.write({"blocked": self._owners.get(task, 0) if task else 0})
                ran.wait()
            self.write({"alive": True})
            between.wait(WATCH_SECONDS)


class EpisodeModel:
    """stream_rl.episode.Model, over the pipes."""

    def __init__(self, process: Process, number: int, key: str, base_url: str, no_endpoint: str) -> None:
        self.number, self.key = number, key
        self._process, self._base_url, self._no_endpoint = process, base_url, no_endpoint

    @property
    def base_url(self) -> str:
        if not self._base_url:
            raise EpisodeFailed("no_endpoint", self._no_endpoint)
        return self._base_url

    async def turn(self, observation: str | Sequence[Message] = "", *, tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
        said = observation if isinstance(observation, str) else [dict(message) for message in observation]
        asked = {"turn": self.number, "observation": said, "tools": [dict(tool) for tool in tools]}
        return await self._process.ask(self.number, asked)

    async def reward_so_far(self, reward: float) -> None:
        checked = checked_reward(reward, "bad_reward")
        if "failure" in checked:
            raise EpisodeFailed(checked["failure"], checked["detail"])
        self._process.write({"so_far": self.number, "reward": checked["reward"]})


def _turn(said: Mapping[str, Any]) -> Turn:
    calls = tuple(ToolCall(**call) for call in said["tool_calls"])
    return Turn(text=said["text"], finish=said["finish"], reasoning=said["reasoning"], tool_calls=calls)


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    try:
        length = int.from_bytes(await reader.readexactly(4), "big")
        return dict(unpack(await reader.readexactly(length)))
    except (asyncio.IncompleteReadError, WireError):
        return None


def main() -> None:
    incoming, outgoing = take_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the actor's to handle; it closes our input when done
    runtime.die_with_parent()
    asyncio.run(Process(incoming, outgoing).run())


if __name__ == "__main__":
    main()
