"""SGLang servers that load each version from the disk: those without our plugin, and with `weights.delivery = "reload"`
the run's own engines.  Each gets the newest version whenever it is done with the one before; none delays another."""

import asyncio
import logging
import pathlib
from collections.abc import Awaitable, Callable

import torch

from engines.sglang.stock import StockServer, StockUpdate
from engines.weights.chain import Chain
from engines.weights.huggingface_shapes import checkpoint_shapes
from stream_rl import config
from stream_rl.errors import WeightsError
from stream_rl.messages import StockReport
from stream_rl.types import Version

log = logging.getLogger(__name__)


class StockFleet:
    """All of a recipe's `weights.stock_servers`, and what `serve` adds."""

    def __init__(self, recipe: config.Recipe) -> None:
        self._model = pathlib.Path(recipe.model.path)
        self._scratch, self._timeout_s = recipe.run_directory / "stock", recipe.supervise.peer_timeout_s
        self._servers = {str(i): (url, 0) for i, url in enumerate(recipe.weights.stock_servers)}
        """Address and incarnation, by name."""
        self._feeds: dict[str, tuple[tuple[str, int], asyncio.Task[None]]] = {}
        """Which server is fed, and the loop that does, once `run` has begun it."""
        self._again_s = recipe.supervise.retry_s if recipe.weights.delivery == "reload" else None
        """Nobody but us looks after the run's own engines: what failed is tried again after this long."""
        wanted = self._servers or recipe.weights.delivery == "reload"
        shapes = checkpoint_shapes(self._model) if wanted else {}
        self._shapes = {name: shape for name, (shape, _) in shapes.items()}
        self._tensors: dict[str, torch.Tensor] = {}
        self._newest: Version | None = None
        self._changed = asyncio.Condition()

    async def serve(self, name: str, url: str, incarnation: int) -> None:
        """Feed this server too; one that was started again holds nothing of what it was given before."""
        async with self._changed:
            self._servers[name] = url, incarnation
            self._changed.notify_all()

    async def offer(self, chain: Chain) -> None:
        """The chain has a new version: copy it, since it goes on."""
        if not self._shapes:
            return
        tensors = await asyncio.to_thread(self._copied, chain)
        async with self._changed:
            self._tensors, self._newest = tensors, chain.version
            self._changed.notify_all()

    async def run(self, report: Callable[[StockReport], Awaitable[None]]) -> None:
        """Consumes: versions.  Waits for: one newer than the server's, and further servers.  Produces: servers that
        have it, a report of each update.  Unblocked by: `offer`, `serve`."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for name, (url, incarnation) in self._servers.items():
                    fed = self._feeds.get(name)
                    if fed is None or fed[0] != (url, incarnation):
                        if fed is not None:
                            fed[1].cancel()
                        # a folder for each incarnation: a thread may still be writing for the one before
                        scratch = self._scratch / (f"{name}@{incarnation}" if incarnation else name)
                        server = StockServer(url, self._model, scratch, self._timeout_s)
                        feed = tasks.create_task(self._feed(server, report), name=f"feed {name}")
                        self._feeds[name] = (url, incarnation), feed
                async with self._changed:
                    await self._changed.wait_for(self._has_news)

    def _has_news(self) -> bool:
        return {name: fed[0] for name, fed in self._feeds.items()} != self._servers

    async def _feed(self, server: StockServer, report: Callable[[StockReport], Awaitable[None]]) -> None:
        held: Version | None = None
        while True:
            async with self._changed:
                while self._newest is None or self._newest == held:
                    await self._changed.wait()
                version, tensors = self._newest, self._tensors
            held = version
            try:
                done = await server.update(version, tensors.items())
            except WeightsError as error:  # the disk; the engines need none
                done = StockUpdate(version, 0.0, 0.0, str(error))
            if done.problem:
                log.warning("%s at version %s: %s", server.url, version, done.problem)
            await report(
                StockReport(
                    server=server.url,
                    version=version,
                    pause_seconds=done.pause_seconds,
                    write_seconds=done.write_seconds,
                    problem=done.problem,
                )
            )
            if done.problem and self._again_s is not None:
                await asyncio.sleep(self._again_s)
                held = None

    def _copied(self, chain: Chain) -> dict[str, torch.Tensor]:
        return {name: bits.clone().view(dtype).reshape(self._shapes[name]) for name, dtype, bits in chain.tensors()}
