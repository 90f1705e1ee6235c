"""SGLang servers without our plugin, fed beside the engines: each gets the newest version whenever it is done with the
one before, and none of them delays anybody."""

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
    """All of a recipe's `weights.stock_servers`."""

    def __init__(self, recipe: config.Recipe) -> None:
        model = pathlib.Path(recipe.model.path)
        scratch, timeout_s = recipe.run_directory / "stock", recipe.supervise.peer_timeout_s
        self._servers = [
            StockServer(url, model, scratch / str(i), timeout_s) for i, url in enumerate(recipe.weights.stock_servers)
        ]
        self._shapes = {name: shape for name, (shape, _) in checkpoint_shapes(model).items()} if self._servers else {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._newest: Version | None = None
        self._changed = asyncio.Condition()

    async def offer(self, chain: Chain) -> None:
        """The chain has a new version: copy it, since it goes on."""
        if not self._servers:
            return
        tensors = await asyncio.to_thread(self._copied, chain)
        async with self._changed:
            self._tensors, self._newest = tensors, chain.version
            self._changed.notify_all()

    async def run(self, report: Callable[[StockReport], Awaitable[None]]) -> None:
        """Consumes: versions.  Waits for: one newer than the server's.  Produces: servers that have it, a report of
        each update.  Unblocked by: `offer`."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(self._feed(server, report))

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
