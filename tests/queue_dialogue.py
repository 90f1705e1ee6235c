"""What the peers of a queue process say, and waiting for what it answers."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from queue_builders import RUN

from stream_rl import messages as m
from stream_rl.transport import Dealer


def run(test: Coroutine[Any, Any, None], seconds: float = 60) -> None:
    asyncio.run(asyncio.wait_for(test, seconds))


def hello(role: str, incarnation: int = 1) -> m.Hello:
    return m.Hello(run=RUN, role=role, name=f"{role}-0", incarnation=incarnation, pid=1)


def open_group(sequence: int, group: int, members: int = 2) -> m.OpenGroup:
    prompt = np.array([1, 2], np.int32)
    return m.OpenGroup(sequence=sequence, group=group, task="t", members=members, prompt_ids=prompt)


def close(sequence: int, group: int, member: int, num_sampled: int) -> m.CloseTrajectory:
    end = {"status": "done", "reward": 1.0, "num_sampled": num_sampled}
    return m.CloseTrajectory(sequence=sequence, group=group, member=member, **end)


async def next_of(dealer: Dealer, kind: type[Any], timeout: float = 10) -> Any:
    """The next message of a type; others are passed over."""
    while not isinstance(message := await dealer.receive(timeout), kind):
        pass
    return message


async def status(observer: Dealer) -> m.Status:
    await observer.send(m.StatusRequest())
    answer: m.Status = await next_of(observer, m.Status)
    return answer


async def until(observer: Dealer, condition: Callable[[m.Status], bool]) -> m.Status:
    while not condition(answer := await status(observer)):
        pass
    return answer
