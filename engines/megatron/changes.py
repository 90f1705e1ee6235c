"""Finding what an optimizer step changes, where megatron-core writes the new weights, without a second copy of the old.

Where float32 masters are kept (bf16), each parameter still has its old bits when the masters are about to be copied to
it: the comparison comes before that copy.  The distributed optimizer gives every data-parallel rank its own shards of
the masters, so each rank finds the changes of those, and together they are the whole update; what a rank holds of the
others' shards may be a step old (overlap_param_gather) and is never looked at.  With the plain optimizer every rank has
all masters and compares its share.

Where torch's optimizer writes the parameters themselves (fp32), it takes its step over some of them at a time, and only
of those the old bits are kept meanwhile.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.found import Changes, Comparison, Sorting, Stretch
from engines.megatron.layout import Box
from engines.weights.codes import ulp
from engines.weights.fingerprint import bits_of
from stream_rl.errors import ConfigError, EngineError

CHUNK = 1 << 20 if core.ON_CPU else 1 << 26
"""Elements compared at once: bounds the memory that it takes.  On a GPU few chunks are few launches; a CPU takes each
parameter by itself, and what fits its caches."""
IN_PLACE_CHUNK = 1 << 20 if core.ON_CPU else 1 << 26
"""Elements of parameters that step together where there are no masters; one parameter at least."""
PER_PARAMETER = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose step of one parameter knows nothing of the others."""
_UNKNOWN_COPY = ("use_precision_aware_optimizer", "reuse_grad_buf_for_mxfp8_param_ag", "optimizer_cpu_offload")
"""Options of megatron-core with which the new weights are not written where we look."""


@dataclass(frozen=True, slots=True)
class _Span:
    stretch: Stretch
    dtype: torch.dtype
    bits: Tensor
    """The live bits, flat."""
    master: Tensor | None
    """Flat float32 that is copied to the parameter after the step; None if the parameter itself is stepped."""

    def part(self, low: int, high: int) -> "_Span":
        stretch = Stretch(self.stretch.parameter, self.stretch.start + low, high - low)
        return _Span(stretch, self.dtype, self.bits[low:high], None if self.master is None else self.master[low:high])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What is compared at once."""

    spans: list[_Span]
    sorting: Sorting

    @property
    def bits(self) -> list[Tensor]:
        return [span.bits for span in self.spans]


class _Stopwatch:
    """Of this thread: by the clock, and of its CPU."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.thread_time()

    def read(self) -> tuple[float, float]:
        wall, cpu = self._begin
        return time.perf_counter() - wall, time.thread_time() - cpu


class ChangeFinder:
    """Watches a megatron-core optimizer from here on.  `take` after a step, or after several."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        boxes: Mapping[str, Sequence[Box]],
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """boxes: where each of `model`'s parameters goes.  dp_rank, dp_size: of the data-parallel ranks.

        Raises ConfigError for an optimizer whose changes cannot be found.
        """
        self._boxes, self._dp_rank, self._dp_size = boxes, dp_rank, dp_size
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        if unknown := sorted(set(self._names.values()) - boxes.keys()):
            raise EngineError(
                f"no checkpoint tensor is known for {unknown[:5]} ({len(unknown)}); engines/megatron/layout.py must "
                f"learn them"
            )
        self._found: list[Comparison] = []
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}
        self._stream = None if core.ON_CPU else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
            if not chained.is_stub_optimizer:
                self._watch(chained)

    def take(self) -> Changes:
        """What changed since the last time."""
        found, self._found = self._found, []
        return Changes(found)

    def _watch(self, optimizer: Any) -> None:
        _refuse_unknown(optimizer)
        copied, in_place = [], {}
        for name, parameter, stepped, start in _shards(optimizer, self._names):
            if not self._boxes[name]:
                continue
            flat = bits_of(parameter.detach()).view(-1)[start : start + stepped.numel()]
            master = None if parameter.dtype == stepped.dtype else stepped.detach().view(-1)
            span = _Span(Stretch(name, start, flat.numel()), parameter.dtype, flat, master)
            if master is None:
                in_place[stepped] = span
            else:
                copied.append(span)
        if type(optimizer) is not core.DistributedOptimizer:
            copied = list(_share(copied, self._dp_rank, self._dp_size))
            shared = _share(in_place.values(), self._dp_rank, self._dp_size)
            mine = {span.stretch.parameter: span for span in shared}
            ours = {stepped: span.stretch.parameter for stepped, span in in_place.items()}
            in_place = {stepped: mine[name] for stepped, name in ours.items() if name in mine}
        if copied:
            chunks = self._chunked(list(chain.from_iterable(_cut(span) for span in copied)))
            optimizer._copy_main_params_to_model_params = self._before(
                optimizer._copy_main_params_to_model_params, chunks
            )
        if in_place:
            optimizer.optimizer.step = self._in_turns(optimizer.optimizer, in_place)

    def _before(self, copy: Callable[[], None], chunks: list[_Chunk]) -> Callable[[], None]:
        """megatron-core's copy of the masters to the model, after a comparison of the two."""

        def compare_and_copy() -> None:
            if self._stream is not None:
                # the comparison waits for the device anyway; so its time does not count what was queued before
                torch.cuda.current_stream().synchronize()
            for chunk in chunks:
                with torch.no_grad():
                    self._compare(chunk)
            copy()

        return compare_and_copy

    def _in_turns(self, optimizer: torch.optim.Optimizer, spans: Mapping[Tensor, _Span]) -> Callable[[], None]:
        """The optimizer's step, some parameters at a time.  The others have no gradient meanwhile, and are let be."""
        if type(optimizer) not in PER_PARAMETER:
            raise ConfigError(
                f"learner.optimizer: changes of float32 weights can be found with "
                f"{[known.__name__ for known in PER_PARAMETER]} of torch only, got {type(optimizer).__name__}; choose "
                f"one of these, or a bfloat16 checkpoint"
            )
        step = optimizer.step
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        turns = list(_grouped(parameters, torch.Tensor.numel, IN_PLACE_CHUNK))
        watched = [self._chunked([spans[parameter] for parameter in turn if parameter in spans]) for turn in turns]

        def step_in_turns() -> None:
            gradients = [[parameter.grad for parameter in turn] for turn in turns]
            _give(parameters, [None] * len(parameters))
            for turn, theirs, chunks in zip(turns, gradients, watched, strict=True):
                _give(turn, theirs)
                self._around(step, chunks)
                _give(turn, [None] * len(turn))
            for turn, theirs in zip(turns, gradients, strict=True):
                _give(turn, theirs)

        return step_in_turns

    def _around(self, step: Callable[[], Any], chunks: list[_Chunk]) -> None:
        """The step of some parameters, which `chunks` are of, and a comparison with what was there before."""
        bits = [each for chunk in chunks for each in chunk.bits]
        if not bits:
            step()
            return
        watch = _Stopwatch()
        old = self._room("old", bits)
        torch.cat(bits, out=old)
        took = watch.read()
        step()
        low = 0
        for chunk in chunks:
            high = low + chunk.sorting.elements
            self._compare(chunk, old[low:high], took)
            low, took = high, (0.0, 0.0)

    def _compare(self, chunk: _Chunk, old: Tensor | None = None, before: tuple[float, float] = (0.0, 0.0)) -> None:
        """old: the bits before the step, if they are no longer in the parameters.  before: what that copy took."""
        watch = _Stopwatch()
        bits, dtype = chunk.bits, chunk.spans[0].dtype
        new = bits[0] if len(bits) == 1 else torch.cat(bits)
        if old is None:
            old, new = new, self._room("new", bits)
            masters = [span.master for span in chunk.spans if span.master is not None]
            torch._foreach_copy_(list(torch.split(new.view(dtype), [each.numel() for each in bits])), masters)
        delta = ulp.diff(old, new)
        # a copy, because both the parameter's own bits and the room for new ones go on changing
        dense = new.clone() if 2 * delta.changed > delta.elements else None
        positions, steps, ends, ready = delta.indices, delta.steps, None, None
        if self._stream is not None:
            positions, steps, ends = chunk.sorting.sort(positions, steps)
            positions = positions.to(torch.int32)
            # beside the next step, not before it
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                positions, steps, ends = (self._to_host(each) for each in (positions, steps, ends))
                dense = None if dense is None else self._to_host(dense)
                ready = self._stream.record_event()
        seconds, cpu_seconds = (sum(both) for both in zip(before, watch.read(), strict=True))
        self._found.append(Comparison(chunk.sorting, dtype, positions, steps, ends, dense, seconds, cpu_seconds, ready))

    def _chunked(self, spans: list[_Span]) -> list[_Chunk]:
        """On a CPU each span by itself, so that nothing must be put together."""
        groups = [[span] for span in spans] if self._stream is None else _grouped(spans, _elements, CHUNK)
        device = torch.device("cpu") if self._stream is None else self._stream.device
        return [_Chunk(group, Sorting([span.stretch for span in group], self._boxes, device)) for group in groups]

    def _room(self, use: str, bits: list[Tensor]) -> Tensor:
        """For as much as `bits`.  On a CPU the same each time: fresh memory costs it more than comparing does."""
        elements, dtype = sum(each.numel() for each in bits), bits[0].dtype
        if self._stream is not None:
            return torch.empty(elements, dtype=dtype, device=bits[0].device)
        room = self._rooms.get((use, dtype))
        if room is None or room.numel() < elements:
            room = self._rooms[use, dtype] = torch.empty(elements, dtype=dtype)
        return room[:elements]

    def _to_host(self, tensor: Tensor) -> Tensor:
        assert self._stream is not None
        tensor.record_stream(self._stream)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def _refuse_unknown(optimizer: Any) -> None:
    known = (core.FP32Optimizer, core.Float16OptimizerWithFloat16Params, core.DistributedOptimizer)
    if type(optimizer) not in known:
        raise ConfigError(
            f"learner.optimizer: changes can be found in {[kind.__name__ for kind in known]} of megatron-core, got "
            f"{type(optimizer).__name__}"
        )
    if used := [name for name in _UNKNOWN_COPY if getattr(optimizer.config, name, False)]:
        raise ConfigError(f"learner.optimizer: changes cannot be found with {used}; leave them out")
    if getattr(getattr(optimizer, "ddp_config", None), "num_distributed_optimizer_instances", 1) > 1:
        raise ConfigError("changes cannot be found with num_distributed_optimizer_instances > 1; leave it at 1")


def _shards(optimizer: Any, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """What one megatron-core optimizer steps: name and parameter, the tensor that is stepped for it (itself, or a part
    of it or of its master), and where that begins in the parameter."""
    if type(optimizer) is core.DistributedOptimizer:
        for models, shards in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ):
            for model, shard in _pairs(models, shards):
                if shard is None or not model.dtype.is_floating_point or model.dtype.itemsize < 2:
                    raise ConfigError(
                        f"changes of {names[model]} cannot be found: {model.dtype} is not written as such"
                    )
                yield names[model], model, shard, optimizer._get_model_param_range_map(model)["param"].start
        return
    own = [group["params"] for group in optimizer.optimizer.param_groups]
    if type(optimizer) is core.Float16OptimizerWithFloat16Params:
        for model, master in _pairs(optimizer.float16_groups, optimizer.fp32_from_float16_groups):
            yield names[model], model, master, 0
        own = optimizer.fp32_from_fp32_groups
    for parameter in chain.from_iterable(own):
        yield names[parameter], parameter, parameter, 0


def _pairs(first: list[list[Tensor]], second: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(chain.from_iterable(first), chain.from_iterable(second), strict=True)


def _share(spans: Iterable[_Span], rank: int, size: int) -> Iterator[_Span]:
    """What `rank` of `size` compares of what all of them hold: as much as any other."""
    spans = list(spans)
    total = sum(span.stretch.elements for span in spans)
    first, last = total * rank // size, total * (rank + 1) // size
    begin = 0
    for span in spans:
        low, high = max(first - begin, 0), min(last - begin, span.stretch.elements)
        if low < high:
            yield span.part(low, high)
        begin += span.stretch.elements


def _cut(span: _Span) -> Iterator[_Span]:
    """In pieces of a chunk at most, from multiples of it."""
    start, elements = span.stretch.start, span.stretch.elements
    edges = [start, *range(start - start % CHUNK + CHUNK, start + elements, CHUNK), start + elements]
    return (span.part(low - start, high - start) for low, high in pairwise(edges))


def _grouped(items: Iterable[Any], size: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    """Items in a row that together have `most` elements or fewer, or one that alone has more, of one dtype."""
    chunk: list[Any] = []
    total = 0
    for item in items:
        if chunk and (total + size(item) > most or item.dtype != chunk[0].dtype):
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size(item)
    if chunk:
        yield chunk


def _elements(span: _Span) -> int:
    return span.stretch.elements


def _give(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
