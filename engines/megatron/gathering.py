"""The whole weights on the learner's first process, one checkpoint tensor at a time, from where their parts lie."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from engines.megatron.layout import Box, layout
from engines.megatron.model_shape import ModelShape, expected_shapes
from engines.megatron.world import World, place
from stream_rl.errors import EngineError

CHUNK_BYTES = 64 << 20
"""Of a message."""


def gathered(shape: ModelShape, parameters: Mapping[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in `expected_shapes` order, on the host.  All ranks exhaust it; only the first gets any.

    parameters: what this rank has.  In memory at once: one tensor, and one rank's part of it.  Raises EngineError if a
    rank is lost.
    """
    sources: dict[str, list[tuple[int, str, Box]]] = {}
    for rank in range(world.peers.size):
        other = world.of_rank(rank)
        if other.data_rank == 0:
            for parameter, boxes in layout(shape, place(shape, other)).items():
                for box in boxes:
                    sources.setdefault(box.name, []).append((rank, parameter, box))
    first = world.peers.rank == 0
    for name, size in expected_shapes(shape).items():
        whole = torch.empty(size if first else 0, dtype=getattr(torch, shape.dtype))
        for rank, parameter, box in sources[name]:
            if rank == world.peers.rank:
                values = box.of(parameters[parameter].reshape(-1)).reshape(-1).cpu()
                if not first:
                    send(values, 0, world.host_group)
            elif first:
                values = torch.empty(box.count * box.width, dtype=whole.dtype)
                receive(values, rank, world.host_group)
            if first:
                span = (box.count - 1) * box.to_stride + box.width
                there = whole.view(-1)[box.to_offset : box.to_offset + span].unfold(0, box.width, box.to_stride)
                there.copy_(values.view(box.count, box.width))
        if first:
            yield name, whole


def send(values: Tensor, to: int, group: dist.ProcessGroup | None) -> None:
    """A flat tensor on the host, in messages of a bounded size.  Raises EngineError if `to` is lost."""
    for chunk in torch.split(values.view(torch.uint8), CHUNK_BYTES):
        try:
            dist.send(chunk, to, group=group)
        except RuntimeError as error:
            raise EngineError(f"rank {to} of the learner did not take what was sent: {error}") from error


def receive(values: Tensor, of: int, group: dist.ProcessGroup | None) -> None:
    """Into a flat tensor on the host.  Raises EngineError if `of` is lost."""
    for chunk in torch.split(values.view(torch.uint8), CHUNK_BYTES):
        try:
            dist.recv(chunk, of, group=group)
        except RuntimeError as error:
            raise EngineError(f"rank {of} of the learner did not send its part: {error}") from error
