"""What a learner needs beside its weights to go on as if it had never stopped: the optimizer's and the random states.

Tensors named KIND/PARAMETER, exact to the bit; of one process with megatron-core's plain optimizer.

They are read from torch's optimizer inside megatron-core's, and put back there.  `MegatronOptimizer.state_dict` and
`load_state_dict` will not do: they know a parameter by its place in the groups, which a release may change; their shape
differs between float32 and bfloat16; and they bring back the groups' options (lr, betas, weight decay) over the
recipe's.  `OptimizerParamScheduler.load_state_dict` does that too, and adds its steps to those already counted; its
whole state is `num_steps`, which is kept in training.json.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from stream_rl.errors import EngineError, WeightsError

MAIN = "main"
"""The kind of the float32 copy that the optimizer keeps of a bfloat16 parameter.  The other kinds are torch's names of
its states: exp_avg, exp_avg_sq, step, momentum_buffer."""
_RANDOM = "random/"
_CPU, _CUDA, _TRACKER = f"{_RANDOM}cpu", f"{_RANDOM}cuda", f"{_RANDOM}megatron/"
_Parameters = dict[Tensor, tuple[str, bool]]
"""Those of one torch optimizer, in its order: megatron-core's name, and whether it is a float32 copy."""


def optimizer_name(optimizer: Any) -> str:
    """Of torch's optimizers inside megatron-core's: what the states are for."""
    return "+".join(type(chained.optimizer).__name__ for chained in _chained(optimizer))


def training_tensors(model: torch.nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """The states of `optimizer` over `model`'s parameters, then the random states.

    Tensors may alias live ones: copy what must outlive the next step.
    """
    for torch_optimizer, parameters in _optimizers(model, optimizer):
        for parameter, (name, is_copy) in parameters.items():
            if is_copy:
                yield f"{MAIN}/{name}", parameter.detach()
            for kind, value in torch_optimizer.state.get(parameter, {}).items():
                yield f"{kind}/{name}", value
    yield _CPU, torch.get_rng_state()
    if not core.ON_CPU:
        yield _CUDA, torch.cuda.get_rng_state()
    for name, state in core.get_cuda_rng_tracker().get_states().items():
        yield f"{_TRACKER}{name}", state


def load_training_tensors(model: torch.nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `training_tensors`.

    Raises WeightsError, before anything changes, if the tensors are of another model or optimizer.
    """
    optimizers = _optimizers(model, optimizer)
    known = {name for _, parameters in optimizers for name, _ in parameters.values()}
    if unknown := sorted(key for key in tensors if key.partition("/")[2] not in known and not key.startswith(_RANDOM)):
        raise WeightsError(
            f"the training state is of another model: no parameter here is called {unknown[:5]} ({len(unknown)})"
        )
    states = [_states(parameters, tensors) for _, parameters in optimizers]
    for (torch_optimizer, parameters), state in zip(optimizers, states, strict=True):
        for index, (parameter, (name, is_copy)) in enumerate(parameters.items()):
            if is_copy:
                parameter.data.copy_(tensors[f"{MAIN}/{name}"])
            state[index].pop(MAIN, None)
        # torch moves each state to its parameter's device, except Adam's `step`, whose place is the CPU.  An optimizer
        # that has taken no step has no states; an empty one would make it believe that it had.
        taken = {index: kinds for index, kinds in state.items() if kinds}
        torch_optimizer.load_state_dict(torch_optimizer.state_dict() | {"state": taken})
    torch.set_rng_state(tensors[_CPU])
    if not core.ON_CPU:
        torch.cuda.set_rng_state(tensors[_CUDA])
    tracked = {name.removeprefix(_TRACKER): tensors[name] for name in tensors if name.startswith(_TRACKER)}
    core.get_cuda_rng_tracker().set_states(tracked)


def _optimizers(model: torch.nn.Module, optimizer: Any) -> list[tuple[torch.optim.Optimizer, _Parameters]]:
    called: _Parameters = {}
    for name, parameter in model.named_parameters():
        main = getattr(parameter, "main_param", parameter)
        called[main] = name, main is not parameter
    found = []
    for chained in _chained(optimizer):
        groups = chained.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        if any("step" in group for group in groups) or not called.keys() >= set(parameters):
            raise EngineError(
                f"{type(chained.optimizer).__name__} keeps parameters or steps of its own, which a checkpoint would "
                f"miss; expected torch's optimizers, without optimizer_cpu_offload in learner.optimizer"
            )
        found.append((chained.optimizer, {parameter: called[parameter] for parameter in parameters}))
    return found


def _chained(optimizer: Any) -> list[Any]:
    chained: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return chained


def _states(parameters: _Parameters, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Of each parameter of one optimizer, by its place, its tensors by kind: for all of them the same kinds."""
    names = {name for name, _ in parameters.values()}
    kinds = {kind for kind, _, name in (key.partition("/") for key in tensors) if name in names}
    states: dict[int, dict[str, Tensor]] = {}
    for index, (parameter, (name, is_copy)) in enumerate(parameters.items()):
        shapes = {kind: tensors[f"{kind}/{name}"].shape for kind in kinds if f"{kind}/{name}" in tensors}
        wanted = kinds | {MAIN} if is_copy else kinds - {MAIN}
        if shapes.keys() != wanted or not set(shapes.values()) <= {parameter.shape, torch.Size()}:
            raise WeightsError(
                f"the training state does not fit the optimizer: {name} is {list(parameter.shape)} and needs "
                f"{sorted(wanted)}, it has { ({kind: list(shape) for kind, shape in shapes.items()}) }"
            )
        # a copy, because torch keeps the tensor that it is given, and this one may be a view of a file
        states[index] = {kind: tensors[f"{kind}/{name}"].clone() for kind in kinds}
    return states
