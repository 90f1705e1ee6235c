"""One reward process: `python -m actors.reward_worker`, spoken to by `actors.rewards.RewardPool` over its pipes.

Both ways a frame is 4 bytes of big-endian length and that many bytes of `stream_rl.plain`.

    -> {"use", "options"}               <- {"ready": True}  or  {"error", "kind"}, and the process ends
    -> {"text", "data", "completion"}   <- {"reward", "parts"}  or  {"failure", "detail"}

End of input ends the process.  The pipes are moved out of the way first: the task's prints go to stderr, and its
standard input is empty, so that user code can neither write into the protocol nor read from it.
"""

import os
import signal
from collections.abc import Mapping
from typing import Any, BinaryIO

from stream_rl import runtime
from stream_rl.errors import ConfigError, TaskError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt, Task, load_task


def main() -> None:
    incoming, outgoing = take_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the actor's to handle; it closes our input when done
    # A reward that hangs never sees the end of its input; with the actor gone, nobody is left to enforce its deadline.
    runtime.die_with_parent()
    opening = read(incoming)
    if opening is None:
        return
    try:
        task = load_task(opening["use"], opening["options"])
    except (ConfigError, TaskError) as error:
        write(outgoing, {"error": str(error), "kind": type(error).__name__})
        return
    write(outgoing, {"ready": True})
    while (request := read(incoming)) is not None:
        write(outgoing, _score(task, request))


FLOAT32_MAX = 3.4e38
"""Rewards travel and train as float32: what is beyond is infinite there, and NaN is within no bound."""


def _score(task: Task, request: Mapping[str, Any]) -> dict[str, Any]:
    prompt = Prompt(text=request["text"], data=request["data"])
    try:
        given = task.reward(prompt, request["completion"])
    except Exception as error:  # noqa: BLE001  the user's code, at our process boundary: it costs this trajectory only
        return {"failure": "reward_raised", "detail": f"{type(error).__name__}: {error}"}
    return checked_reward(given, "reward_raised")


def checked_reward(given: Any, no_number: str) -> dict[str, Any]:
    """What a task gave, as {"reward", "parts"} or {"failure", "detail"}; `no_number` is the failure of what is none."""
    try:
        parts = {str(k): float(v) for k, v in given.items()} if isinstance(given, Mapping) else {"reward": float(given)}
        reward = parts.pop("reward")
    except Exception as error:  # noqa: BLE001  as above: `given` is the user's
        return {"failure": no_number, "detail": f"{type(error).__name__}: {error}"}
    if bad := [name for name, value in {"reward": reward, **parts}.items() if not abs(value) <= FLOAT32_MAX]:
        return {"failure": "reward_not_finite", "detail": f"{', '.join(bad)} of {given!r}"}
    return {"reward": reward, "parts": parts}


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return incoming, outgoing


def read(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    body = stream.read(length)
    return dict(unpack(body)) if len(body) == length else None


def write(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = pack(message)
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


if __name__ == "__main__":
    main()
