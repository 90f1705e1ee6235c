"""A stock SGLang server on a GPU, CUDA graphs and overlap on: requests live through updates; every token is a version's
own, and none goes back to an older one."""

import asyncio
import pathlib

import marked_model
import numpy as np
import pytest
import torch
from stock_server import StockSGLang
from test_gpu import SGLANG, bf16

from engines.sglang.stock import StockServer, StockUpdate
from stream_rl.types import Version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
REQUESTS, TOKENS, VERSIONS = 16, 2000, 5


def test_requests_live_through_updates_and_go_on_under_the_new_weights(tmp_path: pathlib.Path) -> None:
    model = marked_model.write(tmp_path / "model", bf16(marked_model.marked_weights(0)))

    async def feed(server: StockSGLang) -> tuple[list[list[int]], list[StockUpdate], list[int]]:
        stock = StockServer(server.url, model, tmp_path / "scratch", 60)
        async with asyncio.TaskGroup() as tasks:
            prompts = [[i + 1] * (10 + 9 * i) for i in range(REQUESTS)]
            answers = [tasks.create_task(server.generate(prompt, TOKENS, temperature=0)) for prompt in prompts]
            await asyncio.sleep(0.5)
            updates = []
            for step in range(1, VERSIONS + 1):
                weights = bf16(marked_model.marked_weights(step))
                updates.append(await stock.update(Version(0, step), weights.items()))
                await asyncio.sleep(0.2)
            assert not any(answer.done() for answer in answers), "the updates came while requests were running"
        after = await server.generate([3, 1, 4, 1, 5], 40, temperature=0)
        return [answer.result()["output_ids"] for answer in answers], updates, after["output_ids"]

    with StockSGLang(tmp_path, model, **SGLANG) as server:
        streams, updates, after = asyncio.run(feed(server))
    assert [update.problem for update in updates] == [""] * VERSIONS
    for stream in streams:
        assert len(stream) == TOKENS
        assert stream == sorted(stream)
        assert set(stream) == set(range(VERSIONS + 1))
    assert after == [VERSIONS] * 40
    pauses = np.round([update.pause_seconds * 1e3 for update in updates], 1)
    print(f"\n{VERSIONS} updates under {REQUESTS} requests; pauses {pauses} ms")
