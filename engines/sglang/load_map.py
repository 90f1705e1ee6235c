"""Where each checkpoint tensor lives inside an engine's fused parameters.

Found by asking the model itself: its own `load_weights` runs once over tensors that have shapes and no memory, while
a dispatch mode watches every `copy_` into a parameter.  The copy is not done; the two views of it (which piece of
which checkpoint tensor, which piece of which parameter) are the map.  No rule about any architecture is needed:
qkv, gate_up and tied embeddings come out by themselves.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.weights import fingerprint
from engines.weights.codec import TensorUpdate
from stream_rl.errors import WeightsError


@dataclass(frozen=True, slots=True)
class TensorShape:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a checkpoint tensor and the parameter memory that holds it."""

    live: torch.Tensor
    """View of the live parameter, as integers; written in place, never rebound (CUDA graphs hold its address)."""
    offset: int
    stride: tuple[int, ...]
    """Flat checkpoint position of element (i, j, ...) of `live`: offset + i * stride[0] + j * stride[1] + ..."""

    @property
    def whole(self) -> bool:
        """True if this piece is one checkpoint tensor from its first element to its last, in order."""
        return self.offset == 0 and self.live.is_contiguous() and self.stride == self.live.stride()


@dataclass(frozen=True, slots=True)
class Write:
    """One in-place write: `values` into all of `target`, or at `indices` of it flattened."""

    target: torch.Tensor
    indices: torch.Tensor | None
    values: torch.Tensor

    def apply(self) -> None:
        if self.indices is None:
            self.target.copy_(self.values)
        else:
            self.target.view(-1).index_copy_(0, self.indices, self.values)


class LoadMap:
    """Checkpoint coordinates to live memory for one model on one rank."""

    def __init__(self, pieces: Mapping[str, list[Piece]], shapes: Mapping[str, TensorShape]) -> None:
        self.pieces = pieces
        self.shapes = shapes

    def writes(self, update: TensorUpdate) -> list[Write]:
        """The writes that make `update` live.  Raises WeightsError where this map cannot place it."""
        device_bits = None
        writes = []
        for piece in self.pieces[update.name]:
            if device_bits is None:
                device_bits = update.bits.to(piece.live.device, copy=False)
            if update.indices is None:
                writes.append(Write(piece.live, None, device_bits.view(piece.live.shape)))
            else:
                writes.append(Write(piece.live, update.indices.to(piece.live.device), device_bits))
        return writes

    def read(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Live bits of a checkpoint tensor at flat positions."""
        piece = self.pieces[name][0]
        return piece.live.reshape(-1)[indices.to(piece.live.device)]

    def live_sum(self, name: str) -> int:
        """This rank's part of a tensor's fingerprint, recomputed from live memory.  Raises WeightsError if copies of
        the tensor within the rank differ."""
        sums = [fingerprint.tensor_sum(name, piece.live.reshape(-1)) for piece in self.pieces[name]]
        if len(set(sums)) != 1:
            raise WeightsError(f"{name} is held {len(sums)} times in this engine, with different bits")
        return sums[0]


_CONSTANTS = frozenset({torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, sources: Mapping[int, str], parameters: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources, self.parameters = sources, parameters
        self.found: dict[str, list[Piece]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if target is None or not func._schema.is_mutable or _storage(target) not in self.parameters:
            return func(*args, **(kwargs or {}))
        parameter = self.parameters[_storage(target)]
        if func in _CONSTANTS:
            return target  # padding; what is live has it already
        source = args[1] if func is torch.ops.aten.copy_.default else None
        name = None if source is None else self.sources.get(_storage(source))
        if source is None or name is None or target.shape != source.shape:
            raise WeightsError(
                f"{parameter} is derived from the checkpoint while it is loaded, not copied; this model cannot be "
                "updated live"
            )
        if target.dtype != source.dtype:
            raise WeightsError(f"{name} is {source.dtype} in the checkpoint, {parameter} {target.dtype}; set dtype")
        piece = Piece(fingerprint.bits_of(target.detach()), source.storage_offset(), tuple(source.stride()))
        self.found.setdefault(name, []).append(piece)
        return target


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def trace(
    parameters: Iterable[tuple[str, torch.Tensor]],
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
    shapes: Mapping[str, TensorShape],
) -> LoadMap:
    """The map for a model with these live `parameters` and this `load_weights`, for a checkpoint of these `shapes`.

    Raises WeightsError naming the tensor if the model drops one, changes its dtype or derives a parameter from it.
    """
    live = dict(parameters)
    sources = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in shapes.items()}
    watch = _Watch(
        {_storage(tensor): name for name, tensor in sources.items()},
        {_storage(parameter): name for name, parameter in live.items()},
    )
    with torch.no_grad(), watch:
        load_weights(sources.items())
    if missing := sorted(set(shapes) - set(watch.found)):
        raise WeightsError(
            f"the engine's model takes no {missing[0]} (and {len(missing) - 1} more) from the checkpoint"
        )
    for name, pieces in watch.found.items():
        if not all(piece.whole and piece.live.numel() == shapes[name].elements for piece in pieces):
            raise WeightsError(f"{name} is sharded or laid out anew in this engine; it cannot be updated live yet")
    covered = {_storage(piece.live) for pieces in watch.found.values() for piece in pieces}
    if untouched := sorted(name for name, parameter in live.items() if _storage(parameter) not in covered):
        raise WeightsError(f"{untouched[0]} (and {len(untouched) - 1} more) is in no checkpoint tensor")
    return LoadMap(watch.found, shapes)
