"""Episodes of the package `verifiers`, in a process of its own: `python -P verifiers_program.py`, speaking JSON lines.

A file by itself, which imports that package and the standard library only: its interpreter may be of another
environment, since `verifiers` needs another version of the package openai than SGLang does.

    first line   {"env": verifiers' EnvConfig, "tasks": how many of the taskset}
                 <- {"keys": [a hash of each task's data]}  or  {"error": why not}
    then         {"episode": number, "task": index, "url": of an OpenAI API, "key": for it}
                 <- {"episode": number, "reward", "metrics"}  or  {"episode": number, "failure", "detail"}
                 {"cancel": number}
The end of its input ends it.  What the environments print goes to stderr.
"""

import asyncio
import json
import os
import sys
from functools import partial
from typing import Any

MODEL = "policy"


async def main(told: Any) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=64 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)

    def tell(answer: dict[str, Any]) -> None:
        told.write(json.dumps(answer) + "\n")
        told.flush()

    opening = json.loads(await lines.readline() or "{}")
    try:
        env, tasks = load(opening["env"], opening["tasks"])
    except Exception as error:  # noqa: BLE001 - another's code, at our process boundary
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    async with env.serving(), asyncio.TaskGroup() as playing:
        tell({"keys": [task.key for task in tasks]})
        episodes: dict[int, asyncio.Task[None]] = {}

        def forget(number: int, _: asyncio.Task[None]) -> None:
            del episodes[number]

        while line := await lines.readline():
            asked = json.loads(line)
            if "cancel" in asked:
                if (episode := episodes.get(asked["cancel"])) is not None:
                    episode.cancel()
                continue
            number = asked["episode"]
            episodes[number] = playing.create_task(play(env, tasks[asked["task"]], asked, tell))
            episodes[number].add_done_callback(partial(forget, number))
        for episode in list(episodes.values()):
            episode.cancel()


def load(env: dict[str, Any], most: int) -> tuple[Any, list[Any]]:
    """The environment and so many of its tasks; whatever `verifiers` raises."""
    from verifiers.v1.utils import loaders

    made = loaders.load_environment(loaders.resolve_env_config(env))
    return made, list(made.taskset.take(most))


async def play(env: Any, task: Any, asked: dict[str, Any], tell: Any) -> None:
    from verifiers.v1.clients import EvalClientConfig, ModelContext

    number, variable = asked["episode"], f"STREAM_RL_KEY_{asked['episode']}"
    os.environ[variable] = asked["key"]  # where `verifiers` takes it from
    try:
        client = EvalClientConfig(base_url=asked["url"], api_key_var=variable)
        episode = await env.run_episode(task, ModelContext(model=MODEL, client=client))
        rewards = [trace.reward for trace in episode.traces]
        if not episode.ok or not rewards:
            error = episode.last_error or next((e for trace in episode.traces for e in trace.errors), None)
            kind, detail = (error.type, error.message) if error is not None else ("no trace", "")
            tell({"episode": number, "failure": "environment_raised", "detail": f"{kind}: {detail}"[:2000]})
            return
        metrics = {name: value for trace in episode.traces for name, value in trace.metrics.items()}
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        tell({"episode": number, "reward": sum(rewards) / len(rewards), "metrics": numbers})
    except asyncio.CancelledError:
        tell({"episode": number, "failure": "cancelled", "detail": ""})
        raise
    except Exception as error:  # noqa: BLE001 - another's code, at our process boundary
        tell({"episode": number, "failure": "environment_raised", "detail": f"{type(error).__name__}: {error}"[:2000]})
    finally:
        del os.environ[variable]


if __name__ == "__main__":
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints there
    asyncio.run(main(kept))
