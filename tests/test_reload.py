"""`weights.delivery = "reload"`: engines load each version from the disk, and say hello with what they then hold."""

import asyncio
import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from delivery_builders import World
from update_builders import FIRST

from engines.sglang.stock import StockUpdate
from engines.weights import stock_fleet
from engines.weights.stock_fleet import StockFleet
from scripts import tiny_model
from stream_rl import config
from stream_rl.messages import EngineHello, HashOrder, StockReport, UpdatePart
from stream_rl.types import Version


def reloading(ranks: int = 1) -> World:
    world = World(ranks=ranks)
    world.delivery._weights = dataclasses.replace(world.delivery._weights, delivery="reload")
    return world


def test_nothing_is_sent_to_an_engine_that_reloads_until_it_says_that_it_has_the_last_version() -> None:
    world = reloading()
    rank = world.engines[0].ranks[0]
    world.hear(rank.peer, rank.hello())
    world.advance()
    assert not world.under_way and not any(isinstance(message, UpdatePart) for message in rank.inbox)
    rank.model.load_weights(world.line[-1].items())
    rank.live.replaced(world.newest)
    rank.outbox.clear()
    rank.conversation.reloaded()
    rank.conversation.tick(rank.now)
    [hello] = [message for message in rank.outbox if isinstance(message, EngineHello)]
    assert hello.version == world.newest != FIRST
    world.hear(rank.peer, hello)
    orders = world.delivery.finish(world.newest)
    assert [type(order) for peer, order in orders if peer == rank.peer] == [HashOrder], "what it holds is believed"


def test_an_engine_that_says_it_holds_what_it_does_not_is_not_believed() -> None:
    world = reloading()
    rank = world.engines[0].ranks[0]
    world.hear(rank.peer, rank.hello())
    world.advance()
    rank.live.replaced(world.newest)  # and its parameters are the old ones
    rank.live.recompute()
    world.hear(rank.peer, rank.hello())
    assert not [order for peer, order in world.delivery.finish(world.newest) if peer == rank.peer]


def test_ranks_say_hello_one_after_the_other_and_only_all_of_them_are_believed() -> None:
    world = reloading(ranks=2)
    ranks = world.engines[0].ranks
    peers = {rank.peer for rank in ranks}
    for rank in ranks:
        world.hear(rank.peer, rank.hello())
    world.advance()
    for rank in ranks:
        rank.model.load_weights(world.line[-1].items())
        rank.live.replaced(world.newest)
        rank.live.recompute()
    world.hear(ranks[0].peer, ranks[0].hello())
    assert not [order for peer, order in world.delivery.finish(world.newest) if peer in peers], "one has not said so"
    world.hear(ranks[1].peer, ranks[1].hello())
    assert [[type(order) for order in rank.inbox] for rank in ranks] == [[HashOrder], [HashOrder]]
    for rank in ranks:
        rank.inbox.clear()
    world.hear(ranks[1].peer, ranks[1].hello())  # it has lost its connection, and holds what it held
    assert [[type(order) for order in rank.inbox] for rank in ranks] == [[HashOrder], [HashOrder]]


class Server:
    """Takes what it is told, unless it is broken."""

    served: list[tuple[str, Version]]
    broken: set[str]

    def __init__(self, url: str, model: pathlib.Path, scratch: pathlib.Path, timeout_s: float) -> None:
        self.url = url

    async def update(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> StockUpdate:
        if self.url in self.broken:
            self.broken.discard(self.url)
            return StockUpdate(version, 0.1, 0.1, "not up yet")
        self.served.append((self.url, version))
        return StockUpdate(version, 0.1, 0.1, "")


class OneVersion:
    def __init__(self, version: Version) -> None:
        self.version = version

    def tensors(self) -> list[Any]:
        return []


@pytest.fixture
def fleet(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> StockFleet:
    monkeypatch.setattr(stock_fleet, "StockServer", Server)
    Server.served, Server.broken = [], set()
    tiny_model.create(tmp_path / "model", layers=1)
    recipe = config.Recipe(
        run=config.Run(name="r", steps=1, directory=str(tmp_path)), model=config.Model(path=str(tmp_path / "model")),
        task=config.TaskChoice(use="a:B"), queue=config.Queue(min_tokens=1, max_tokens=1),
        weights=config.Weights(delivery="reload"), supervise=config.Supervise(retry_s=0.05),
    )  # fmt: skip
    return StockFleet(recipe)


def test_engines_are_fed_as_they_come_and_as_they_were_last_seen(fleet: StockFleet) -> None:
    asyncio.run(feed(fleet))


async def feed(fleet: StockFleet) -> None:
    reports: asyncio.Queue[StockReport] = asyncio.Queue()
    one, two = Version(0, 1), Version(0, 2)
    running = asyncio.create_task(fleet.run(reports.put))
    async with asyncio.timeout(10):
        await fleet.offer(OneVersion(one))  # type: ignore[arg-type]
        await fleet.serve("engine-0", "http://a", 1)
        assert (await reports.get()).version == one
        await fleet.serve("engine-0", "http://a", 1)
        await fleet.serve("engine-1", "http://b", 1)
        assert (await reports.get()).server == "http://b", "who says hello again has lost nothing"
        await fleet.serve("engine-0", "http://c", 2)
        assert (await reports.get()).server == "http://c"
        await fleet.serve("engine-0", "http://c", 3)
        assert (await reports.get()).server == "http://c", "an engine on the port of the one before is another"
        await fleet.offer(OneVersion(two))  # type: ignore[arg-type]
        assert {(await reports.get()).server for _ in range(2)} == {"http://b", "http://c"}, "nobody asks at a again"
    running.cancel()
    expected = [("http://a", one), ("http://b", one), *2 * [("http://c", one)], ("http://b", two), ("http://c", two)]
    assert sorted(Server.served) == sorted(expected)


def test_an_engine_that_was_not_up_yet_gets_the_last_version_all_the_same(fleet: StockFleet) -> None:
    asyncio.run(feed_one_that_is_late(fleet))


async def feed_one_that_is_late(fleet: StockFleet) -> None:
    reports: asyncio.Queue[StockReport] = asyncio.Queue()
    Server.broken.add("http://a")
    running = asyncio.create_task(fleet.run(reports.put))
    async with asyncio.timeout(10):
        await fleet.offer(OneVersion(Version(0, 1)))  # type: ignore[arg-type]
        await fleet.serve("engine-0", "http://a", 1)
        assert [(await reports.get()).problem for _ in range(2)] == ["not up yet", ""]
    running.cancel()
    assert Server.served == [("http://a", Version(0, 1))]
