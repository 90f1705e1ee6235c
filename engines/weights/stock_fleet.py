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
        self._urls = {str(i): url for i, url in enumerate(recipe.weights.stock_servers)}
        """By the name of the server's folder."""
        self._feeds: dict[str, tuple[str, asyncio.Task[None]]] = {}
        """Address and loop of each, once `run` has begun it."""
        wanted = self._urls or recipe.weights.delivery == "reload"
        shapes = checkpoint_shapes(self._model) if wanted else {}
        self._shapes = {name: shape for name, (shape, _) in shapes.items()}
        self._tensors: dict[str, torch.Tensor] = {}
        self._newest: Version | None = None
        self._changed = asyncio.Condition()

    async def serve(self, name: str, url: str) -> None:
        """Feed this server too, or at another address than before."""
        async with self._changed:
            self._urls[name] = url
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
                for name, url in self._urls.items():
                    fed = self._feeds.get(name)
                    if fed is None or fed[0] != url:
                        if fed is not None:
                            fed[1].cancel()
                        server = StockServer(url, self._model, self._scratch / name, self._timeout_s)
                        self._feeds[name] = url, tasks.create_task(self._feed(server, report), name=f"feed {name}")
                async with self._changed:
                    await self._changed.wait_for(self._has_news)

    def _has_news(self) -> bool:
        return {name: fed[0] for name, fed in self._feeds.items()} != self._urls

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

    def _copied(self, chain: Chain) -> dict[str, torch.Tensor]:
        return {name: bits.clone().view(dtype).reshape(self._shapes[name]) for name, dtype, bits in chain.tensors()}
