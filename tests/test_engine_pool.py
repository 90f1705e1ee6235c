"""Which engines are asked: those that answer, however late."""

import asyncio

import pytest
from aiohttp import web

from actors import engine_pool
from actors.engine_pool import EnginePool
from stream_rl.messages import Engines


async def first_trusted(latencies: dict[str, float]) -> str:
    """Of engines that answer after so many seconds each, the first that requests would go to."""
    runners, addresses = [], []
    for latency in latencies.values():

        async def model_info(request: web.Request, latency: float = latency) -> web.Response:
            await asyncio.sleep(latency)
            return web.json_response({})

        app = web.Application()
        app.router.add_get("/model_info", model_info)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        async with EnginePool(5.0) as pool, asyncio.timeout(20):
            names = list(latencies)
            await pool.update(Engines(names=names, addresses=addresses, incarnations=[1] * len(names)))
            running = asyncio.create_task(pool.run())
            picked = await pool.pick()
            running.cancel()
            return picked.name
    finally:
        for runner in runners:
            await runner.cleanup()


def test_an_engine_that_always_answers_late_is_asked_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "PROBE_SECONDS", 0.02)
    assert asyncio.run(first_trusted({"engine-0": 0.3})) == "engine-0"


def test_one_that_answers_is_asked_while_another_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "PROBE_SECONDS", 30.0)
    assert asyncio.run(first_trusted({"engine-0": 1000.0, "engine-1": 0.0})) == "engine-1"
