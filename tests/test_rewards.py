import asyncio
import pathlib
import textwrap
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psutil
import pytest

from actors.rewards import RewardFailure, RewardPool, Score
from stream_rl.errors import ConfigError, TaskError
from stream_rl.task import Prompt

T = TypeVar("T")

MISCHIEF = textwrap.dedent("""
    import os, signal, sys, time

    class Task:
        def __init__(self, fail=False):
            if fail:
                raise RuntimeError("cannot be made")

        def prompts(self, split, seed):
            return iter(())

        def reward(self, prompt, completion):
            match completion:
                case "raise":
                    raise KeyError("no such answer")
                case "hang":
                    time.sleep(1000)
                case "slow":
                    start = time.monotonic()
                    time.sleep(0.2)
                    return {"reward": 0.0, "from": start, "to": time.monotonic()}
                case "print":
                    print("to python's stdout" * 1000, flush=True)
                    os.write(1, b"to the descriptor itself")
                case "read":
                    return float(sys.stdin.read() == "")
                case "nan":
                    return float("nan")
                case "infinite part":
                    return {"reward": 1.0, "part": float("inf")}
                case "no reward":
                    return {"part": 1.0}
                case "text":
                    return "good"
                case "exit":
                    os._exit(0)
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "parts":
                    return {"reward": 0.5, "right": 1, "length": 2.0}
            return float(prompt.data["answer"])
""")
PROMPT = Prompt(text="?", data={"answer": 0.75})


@pytest.fixture
def task(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "mischief.py"
    path.write_text(MISCHIEF)
    return f"{path}:Task"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def run(task: str, use: Callable[[RewardPool], Awaitable[T]], *, processes: int = 1, timeout_s: float = 10.0) -> T:
    """`use` in a pool, and the proof that the pool left no process."""

    async def main() -> T:
        async with RewardPool(task, {}, processes=processes, timeout_s=timeout_s) as pool:
            return await use(pool)

    before = children()
    try:
        return asyncio.run(main())
    finally:
        assert children() <= before


async def failure(pool: RewardPool, completion: str) -> RewardFailure:
    with pytest.raises(RewardFailure) as caught:
        await pool.score(PROMPT, completion)
    return caught.value


def test_a_number_is_the_reward_and_a_mapping_has_parts(task: str) -> None:
    async def use(pool: RewardPool) -> list[Score]:
        return [await pool.score(PROMPT, "fine"), await pool.score(PROMPT, "parts")]

    assert run(task, use) == [Score(0.75, {}), Score(0.5, {"right": 1.0, "length": 2.0})]


def test_what_a_task_prints_does_not_disturb_the_protocol_and_it_reads_nothing(task: str) -> None:
    async def use(pool: RewardPool) -> list[float]:
        return [(await pool.score(PROMPT, completion)).reward for completion in ("print", "read", "fine")]

    assert run(task, use) == [0.75, 1.0, 0.75]


def test_failures_have_reasons_and_the_next_completion_is_scored(task: str) -> None:
    expected = {
        "raise": "reward_raised",
        "no reward": "reward_raised",
        "text": "reward_raised",
        "nan": "reward_not_finite",
        "infinite part": "reward_not_finite",
        "exit": "reward_died",
        "killed": "reward_died",
    }

    async def use(pool: RewardPool) -> dict[str, str]:
        reasons = {}
        for completion in expected:
            reasons[completion] = (await failure(pool, completion)).reason
            assert (await pool.score(PROMPT, "fine")).reward == 0.75
        assert "KeyError: 'no such answer'" in str(await failure(pool, "raise"))
        return reasons

    assert run(task, use) == expected


def test_the_deadline_is_kept_and_the_other_workers_go_on(task: str) -> None:
    async def use(pool: RewardPool) -> float:
        start = time.monotonic()
        hanging = asyncio.create_task(failure(pool, "hang"))
        await asyncio.sleep(0)
        for _ in range(3):
            assert (await pool.score(PROMPT, "fine")).reward == 0.75
        assert not hanging.done()
        assert (await hanging).reason == "reward_timeout"
        took = time.monotonic() - start
        assert [(await pool.score(PROMPT, "fine")).reward for _ in range(2)] == [0.75, 0.75]
        return took

    assert 0.5 <= run(task, use, processes=2, timeout_s=0.5) < 20.0


def test_as_many_at_once_as_there_are_workers(task: str) -> None:
    async def use(pool: RewardPool) -> list[Score]:
        return await asyncio.gather(*(pool.score(PROMPT, "slow") for _ in range(6)))

    scores = [score.parts for score in run(task, use, processes=2)]
    assert max(sum(a["from"] <= b["from"] < a["to"] for a in scores) for b in scores) == 2


def test_waiting_for_a_worker_does_not_count_against_the_deadline(task: str) -> None:
    async def use(pool: RewardPool) -> list[Score]:
        return await asyncio.gather(*(pool.score(PROMPT, "slow") for _ in range(8)))

    assert len(run(task, use, timeout_s=1.4)) == 8


def test_after_a_cancelled_score_the_next_one_gets_its_own_answer(task: str) -> None:
    async def use(pool: RewardPool) -> Score:
        hanging = asyncio.create_task(pool.score(PROMPT, "slow"))
        await asyncio.sleep(0.05)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        return await pool.score(PROMPT, "parts")

    assert run(task, use).reward == 0.5


def test_nothing_is_left_when_the_pool_is_cancelled_in_the_middle(task: str) -> None:
    async def use(pool: RewardPool) -> None:
        async with asyncio.timeout(0.3):
            await asyncio.gather(*(pool.score(PROMPT, "hang") for _ in range(5)))

    with pytest.raises(TimeoutError):
        run(task, use, processes=2)


@pytest.mark.parametrize(
    ("use", "options", "error", "says"),
    [
        ("actors.tasks.cashier:Nobody", {}, ConfigError, "Nobody"),
        ("actors.tasks.cashier:Cashier", {"coins": 3}, ConfigError, "coins"),
        ("{task}", {"fail": True}, TaskError, "cannot be made"),
    ],
)
def test_a_task_that_cannot_be_loaded_stops_the_pool(
    task: str, use: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def main() -> None:
        async with RewardPool(use.format(task=task), options, processes=2, timeout_s=1.0):
            raise AssertionError("must not be entered")

    before = children()
    with pytest.raises(error, match=says):
        asyncio.run(main())
    assert children() <= before


def test_data_that_cannot_travel_is_the_tasks_fault(task: str) -> None:
    async def use(pool: RewardPool) -> None:
        with pytest.raises(TaskError, match=r"Prompt\.data"):
            await pool.score(Prompt(text="?", data={"answer": object()}), "fine")

    run(task, use)
