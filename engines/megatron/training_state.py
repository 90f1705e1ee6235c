"""What a learner needs beside its weights to go on as if it had never stopped: the optimizer's and the random states.

They are kept by the checkpoint's tensor names, exact to the bit, each rank its own shards of them, so that a learner of
any other placement finds what it needs of them (see shards.py).  A data-parallel rank keeps what the distributed
optimizer gave it; of what all of them hold, its share.

They are read from torch's optimizer inside megatron-core's, and put back there.  `MegatronOptimizer.state_dict` and
`load_state_dict` will not do: they know a parameter by its place in the groups, which a release may change; their shape
differs between float32 and bfloat16; and they bring back the groups' options (lr, betas, weight decay) over the
recipe's.  `OptimizerParamScheduler.load_state_dict` does that too, and adds its steps to those already counted; its
whole state is `num_steps`, which is kept in training.json.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.holdings import Boxes
from engines.megatron.shards import Assembly, Runs, Shard, shards
from engines.megatron.state_files import StateFiles, assembly
from stream_rl.errors import EngineError, WeightsError

MAIN = "main"
"""The kind of the float32 copy that the optimizer keeps of a bfloat16 parameter.  The other kinds are torch's names of
its states: exp_avg, exp_avg_sq, step, momentum_buffer."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a rank's optimizer steps of one parameter."""

    name: str
    """megatron-core's, of the parameter."""
    start: int
    """Where the part that is stepped here begins in the parameter."""
    parameter: Tensor
    """That part of the live weights, flat."""
    tensor: Tensor
    """What torch's optimizer steps for it: the parameter itself, a part of it, or of its float32 copy."""
    optimizer: torch.optim.Optimizer

    @property
    def is_copy(self) -> bool:
        return self.tensor.dtype != self.parameter.dtype

    @property
    def elements(self) -> int:
        return self.tensor.numel()

    def states(self) -> dict[str, Tensor]:
        """Flat: each state of every element, and those of all of them together, which have no dimension.

        Raises EngineError for a state that is neither.
        """
        states: dict[str, Tensor] = dict(self.optimizer.state.get(self.tensor, {}))
        for kind, value in states.items():
            if not isinstance(value, Tensor) or value.shape not in (self.tensor.shape, torch.Size()):
                raise EngineError(
                    f"{type(self.optimizer).__name__} keeps {kind} of {self.name} in another form than its "
                    f"{list(self.tensor.shape)} elements have, which a checkpoint would miss"
                )
        if self.is_copy:
            states[MAIN] = self.tensor.detach()
        return {kind: value.reshape(-1) if value.dim() else value for kind, value in states.items()}


def stepped(model: torch.nn.Module, optimizer: Any) -> list[Stepped]:
    """All that this rank's optimizer steps.

    Raises EngineError for an optimizer whose states a checkpoint would miss.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for chained in _chained(optimizer):
        groups = chained.optimizer.param_groups
        parts = {part: (parameter, start) for parameter, part, start in _parts(chained)}
        parameters = [parameter for group in groups for parameter in group["params"]]
        if any("step" in group for group in groups) or parts.keys() != set(parameters):
            raise EngineError(
                f"{type(chained.optimizer).__name__} keeps parameters or steps of its own, which a checkpoint would "
                f"miss; expected torch's optimizers, without optimizer_cpu_offload in learner.optimizer"
            )
        for part in parameters:
            parameter, start = parts[part]
            live = parameter.detach().reshape(-1)[start : start + part.numel()]
            found.append(Stepped(names[parameter], start, live, part, chained.optimizer))
    return found


def optimizer_name(optimizer: Any) -> str:
    """Of torch's optimizers inside megatron-core's: what the states are for."""
    return "+".join(sorted({type(chained.optimizer).__name__ for chained in _chained(optimizer)}))


def shares(parts: Sequence[Stepped], optimizer: Any, boxes: Boxes) -> Iterator[tuple[Stepped, int, int]]:
    """What this rank keeps: of a part that is stepped here, its elements from one to another.

    boxes: those that this rank exports, of each parameter.
    """
    chained = _chained(optimizer)
    kept = [part for part in parts if boxes[part.name]]
    if any(type(each) is core.DistributedOptimizer for each in chained):
        yield from ((part, 0, part.elements) for part in kept)
        return
    state = core.parallel_state
    rank, size = state.get_data_parallel_rank(True), state.get_data_parallel_world_size(True)
    total, begin = sum(part.elements for part in kept), 0
    first, last = total * rank // size, total * (rank + 1) // size
    for part in kept:
        low, high = max(first - begin, 0), min(last - begin, part.elements)
        if low < high:
            yield part, low, high
        begin += part.elements


def random_states() -> dict[str, Tensor]:
    """Of this process, by name."""
    states = {"cpu": torch.get_rng_state()}
    if not core.ON_CPU:
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"megatron/{name}": state for name, state in core.get_cuda_rng_tracker().get_states().items()}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Inverse of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if not core.ON_CPU:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.partition("/")[2]: state for name, state in states.items() if name.startswith("megatron/")}
    core.get_cuda_rng_tracker().set_states(tracked)


class Loading:
    """A training state that was found to fit this rank, and is not loaded yet."""

    def __init__(self, parts: Sequence[Stepped], boxes: Boxes, files: StateFiles, names: Iterable[str]) -> None:
        """boxes: all that this rank holds, of each parameter.  names: all tensors of the checkpoint.

        Raises WeightsError if the files are of another model or do not hold what the optimizer needs.
        """
        if unknown := sorted(files.names - set(names)):
            raise WeightsError(
                f"the training state is of another model: it has no tensor called {unknown[:5]} ({len(unknown)})"
            )
        self._parts = parts
        self._plans: list[dict[str, list[tuple[Runs, Assembly]]]] = []
        self._totals: list[dict[str, Tensor]] = []
        kinds = files.kinds - {MAIN}
        for part in parts:
            held = list(shards(boxes[part.name], part.start, part.start + part.elements))
            wanted = kinds | {MAIN} if part.is_copy else kinds
            plans: dict[str, list[tuple[Runs, Assembly]]] = {kind: [] for kind in sorted(wanted)}
            for kind, shard in itertools.product(plans, held):
                stored = files.parts(kind, shard.name)
                plans[kind].append((shard.here, assembly(shard, part.tensor.dtype, stored, kind)))
            self._plans.append(plans)
            self._totals.append({kind: _total(files, kind, held) for kind in files.total_kinds})

    def apply(self) -> None:
        """Be what was saved."""
        for optimizer in {part.optimizer for part in self._parts}:
            optimizer.state.clear()
        states: dict[torch.optim.Optimizer, dict[Tensor, dict[str, Tensor]]] = {}
        for part, plans, totals in zip(self._parts, self._plans, self._totals, strict=True):
            kinds = dict(totals)
            for kind, plan in plans.items():
                # what no tensor of the checkpoint holds is padding, whose gradient is 0
                tensor = part.tensor.detach() if kind == MAIN else torch.zeros_like(part.tensor)
                flat = tensor.view(-1)
                for here, found in plan:
                    found.onto(here, flat)
                if kind != MAIN:
                    kinds[kind] = tensor
            states.setdefault(part.optimizer, {})[part.tensor] = kinds
        for optimizer, theirs in states.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            # An optimizer that has taken no step has no states; an empty one would make it believe that it had.  torch
            # puts each where it wants it: Adam's `step` is on the CPU, unless it is fused or in a graph.
            taken = {index: theirs[each] for index, each in enumerate(parameters) if theirs[each]}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": taken})


def _total(files: StateFiles, kind: str, held: Sequence[Shard]) -> Tensor:
    """A state without a dimension: the same for all tensors that a parameter is made of."""
    values = files.totals(kind, [shard.name for shard in held])
    if not values or any(not torch.equal(value, values[0]) for value in values):
        raise WeightsError(
            f"the training state does not fit: expected one {kind} for {[shard.name for shard in held]}, got "
            f"{[value.item() for value in values]}"
        )
    return values[0].clone()


def _chained(optimizer: Any) -> list[Any]:
    chained: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in chained if not each.is_stub_optimizer]


def _parts(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of one megatron-core optimizer: each parameter, what is stepped for it, and where that begins in it."""
    if type(optimizer) is core.DistributedOptimizer:
        for models, parts in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ):
            for model, part in _pairs(models, parts):
                if part is None:
                    raise EngineError(f"the optimizer has no float32 copy of a parameter of {model.dtype}")
                yield model, part, optimizer._get_model_param_range_map(model)["param"].start
        return
    own = [group["params"] for group in optimizer.optimizer.param_groups]
    if type(optimizer) is core.Float16OptimizerWithFloat16Params:
        for model, main in _pairs(optimizer.float16_groups, optimizer.fp32_from_float16_groups):
            yield model, main, 0
        own = optimizer.fp32_from_fp32_groups
    for group in own:
        yield from ((parameter, parameter, 0) for parameter in group)


def _pairs(first: list[list[Tensor]], second: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for ours, theirs in zip(first, second, strict=True):
        yield from zip(ours, theirs, strict=True)
