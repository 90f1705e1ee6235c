"""Versions on their way through a real publisher to real SGLang engines, over a network that loses, repeats, reorders
and corrupts, while either side is killed and started again: every commit has the right hash, the end the right bits."""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import marked_model
import numpy as np
import psutil
import pytest
import torch
from fake_queue import FakeQueue
from lossy_link import FAULTS, LossyLink
from update_builders import anchor_parts, dtypes_of, flat
from weights_builders import RUN, Tensors, hash_of

from actors.hand_over import HandOver
from engines.weights.chain import differences
from engines.weights.codes.payload import Code
from engines.weights.parts import Line, cut, dense_pieces
from stream_rl import config
from stream_rl.messages import EngineVerified, LearnerDone, UpdatePart, VersionReport
from stream_rl.transport import Dealer
from stream_rl.types import Version

PATIENCE_S = 3.0
"""For the engines to get to a version before the next comes."""
PART_BYTES = 20_000


def moved(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """The next version: some elements a few last places away, now and then all of them, or none."""
    share = float(rng.choice([0.0, 0.01, 0.01, 0.05, 0.3, 1.0]))
    return {
        name: torch.where(
            torch.from_numpy(rng.random(tensor.shape) < share),
            tensor * (1 + torch.from_numpy(rng.normal(0, 1e-6, tensor.shape)).to(tensor.dtype)),
            tensor,
        )
        for name, tensor in tensors.items()
    }


@dataclass
class Process:
    popen: "subprocess.Popen[bytes]"
    address: str

    def kill(self) -> None:
        """With everything that it started, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [*psutil.Process(self.popen.pid).children(recursive=True), psutil.Process(self.popen.pid)]
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.popen.wait()


@dataclass
class Site:
    """Processes of one run, each of which can be killed and comes back."""

    directory: pathlib.Path
    queue: str
    processes: dict[str, Process] = field(default_factory=dict)
    incarnations: Counter[str] = field(default_factory=Counter)

    def _spawn(self, name: str, module: str, *arguments: str) -> Process:
        self.incarnations[name] += 1
        read, write = os.pipe()
        command = [sys.executable, "-m", module, str(self.directory / "recipe.toml"), "--run-id", RUN]
        command += ["--incarnation", str(self.incarnations[name]), "--ready-fd", str(write), "--queue", self.queue]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
        log = self.directory / f"{name}.log"
        with log.open("ab") as out:
            popen = subprocess.Popen(
                [*command, *arguments],
                stdout=out,
                stderr=out,
                pass_fds=[write],
                start_new_session=True,
                env=environment,
            )
        os.close(write)
        with os.fdopen(read) as pipe:
            line = pipe.readline()
        assert line, log.read_text()[-3000:]
        return Process(popen, json.loads(line)["address"])

    async def start(self, name: str, module: str, *arguments: str) -> str:
        """Its address."""
        self.processes[name] = await asyncio.to_thread(self._spawn, name, module, *arguments)
        return self.processes[name].address

    async def start_publisher(self, bind: str = "tcp://127.0.0.1:0") -> str:
        return await self.start("publisher", "engines.weights.publisher", "--bind", bind)

    async def start_engine(self, name: str, publisher: str) -> str:
        return await self.start(name, "engines.sglang.server", "--name", name, "--publisher", publisher)

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()


def write_recipe(directory: pathlib.Path, model: pathlib.Path) -> config.Recipe:
    recipe = config.Recipe(
        run=config.Run(name=RUN, steps=1, directory=str(directory)),
        model=config.Model(path=str(model)),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=1, max_tokens=1),
        weights=config.Weights(verify_every=50, part_bytes=PART_BYTES, keep_deltas=4, parts_ahead=3),
        supervise=config.Supervise(retry_s=0.1),
        sglang={
            "device": "cpu", "attention_backend": "torch_native", "dtype": "float32", "skip_tokenizer_init": True,
            "max_total_tokens": 20000, "max_running_requests": 8, "sleep_on_idle": True,
        },
    )  # fmt: skip
    config.dump(recipe, directory / "recipe.toml")
    return recipe


class Learning:
    """Plays the learner with the product's own hand-over."""

    def __init__(self, publisher: Dealer, recipe: config.Recipe, tensors: Tensors) -> None:
        self.tensors, self.version = tensors, Version(0, 0)
        self.hand_over = HandOver(publisher, RUN, recipe.weights, recipe.supervise, self._anchor)
        self.hand_over.begin(self.version)

    async def _anchor(self) -> tuple[Version, list[UpdatePart]]:
        return self.version, anchor_parts(self.tensors, self.version, PART_BYTES)

    async def publish(self, tensors: Tensors) -> None:
        old, self.tensors = self.tensors, tensors
        self.version = Version(0, self.version.step + 1)
        await self.hand_over.put(self.version, lambda: differences(flat(old), flat(tensors), dtypes_of(tensors)))


async def generating(site: Site, name: str) -> None:
    """Keep an engine at work, whatever happens to it."""
    numbers = random.Random(name)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        while True:
            body = {
                "input_ids": [numbers.randrange(1, 120) for _ in range(6)],
                "sampling_params": {"max_new_tokens": 40, "temperature": 1.0, "ignore_eos": True},
            }
            try:
                async with http.post(f"{site.processes[name].address}/generate", json=body) as response:
                    await response.read()
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def beside(*loops: "asyncio.Future[None] | object") -> AsyncIterator[None]:
    """Run loops until the block ends; what ends one of them is raised."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(loop) for loop in loops]  # type: ignore[arg-type]
        yield
        for loop in running:
            loop.cancel()


async def play(
    directory: pathlib.Path, versions: int, engines: int, publisher_kills: int, engine_kills: int, share: float
) -> None:
    """share: of all messages, that each fault meets."""
    rng = np.random.default_rng(versions)
    tensors = marked_model.random_weights(7)
    recipe = write_recipe(directory, marked_model.write(directory / "model", tensors))
    names = [f"engine-{i}" for i in range(engines)]
    ends = [int(n) for n in np.linspace(0, versions, publisher_kills + engine_kills + 2)[1:-1]]
    kills = dict(zip(ends, rng.permutation(["publisher"] * publisher_kills + ["engine"] * engine_kills), strict=True))
    async with FakeQueue() as queue:
        site, reached = Site(directory, queue.address), Reached(queue)
        try:
            address = await site.start_publisher()
            async with LossyLink(address, versions, share) as link, Dealer.connect(address, "learner-0@1") as dealer:
                learning = Learning(dealer, recipe, tensors)
                await asyncio.gather(*(site.start_engine(name, link.address) for name in names))
                async with beside(learning.hand_over.run(), *(generating(site, name) for name in names)):
                    for version in range(1, versions + 1):
                        await learning.publish(moved(learning.tensors, rng))
                        if (kill := kills.get(version)) == "publisher":
                            site.processes["publisher"].kill()
                            await site.start_publisher(address)
                        elif kill == "engine":
                            name = names[int(rng.integers(engines))]
                            site.processes[name].kill()
                            await site.start_engine(name, link.address)
                        await reached.patiently(names, learning.version)
                    final = learning.version
                    await learning.hand_over.finish(LearnerDone(final=final, weights_hash=""))
                    await queue.until(lambda: verified(queue, final) == set(names))
        finally:
            site.stop()
    judge(queue, learning, link, names, versions)


class Reached:
    """The newest version of each engine, from what the queue has heard."""

    def __init__(self, queue: FakeQueue) -> None:
        self._queue, self._read = queue, 0
        self._newest: dict[str, Version] = {}

    def all_at(self, names: list[str], version: Version) -> bool:
        for message in self._queue.heard[self._read :]:
            if isinstance(message, VersionReport):
                self._newest[message.engine] = message.version
        self._read = len(self._queue.heard)
        return all(self._newest.get(name) == version for name in names)

    async def patiently(self, names: list[str], version: Version) -> None:
        """Wait for all engines to have a version, but not for long: they get the next one all the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), self._queue._changed:
                await self._queue._changed.wait_for(lambda: self.all_at(names, version))


def verified(queue: FakeQueue, version: Version) -> set[str]:
    return {report.engine for report in queue.of(EngineVerified) if report.version == version}


def judge(queue: FakeQueue, learning: Learning, link: LossyLink, names: list[str], versions: int) -> None:
    reports, checks = queue.of(VersionReport), queue.of(EngineVerified)
    reached = {name: {r.version for r in reports if r.engine == name} for name in names}
    stalls = sorted(report.stall_seconds for report in reports)
    print(
        f"\n{versions} versions, {len(reports)} commits ({sum(r.anchor for r in reports)} of all weights), "
        f"{len(checks)} recomputations; {dict(link.met)}; stall p50 {1e3 * stalls[len(stalls) // 2]:.2f} ms; "
        f"versions reached: { {name: len(found) for name, found in reached.items()} }"
    )
    assert all(report.hash_matches for report in reports), [r for r in reports if not r.hash_matches][:3]
    assert all(check.weights_hash == check.expected for check in checks)
    final = {check.weights_hash for check in checks if check.version == learning.version}
    assert final == {hash_of(learning.tensors)}
    assert all(link.met[fault] for fault in FAULTS), "the network was too good"
    for name in names:
        assert len(reached[name]) > versions // 2, f"{name} was brought up too seldom to say anything"


@pytest.mark.timeout(240)
def test_versions_reach_an_engine_over_a_bad_network_and_restarts_bit_for_bit(tmp_path: pathlib.Path) -> None:
    asyncio.run(play(tmp_path, versions=30, engines=1, publisher_kills=1, engine_kills=1, share=0.05))


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_versions_reach_two_engines_over_a_bad_network_and_restarts(tmp_path: pathlib.Path) -> None:
    asyncio.run(play(tmp_path, versions=1000, engines=2, publisher_kills=12, engine_kills=8, share=0.03))


def test_the_parts_of_a_large_anchor_are_many() -> None:
    """What makes the tests above hard: one update is many messages, in each of which something may happen."""
    tensors = marked_model.random_weights(7)
    pieces = [p for name, bits in flat(tensors).items() for p in dense_pieces(name, dtypes_of(tensors)[name], bits)]
    assert len(cut(pieces, Line(RUN, Version(0, 0), Version(0, 0), True), Code.FAST, PART_BYTES)) > 10
