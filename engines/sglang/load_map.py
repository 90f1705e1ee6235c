"""Where each checkpoint tensor lives inside an engine's fused and sharded parameters.

Found by asking the model itself: its own `load_weights` runs once over tensors that have shapes and no memory, while
a dispatch mode watches every `copy_` into a parameter.  The copy is not done; the two views of it (which piece of
which checkpoint tensor, which piece of which parameter) are the map.  No rule about any architecture is needed: qkv,
gate_up, tied embeddings and tensor-parallel shards come out by themselves.

Ranks of an engine then tell each other what they hold, so that what several of them hold alike is counted once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.sglang.boxes import Arena, Box, Span, between, overlapping
from engines.weights import fingerprint
from engines.weights.codes.changes import Known
from engines.weights.parts import SLICE
from stream_rl.errors import WeightsError

Holders = tuple[int, ...]
"""The ranks that hold the same elements, ascending; () for a second copy within a rank."""


@dataclass(frozen=True, slots=True)
class TensorShape:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


class Held(NamedTuple):
    """A box of this rank's, and who else has the same."""

    box: Box
    holders: Holders


class Segment(NamedTuple):
    """A box that may hold some of a slice of a checkpoint tensor."""

    holders: Holders
    box: tuple[int, ...]
    """As `locate` of engines.weights.codes.arrays reads it."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What one rank holds."""

    shapes: Mapping[str, TensorShape]
    boxes: Mapping[str, list[Box]]
    arenas: Mapping[int, Arena]
    """By the width of their elements."""

    def rows(self) -> torch.Tensor:
        """[boxes, 5] int64: number of the tensor by name, and which of its elements; for the other ranks."""
        names = sorted(self.shapes)
        rows = [(n, *box.source) for n, name in enumerate(names) for box in self.boxes.get(name, ())]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


class LoadMap:
    """Checkpoint coordinates to live memory on one rank."""

    def __init__(self, traced: Traced, rank: int = 0, ranks: Sequence[torch.Tensor] = ()) -> None:
        """`ranks`: what `Traced.rows` gave on each.  Raises WeightsError naming the tensor if they do not fit."""
        self.shapes = traced.shapes
        self.rank, self.ranks = rank, max(1, len(ranks))
        self.seeds = {name: fingerprint.seed_of(name) for name in traced.shapes}
        self._arenas = traced.arenas
        self._segments: dict[tuple[str, int, int, torch.dtype], list[Segment]] = {}
        holders = _holders(traced.shapes, ranks or [traced.rows()])
        self.held = {name: list(_held(name, traced.boxes.get(name, ()), holders)) for name in traced.shapes}

    @property
    def device(self) -> torch.device:
        return next(iter(self._arenas.values())).device

    @property
    def arenas(self) -> list[torch.Tensor]:
        return [arena.bits for arena in self._arenas.values()]

    def arena(self, dtype: torch.dtype) -> torch.Tensor:
        """All live memory of this width, flat."""
        return self._arenas[dtype.itemsize].bits

    def segments(self, name: str, start: int, known: Known) -> list[Segment]:
        """Where changes of a slice of a checkpoint tensor may go.  Raises WeightsError if it is not of this engine's
        checkpoint."""
        key = name, start, known.elements, known.dtype
        found = self._segments.get(key)
        if found is None:
            held, seed = self.holding(name, start, known), fingerprint.moved(self.seeds[name], start)
            found = [Segment(holders, (start - box.offset, *box.layout, seed)) for box, holders in held]
            if known.elements in (SLICE, self.shapes[name].elements - start):  # as senders cut them: there are not many
                self._segments[key] = found
        return found

    def holding(self, name: str, start: int, known: Known) -> list[Held]:
        """The boxes themselves."""
        shape, stop = self.shapes.get(name), start + known.elements
        if shape is None or shape.dtype != known.dtype or stop > shape.elements:
            raise WeightsError(
                f"the update has elements {start} to {stop} of {name} as {known.dtype}; this engine's checkpoint has "
                f"{shape}"
            )
        return [held for held in self.held[name] if held.box.offset < stop and start < held.box.stop]

    def zeros(self) -> dict[Holders, int]:
        """A sum for each set of ranks that hold something alike."""
        return {held.holders: 0 for boxes in self.held.values() for held in boxes if held.holders}

    @property
    def elements(self) -> int:
        """Different ones of the checkpoint that this rank holds."""
        return sum(held.box.elements for boxes in self.held.values() for held in boxes if held.holders)

    def live_sums(self) -> dict[Holders, int]:
        """Fingerprints recomputed from live memory.  Raises WeightsError if copies within the rank differ."""
        sums = self.zeros()
        for name, boxes in self.held.items():
            if not boxes:  # then there may be no arena of its width either
                continue
            arena, first = self.arena(self.shapes[name].dtype), dict[Span, int]()
            for box, holders in boxes:
                found = box.sum(self.seeds[name], box.view(arena))
                if first.setdefault(box.source, found) != found:
                    raise WeightsError(f"{name} is held twice in this engine, with different bits")
                if holders:
                    sums[holders] = (sums[holders] + found) % (1 << 64)
        return sums

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count] live bits of a checkpoint tensor from flat position `start`.  Raises WeightsError where this rank
        does not hold all of them."""
        arena, missing = self.arena(self.shapes[name].dtype), count
        bits = torch.empty(count, dtype=arena.dtype, device=arena.device)
        for box, holders in self.held[name]:
            for part in box.clipped(start, start + count) if holders else ():
                part.pick(bits, start).copy_(part.view(arena))
                missing -= part.elements
        if missing:
            raise WeightsError(f"{name} is divided over the ranks of this engine; the small code needs all of it")
        return bits


def _held(name: str, boxes: Sequence[Box], holders: Mapping[tuple[str, Span], Holders]) -> Iterator[Held]:
    seen: set[Span] = set()
    for box in boxes:
        yield Held(box, () if box.source in seen else holders[name, box.source])
        seen.add(box.source)


def _holders(shapes: Mapping[str, TensorShape], ranks: Sequence[torch.Tensor]) -> dict[tuple[str, Span], Holders]:
    """Who holds what, by tensor and elements."""
    names, found = sorted(shapes), dict[tuple[str, Span], list[int]]()
    for rank, rows in enumerate(ranks):
        for number, start, *rest in rows.tolist():
            holders = found.setdefault((names[number], (start, rest[0], rest[1], rest[2])), [])
            if rank not in holders:
                holders.append(rank)
    spans: dict[str, list[tuple[Span, Holders]]] = {name: [] for name in names}
    for (name, span), holders in found.items():
        spans[name].append((span, tuple(holders)))
    for name, held in spans.items():
        if clash := overlapping(held):
            raise WeightsError(f"ranks {clash[0]} and {clash[1]} hold parts of {name} that overlap and are not equal")
        elements = sum(rows * columns for (_, rows, _, columns), _ in held)
        if elements != shapes[name].elements:
            raise WeightsError(
                f"this engine's ranks hold {elements} of {shapes[name].elements} elements of {name}; all must be live"
            )
    return {key: tuple(holders) for key, holders in found.items()}


_CONSTANTS = frozenset({torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, sources: Mapping[int, str], parameters: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources, self.parameters = sources, parameters
        self.found: list[tuple[str, str, torch.Tensor, torch.Tensor]] = []
        """Names of source and parameter, and the views of both, which are empty where a rank has no share of them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if target is None:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and _storage(target) in self.sources:
            raise WeightsError(f"{self.sources[_storage(target)]} is read as a number while it is loaded, not copied")
        source = args[1] if func is torch.ops.aten.copy_.default else None
        name = None if source is None else self.sources.get(_storage(source))
        if not func._schema.is_mutable or _storage(target) not in self.parameters:
            if name is not None and not target.is_meta:
                raise WeightsError(f"{name} goes into memory of the engine that is no parameter of its model")
            return func(*args, **(kwargs or {}))
        parameter = self.parameters[_storage(target)]
        if func in _CONSTANTS:
            return target  # padding; what is live has it already
        if source is None or name is None or target.shape != source.shape:
            raise WeightsError(
                f"{parameter} is derived from the checkpoint while it is loaded, not copied; this model cannot be "
                "updated live"
            )
        if target.dtype != source.dtype:
            raise WeightsError(f"{name} is {source.dtype} in the checkpoint, {parameter} {target.dtype}; set dtype")
        self.found.append((name, parameter, source.detach(), target.detach()))
        return target


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def trace(
    parameters: Iterable[tuple[str, torch.Tensor]],
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
    shapes: Mapping[str, TensorShape],
) -> Traced:
    """What a model with these live `parameters` and this `load_weights` holds of a checkpoint of these `shapes`.

    Raises WeightsError naming the tensor if the model drops one, changes its dtype, derives a parameter from it, or
    lays it out as no box.
    """
    live = dict(parameters)
    sources = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in shapes.items()}
    watch = _Watch(
        {_storage(tensor): name for name, tensor in sources.items()},
        {_storage(parameter): name for name, parameter in live.items()},
    )
    with torch.no_grad(), watch:
        load_weights(sources.items())
    if missing := sorted(set(shapes) - {name for name, *_ in watch.found}):
        raise WeightsError(
            f"the engine's model takes no {missing[0]} (and {len(missing) - 1} more) from the checkpoint"
        )
    covered = {parameter for _, parameter, *_ in watch.found}
    if untouched := sorted(set(live) - covered):
        raise WeightsError(f"{untouched[0]} (and {len(untouched) - 1} more) is in no checkpoint tensor")
    widths = {parameter.element_size() for parameter in live.values() if parameter.numel()}
    arenas = {
        width: Arena([p.detach() for p in live.values() if p.element_size() == width and p.numel()]) for width in widths
    }
    return Traced(shapes, _boxes(watch.found, arenas), arenas)


def _boxes(
    found: Sequence[tuple[str, str, torch.Tensor, torch.Tensor]], arenas: Mapping[int, Arena]
) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    spans: dict[int, list[tuple[Span, str]]] = {width: [] for width in arenas}
    for name, parameter, source, target in found:
        if target.numel() == 0:
            continue
        width = target.element_size()
        box = between(source, target, arenas[width].position(target))
        if box is None:
            raise WeightsError(
                f"{name} is laid out anew in {parameter} (strides {list(source.stride())} become "
                f"{list(target.stride())}); it cannot be updated live"
            )
        if box not in boxes.setdefault(name, []):
            boxes[name].append(box)
            spans[width].append((box.target, name))
    for held in spans.values():
        if clash := overlapping(held):
            raise WeightsError(f"{clash[0]} and {clash[1]} are loaded into the same memory of this engine")
    return boxes


def refuse_derived(model: torch.nn.Module) -> None:
    """Raises WeightsError naming the module if a model keeps weights that are made from those of its checkpoint after
    they are loaded: quantised, absorbed or packed ones would stay what they were."""
    if getattr(model, "quant_config", None) is not None:
        raise WeightsError(f"the engine's model is quantised ({type(model.quant_config).__name__}); serve it in bf16")
    if hasattr(model, "post_load_weights"):
        raise WeightsError(f"{type(model).__name__} derives weights after it is loaded; it cannot be updated live")
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            raise WeightsError(f"{name} is quantised ({type(method).__name__}); serve the model in bf16")
        for derived in ("w_kc", "w_vc", "use_intel_amx_backend"):
            if (kept := getattr(module, derived, None)) is not None and kept is not False:
                raise WeightsError(f"{name} keeps {derived}, made from its weights; it cannot be updated live")
