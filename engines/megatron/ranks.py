"""A learner of several processes that is used as if it were one.

Every process has the same models.  The first leads: what is called on its models is told to the others, which follow,
and call it too; where one of them is lost, the collective that waits for it fails on all.  The leader says something at
least four times in every timeout, so that the others know an idle one from one that hangs.
"""

import collections
import contextlib
import datetime
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from engines.megatron import world
from engines.megatron.commands import Command, Names
from engines.megatron.saving import Saving
from stream_rl.errors import EngineError, StreamRLError, WeightsError

log = logging.getLogger(__name__)
Model = TypeVar("Model")

_ALIKE = (ValueError, WeightsError)
"""What a method raises on all processes or on none (ConfigError is a ValueError): they go on after it."""
_STREAMS = frozenset({"named_weights", "all_pieces"})
"""Methods that are not done before what they give has been taken."""
_LOCAL = frozenset({"wait"})
"""Methods that are each process's own matter."""


class Ranks:
    """Made by all of the learner's processes at the same point; then the first leads and the others follow."""

    def __init__(self, models: Mapping[str, Any], losses: Mapping[str, Any], timeout_s: float) -> None:
        """models, losses: what all have, by the same names.  timeout_s: longest that one waits for another."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._names, self._timeout_s = Names(models, losses), timeout_s
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._failed = False
        """Whether the last call raised one of `_ALIKE`."""
        self._busy = threading.Lock()
        """Of the leader: held from telling the others until it is done."""
        self._lost = ""
        self._over = threading.Event()
        self._idling = threading.Thread(target=self._idle, name="ranks", daemon=True)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """The others follow until this ends."""
        self._idling.start()
        try:
            yield
        finally:
            self._over.set()
            self._idling.join()
            with contextlib.suppress(EngineError):
                self._tell("end")

    def led(self, name: str, kind: type[Model]) -> Model:
        """The model of that name, each public method of which is called on all processes.

        kind: what it is, for the type checker.  Fields and properties are this process's.
        """
        return cast(Model, _Led(self, name, self._names.models[name]))

    def call(self, command: Command) -> Any:
        """On all processes.  Raises what the method does, EngineError if another process is lost."""
        with self._busy:
            self._tell("call", command)
            return self._do(command)

    def stream(self, command: Command) -> Iterator[Any]:
        """The same for a method that gives an iterator.  It ends for all when it ends here."""
        with self._busy:
            self._tell("call", command)
            items = self._do(command)
            try:
                yield from self._from(items, command)
            finally:
                collections.deque(self._from(items, command), maxlen=0)

    def follow(self) -> None:
        """Do what the leader says, until it says that it ends.  Raises EngineError if it, or another, is lost."""
        with ThreadPoolExecutor(1, "saving") as thread:
            saving: Future[None] | None = None
            while True:
                word, failed, *frames = self._hear()
                if word == b"end":
                    return
                if word == b"idle":
                    continue
                if json.loads(failed) != self._failed:
                    raise EngineError(f"rank {self.rank} failed alone, or did not when the others did: see their logs")
                command = self._names.decode(frames)
                if saving is not None and "checkpoint" in command.method:
                    saving.result(self._timeout_s)
                with contextlib.suppress(*_ALIKE):
                    result = self._do(command)
                    if command.method in _STREAMS:
                        collections.deque(self._from(result, command), maxlen=0)
                    if isinstance(result, Saving):
                        saving = thread.submit(_finish, result)

    def _do(self, command: Command) -> Any:
        """Call the method here."""
        world.here().enter()
        target = self._names.models[command.target]
        self._failed = False
        with self._naming(command):
            try:
                return getattr(target, command.method)(*command.arguments, **command.options)
            except _ALIKE as error:
                self._failed = True
                if self.rank:
                    log.warning("%s: %s", command.method, error)
                raise

    def _from(self, items: Iterator[Any], command: Command) -> Iterator[Any]:
        with self._naming(command):
            yield from items

    @contextlib.contextmanager
    def _naming(self, command: Command) -> Iterator[None]:
        """Say in which call another process was lost: torch says which connection broke."""
        try:
            yield
        except _ALIKE:
            raise
        except RuntimeError as error:
            self._lost = f"rank {self.rank} of {self.size} of the learner failed in {command.target}.{command.method}"
            if isinstance(error, StreamRLError):
                raise
            raise EngineError(f"{self._lost}, or another one is lost: {error}") from error

    def _idle(self) -> None:
        """Of the leader: say so while there is nothing to do."""
        while not self._over.wait(self._timeout_s / 4):
            if self._busy.acquire(blocking=False):
                try:
                    self._tell("idle")
                except EngineError as error:
                    log.error("%s", error)  # the next call raises it
                finally:
                    self._busy.release()

    def _tell(self, word: str, command: Command | None = None) -> None:
        frames = [word.encode(), json.dumps(self._failed).encode()]
        if self._lost:
            raise EngineError(f"the learner's processes are no longer together: {self._lost}")
        if command is not None:
            frames += self._names.encode(command)
        table = json.dumps([len(frame) for frame in frames]).encode()
        data = torch.frombuffer(bytearray(b"".join([table, *frames])), dtype=torch.uint8)
        try:
            dist.broadcast(torch.tensor([len(table), len(data)]), 0, group=self._group)
            dist.broadcast(data, 0, group=self._group)
        except RuntimeError as error:
            self._lost = f"rank 0 could not tell the others to {command.method if command else word}: {error}"
            raise EngineError(self._lost) from error

    def _hear(self) -> list[bytes]:
        sizes = torch.zeros(2, dtype=torch.int64)
        try:
            dist.broadcast(sizes, 0, group=self._group)
            data = torch.empty(int(sizes[1]), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self._group)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self.rank} of {self.size} of the learner heard nothing from rank 0: it is gone, or was "
                f"silent for {self._timeout_s:.0f} s: {error}"
            ) from error
        raw, at, frames = data.numpy().tobytes(), int(sizes[0]), []
        for size in json.loads(raw[:at]):
            frames.append(raw[at : at + size])
            at += size
        return frames


class _Led:
    def __init__(self, ranks: Ranks, name: str, model: Any) -> None:
        self._ranks, self._name, self._model = ranks, name, model

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._model, name)
        if name.startswith("_") or name in _LOCAL or not callable(attribute):
            return attribute
        on_all: Callable[[Command], Any] = self._ranks.stream if name in _STREAMS else self._ranks.call

        def call(*arguments: Any, **options: Any) -> Any:
            plain = [each._model if isinstance(each, _Led) else each for each in arguments]
            named = {key: each._model if isinstance(each, _Led) else each for key, each in options.items()}
            return on_all(Command(target=self._name, method=name, arguments=plain, options=named))

        return call


def _finish(saving: Saving) -> None:
    """A follower's part of a checkpoint."""
    try:
        saving.finish()
    except StreamRLError as error:
        log.error("a checkpoint was not written: %s", error)
