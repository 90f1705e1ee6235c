"""Real SGLang servers without our plugin: requests live through updates, and go on under the new weights.

STREAM_RL_SGLANG23 names a folder with sglang 0.5.23 (pip install --no-deps --target FOLDER sglang==0.5.23), which is
then tested as well.
"""

import asyncio
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import huggingface_reference
import marked_model
import numpy as np
import pytest
import torch
from stock_server import CPU, StockSGLang

from engines.sglang.stock import StockServer, StockUpdate
from stream_rl.types import Version

pytestmark = [pytest.mark.long, pytest.mark.timeout(500)]
ANOTHER = "STREAM_RL_SGLANG23"
REQUESTS, TOKENS, VERSIONS = 8, 400, 4


@pytest.fixture(scope="module", params=["installed", "0.5.23"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSGLang]:
    folder = "" if request.param == "installed" else os.environ.get(ANOTHER, "")
    if request.param != "installed" and not folder:
        pytest.skip(f"{ANOTHER} names no folder with it")
    directory = tmp_path_factory.mktemp("stock")
    model = marked_model.write(directory / "model", marked_model.random_weights(0))
    with StockSGLang(directory, model, folder, disable_radix_cache=True, **CPU) as server:
        version = asyncio.run(server.get("/server_info"))["version"]
        print(f"\nsglang {version}")
        assert request.param in ("installed", version)
        yield server


def feed(
    server: StockSGLang, tmp_path: pathlib.Path, session: bool
) -> tuple[list[dict[str, Any]], list[StockUpdate], dict[str, Any]]:
    """Updates while requests run; their answers, and that of a request after the last."""
    model = marked_model.write(tmp_path / "model", marked_model.random_weights(0))
    stock = StockServer(server.url, model, tmp_path / "scratch", 60)
    stock._session = session

    async def run() -> tuple[list[dict[str, Any]], list[StockUpdate], dict[str, Any]]:
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(server.generate([i + 1] * (4 + 9 * i), TOKENS)) for i in range(REQUESTS)]
            await asyncio.sleep(0.3)
            updates = []
            for step in range(1, VERSIONS + 1):
                updates.append(await stock.update(Version(0, step), marked_model.random_weights(step).items()))
                await asyncio.sleep(0.1)
            assert not any(answer.done() for answer in answers), "the updates came while requests were running"
        return [answer.result() for answer in answers], updates, await server.generate([3, 1, 4, 1, 5], 40)

    return asyncio.run(run())


@pytest.mark.parametrize("session", [False, True], ids=["no session", "session"])
def test_requests_live_through_updates_and_go_on_under_the_new_weights(
    server: StockSGLang, tmp_path: pathlib.Path, session: bool
) -> None:
    if session and asyncio.run(server.get("/server_info"))["version"] < "0.5.23":
        pytest.skip("this version of SGLang has no sessions")
    answers, updates, after = feed(server, tmp_path, session)
    assert [update.problem for update in updates] == [""] * VERSIONS
    for answer in answers:
        assert len(answer["output_ids"]) == TOKENS
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        spans = [span["version"] for span in answer["meta_info"]["weight_versions"]]
        assert spans[-VERSIONS:] == [f"0.{step}" for step in range(1, VERSIONS + 1)]
    pauses = [update.pause_seconds * 1e3 for update in updates]
    writes = [update.write_seconds * 1e3 for update in updates]
    print(f"pauses {np.round(pauses, 1)} ms, writes {np.round(writes, 1)} ms")

    newest = tmp_path / "scratch" / f"version-0-{VERSIONS}"
    model = huggingface_reference.transformers.Qwen3ForCausalLM.from_pretrained(newest, dtype=torch.float32)
    whole = np.array([3, 1, 4, 1, 5, *after["output_ids"]])
    expected = huggingface_reference.reference_logprobs(model, whole, 1.0)[5:].detach().numpy()
    got = np.array([entry[0] for entry in after["meta_info"]["output_token_logprobs"]])
    assert np.abs(got - expected).max() < 1e-3
