"""Sessions of many turns against the endpoint or against SGLang, in a process of their own.

python -m scripts.bench.endpoint_load < PLAN, a JSON object; the figures are printed as one.

Both get the same tokens: at the endpoint a turn is a chat completion with the whole history as text, at SGLang it is
the history's token ids.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp

TIMEOUT_S = 600.0


async def through_endpoint(http: aiohttp.ClientSession, plan: dict[str, Any], number: int) -> int:
    headers = {"Authorization": f"Bearer {plan['keys'][number]}"}
    messages: list[dict[str, Any]] = []
    tokens = 0
    for _ in range(plan["turns"]):
        messages.append({"role": "user", "content": plan["question"]})
        body = {"model": "policy", "messages": messages, "max_tokens": plan["tokens"], "logprobs": False}
        async with http.post(plan["url"] + "/v1/chat/completions", json=body, headers=headers) as response:
            answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"the endpoint answered {response.status}: {answer}")
        messages.append(answer["choices"][0]["message"])
        tokens += answer["usage"]["completion_tokens"]
    return tokens


async def directly(http: aiohttp.ClientSession, plan: dict[str, Any], number: int) -> int:
    sampling = {"max_new_tokens": plan["tokens"], "temperature": 1.0, "ignore_eos": True}
    token_ids: list[int] = []
    tokens = 0
    for turn in range(plan["turns"]):
        token_ids = token_ids + plan["suffix"] if turn else list(plan["prompt"])
        body = {"input_ids": token_ids, "sampling_params": sampling, "return_logprob": True}
        async with http.post(plan["url"] + "/generate", json=body) as response:
            answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"SGLang answered {response.status}: {answer}")
        token_ids = token_ids + answer["output_ids"]
        tokens += len(answer["output_ids"])
    return tokens


async def main() -> None:
    plan = json.loads(sys.stdin.read())
    session = directly if plan["direct"] else through_endpoint
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(session(http, plan, number)) for number in range(plan["sessions"])]
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "tokens": sum(task.result() for task in asked)}))


if __name__ == "__main__":
    asyncio.run(main())
