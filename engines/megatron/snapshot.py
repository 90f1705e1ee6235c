"""A copy on the host of what a checkpoint keeps of one rank, so that training goes on while it is written."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.checkpoint import StoredPart
from engines.megatron.holdings import Holdings
from engines.megatron.model_shape import ModelShape
from engines.megatron.resume import NetworkRecord, shape_digest
from engines.megatron.shards import Runs, shards, take
from engines.megatron.training_state import optimizer_name, random_states, shares, stepped

WEIGHT = "weight"
"""The kind of the weights themselves, where they lie like a training state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A network and what trains it: what a checkpoint holds of a learner."""

    model: torch.nn.Module
    """megatron-core's, without its wrappers."""
    optimizer: Any
    scheduler: Any
    shape: ModelShape
    holdings: Holdings
    schedule_unit: str
    """What the schedule counts."""
    source: pathlib.Path
    """The Hugging Face directory that it began as, for config.json and the tokenizer."""

    def record(self) -> NetworkRecord:
        return NetworkRecord(
            shape=shape_digest(self.shape),
            optimizer=optimizer_name(self.optimizer),
            schedule_unit=self.schedule_unit,
            schedule_steps=self.scheduler.num_steps,
        )


@dataclass(kw_only=True, slots=True)
class Snapshot:
    """On a GPU its tensors are there when `wait` returns, and the optimizer's next step waits for that by itself."""

    held: dict[str, tuple[int, Runs]] = field(default_factory=dict)
    """Of each tensor of the checkpoint: its elements, and which of them this rank keeps."""
    states: dict[str, Tensor] = field(default_factory=dict)
    """KIND/NAME: of the elements that are kept, flat, or one for all of them."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """NAME: the same elements of the weights."""
    random: dict[str, Tensor]
    _copied: "torch.cuda.Event | None" = None
    _hooks: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        """Until everything is on the host.  For any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """Let the optimizer's steps be.  For the thread that trains."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def parts(self, kind: str, name: str) -> list[StoredPart]:
        """As `StateFiles.parts`, of the weights here."""
        assert kind == WEIGHT
        if name not in self.weights:
            return []
        return [StoredPart(*self.held[name], self.weights[name].dtype, self.weights[name])]

    def forget(self) -> None:
        """Let the memory go."""
        self.states.clear()
        self.weights.clear()

    def spend(self) -> Iterator[tuple[str, Tensor]]:
        """The states, each forgotten when it was given."""
        while self.states:
            key = next(iter(self.states))
            yield key, self.states.pop(key)


def snapshot(trained: Trained) -> Snapshot:
    """Copy what this rank keeps.  Cheap: on a GPU it does not wait for the copies."""
    taken = Snapshot(random=random_states())
    parts = stepped(trained.model, trained.optimizer)
    with _beside() as (stream, to_host):
        for part, low, high in shares(parts, trained.optimizer, trained.holdings.exported):
            states = part.states()
            boxes = trained.holdings.exported[part.name]
            for shard in shards(boxes, part.start + low, part.start + high):
                taken.held[shard.name] = shard.elements, shard.there
                taken.weights[shard.name] = to_host(take(shard.here, part.parameter[low:high]))
                for kind, state in states.items():
                    kept = take(shard.here, state[low:high]) if state.dim() else state
                    taken.states[f"{kind}/{shard.name}"] = to_host(kept)
    if stream is not None:
        copied = taken._copied = stream.record_event()
        taken._hooks = [
            optimizer.register_step_pre_hook(lambda *_: torch.cuda.current_stream().wait_event(copied))
            for optimizer in {part.optimizer for part in parts}
        ]
    return taken


@contextlib.contextmanager
def _beside() -> Iterator[tuple["torch.cuda.Stream | None", Callable[[Tensor], Tensor]]]:
    """A stream beside the one that trains, and how to copy a tensor to the host on it."""
    if core.ON_CPU:
        yield None, Tensor.clone
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())

    def to_host(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.clone()
        tensor.record_stream(stream)
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    with torch.cuda.stream(stream):
        yield stream, to_host
