"""The two sides that a learner talks to, as fakes that can be killed at any message and started again, and a run around
a real learner."""

import argparse
import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import torch
from huggingface_reference import OPTIMIZER, write_random_model

from actors import learner
from engines.weights import fingerprint
from engines.weights.parts import apply_, read
from stream_rl import config
from stream_rl import messages as m
from stream_rl.transport import Router
from stream_rl.types import Version

RUN, STEPS = "run-1", 5


def run(test: Coroutine[Any, Any, None], timeout: float = 60) -> None:
    asyncio.run(asyncio.wait_for(test, timeout))


def make_lease(step: Version, **changes: Any) -> m.Lease:
    """Two groups of two; the same for the same step of any history."""
    chance = np.random.default_rng(step.step)
    lengths = chance.integers(5, 20, 4).astype(np.int32)
    tokens = int(lengths.sum())
    sampled = np.concatenate([np.arange(n) >= 3 for n in lengths]).astype(np.uint8)
    fields: dict[str, Any] = {
        "step": step,
        "groups": np.array([7, 7, 9, 9]) + 10 * step.step,
        "members": np.array([0, 1, 0, 1], np.int32),
        "episodes": np.array([0, 1, 0, 1], np.int32),
        "rewards": np.array([0.0, 1.0, 0.5, 0.0], np.float32),
        "max_token_ages": np.full(4, 2, np.int32),
        "lengths": lengths,
        "token_ids": chance.integers(0, 64, tokens).astype(np.int32),
        "sampled": sampled,
        "trainable": sampled,
        "logprobs": (-4.0 * sampled).astype(np.float32),
        "histories": step.history * sampled.astype(np.int32),
        "steps": step.step * sampled.astype(np.int32),
        "ages": np.zeros(tokens, np.int32),
    }
    return m.Lease(**(fields | changes))


class Peer:
    """One side that is bound, remembers what it was told, and can be killed and started again at its address."""

    def __init__(self) -> None:
        self.router = Router.bind("tcp://127.0.0.1:0")
        self.address = self.router.address
        self.heard: list[Any] = []
        self.crash_at: Callable[[Any], bool] = lambda message: False
        """Whether it is killed at this message, before it answers."""
        self.keeps = True
        """Whether it has taken the message when it is killed by it."""
        self.crashes = 0
        self.watch: Callable[[Any], object] = lambda message: None
        self._told = asyncio.Condition()

    def crash(self) -> None:
        self.crashes += 1
        self.router.close()
        self.router = Router.bind(self.address)
        self.forget()

    def forget(self) -> None:
        raise NotImplementedError

    def answer(self, peer: bytes, message: Any) -> list[Any]:
        raise NotImplementedError

    async def serve(self) -> None:
        while True:
            peer, message = await self.router.receive()
            self.watch(message)
            crashes = self.crash_at(message)
            answers = self.answer(peer, message) if self.keeps or not crashes else []
            async with self._told:
                self.heard.append(message)
                self._told.notify_all()
            if crashes:
                self.crash()
                continue
            for reply in answers:
                await self.router.send(peer, reply)

    async def until(self, true: Callable[[], bool]) -> None:
        async with self._told:
            await self._told.wait_for(true)

    def all(self, *kinds: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kinds)]

    def each(self, kind: type[Any]) -> list[Any]:
        """Of each step the last: what is not answered at once is said again."""
        return list({message.step: message for message in self.heard if isinstance(message, kind)}.values())


def once(true: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """True of each different message that it is true of, and false of its repetitions."""
    seen: set[str] = set()

    def first(message: Any) -> bool:
        known = repr(message) in seen
        seen.add(repr(message))
        return true(message) and not known

    return first


class FakeQueue(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.version = Version(0, 0)
        self.registered: set[bytes] = set()
        self.withheld: Version | None = None
        """No lease for this step."""
        self.changes: dict[int, dict[str, Any]] = {}
        """Fields of the lease of a step."""

    def forget(self) -> None:
        self.registered.clear()

    def answer(self, peer: bytes, message: Any) -> list[Any]:
        match message:
            case m.Hello():
                self.registered.add(peer)
                return [m.Welcome(run=RUN, next_sequence=0, version=self.version)]
            case _ if peer not in self.registered:
                return [m.Refused(reason="not_registered", detail="")]
            case m.LeaseRequest(step=step) if step != self.withheld:
                return [make_lease(step, **self.changes.get(step.step, {}))]
            case m.Applied(step=step):
                self.version = Version(step.history, step.step + 1)
            case m.Committed(step=step):
                self.version = max(self.version, step)
            case m.LearnerDone(final=final):
                assert final == self.version
            case _:
                return []
        return [m.Done(what=type(message).__name__)]

    def said(self) -> list[str]:
        """What the learner said, repetitions in a row once."""
        said = [f"{type(e).__name__} {e.step}" for e in self.all(m.LeaseRequest, m.Applied, m.Committed)]
        return [line for i, line in enumerate(said) if i == 0 or line != said[i - 1]]


class FakePublisher(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, m.UpdatePart] = {}
        self.version: Version | None = None
        self.bits: dict[str, torch.Tensor] = {}
        self.hashes: dict[Version, str] = {}
        self.taken: list[Version] = []
        self.anchors: list[Version] = []
        """Of those taken, the ones that came as all weights."""
        self.done: m.LearnerDone | None = None

    def forget(self) -> None:
        self.parts, self.version, self.bits, self.done = {}, None, {}, None

    def answer(self, peer: bytes, message: Any) -> list[Any]:
        match message:
            case m.VersionOffer(base=base, target=target):
                if target == self.version:
                    return [m.VersionTaken(target=target)]
                assert self.version is None or target > self.version
                return [m.VersionWanted(target=target, anchor=base != self.version)]
            case m.UpdatePart(target=target):
                if any(part.target != target or part.anchor != message.anchor for part in self.parts.values()):
                    self.parts = {}
                self.parts[message.part] = message
                if len(self.parts) == message.parts:
                    self.take(list(self.parts.values()))
                    self.parts = {}
                return [m.VersionTaken(target=target)] if self.version == target else []
            case m.LearnerDone():
                assert self.version == message.final
                self.done = message
        return []

    def take(self, parts: list[m.UpdatePart]) -> None:
        first, pieces = parts[0], [piece for part in parts for piece in read(part)]
        if first.anchor:
            self.anchors.append(first.target)
            dense: dict[str, list[torch.Tensor]] = {}
            for piece in sorted(pieces, key=lambda piece: piece.start):
                assert piece.change.new is not None
                dense.setdefault(piece.name, []).append(piece.change.new)
            self.bits = {name: torch.cat(several) for name, several in dense.items()}
        else:
            assert first.base == self.version
            for piece in pieces:
                apply_(self.bits[piece.name][piece.start : piece.stop], piece.change)
        total = sum(fingerprint.tensor_sum(name, bits) for name, bits in self.bits.items())
        self.version = first.target
        self.hashes[first.target] = fingerprint.text(total % (1 << 64))
        self.taken.append(first.target)


class Around:
    """A run's directory, its queue and its publisher; learners come and go."""

    def __init__(
        self, directory: pathlib.Path, checkpoint_every: int = 2, peer_timeout_s: float = 20.0, **section: Any
    ) -> None:
        """section: more of [learner]."""
        if not (directory / "model").exists():
            write_random_model(directory / "model")
        self.recipe = config.Recipe(
            run=config.Run(name="run", steps=STEPS, directory=str(directory)),
            model=config.Model(path=str(directory / "model")),
            task=config.TaskChoice(use="t"),
            queue=config.Queue(min_tokens=8, max_tokens=64, max_token_age=2),
            learner=config.Learner(
                checkpoint_every=checkpoint_every,
                optimizer=OPTIMIZER,
                schedule={"lr_warmup_steps": 3},
                **section,
            ),
            weights=config.Weights(part_bytes=16 << 10),
            supervise=config.Supervise(retry_s=0.2, peer_timeout_s=peer_timeout_s),
        )
        (self.recipe.run_directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        config.dump(self.recipe, self.recipe.run_directory / "recipe.toml")
        self.queue, self.publisher = FakeQueue(), FakePublisher()

    async def __aenter__(self) -> "Around":
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._serving = [self._group.create_task(peer.serve()) for peer in (self.queue, self.publisher)]
        return self

    async def __aexit__(self, *error: Any) -> None:
        for task in self._serving:
            task.cancel()
        try:
            await self._group.__aexit__(*error)
        finally:
            self.queue.router.close()
            self.publisher.router.close()

    @contextlib.asynccontextmanager
    async def learner(self, incarnation: int = 1) -> AsyncIterator[asyncio.Task[None]]:
        """A learner's process, until the block ends.  End it only where it waits: a step's thread cannot be killed."""
        options = argparse.Namespace(
            recipe=str(self.recipe.run_directory / "recipe.toml"), run_id=RUN, incarnation=incarnation, ready_fd=None,
            queue=self.queue.address, publisher=self.publisher.address,
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            task = group.create_task(learner.main(options))
            yield task
            task.cancel()

    async def until_done(self) -> m.LearnerDone:
        """Until both have been told; what they were told."""
        await self.queue.until(lambda: bool(self.queue.all(m.LearnerDone)))
        done: m.LearnerDone = self.queue.all(m.LearnerDone)[-1]
        await self.publisher.until(lambda: repr(self.publisher.done) == repr(done))
        assert done.weights_hash == self.publisher.hashes[done.final]
        return done

    async def written(self, *names: str) -> None:
        """Until these checkpoints are there; the queue may hear of them later, while a lease is waited for."""
        async with asyncio.timeout(30):
            while not all((self.checkpoints / name).exists() for name in names):  # noqa: ASYNC110  of a thread's making
                await asyncio.sleep(0.01)

    def log(self) -> list[tuple[int, int]]:
        lines = (self.recipe.run_directory / "learner.jsonl").read_text().splitlines()
        return [(line["history"], line["step"]) for line in map(json.loads, lines)]

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.recipe.run_directory / "checkpoints"
