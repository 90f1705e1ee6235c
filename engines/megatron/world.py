"""The processes of the learner: started by torchrun, or one alone; and this one's place among them."""

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engines.megatron import core
from engines.megatron.agreement import Peers
from engines.megatron.layout import Place
from engines.megatron.model_shape import ModelShape
from engines.megatron.parallel_sizes import check_processes, parallel_sizes
from stream_rl.errors import ConfigError, EngineError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process's coordinates.  `peers` are all of the learner's processes."""

    tensor_rank: int
    tensor_size: int
    stage: int
    stages: int
    data_rank: int
    data_size: int
    device: torch.device
    peers: Peers
    host_group: dist.ProcessGroup | None
    """Of all, over gloo."""

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def speaks(self) -> bool:
        """For its data-parallel rank: of what all know that see the model's outputs, one says it."""
        return self.last_stage and self.tensor_rank == 0

    def enter(self) -> None:
        """Make this process's device that of this thread: CUDA has one for each."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def of_rank(self, rank: int) -> "World":
        """The coordinates of another process: tensor-parallel ranks are neighbours, stages are farthest apart."""
        rest, tensor_rank = divmod(rank, self.tensor_size)
        stage, data_rank = divmod(rest, self.data_size)
        return dataclasses.replace(self, tensor_rank=tensor_rank, data_rank=data_rank, stage=stage)


_worlds: list[World] = []


def initialize(seed: int, options: Mapping[str, Any], processes: int, timeout_s: float) -> World:
    """torch's and megatron-core's process groups, once, and megatron-core's random state, anew each time.

    options: the recipe's `[learner.model]`, of which the parallel sizes count.  processes: how many there should be.
    timeout_s: longest wait for another process.
    Raises ConfigError if there are more or fewer, or they cannot be divided so.
    """
    if not dist.is_initialized():
        _join(datetime.timedelta(seconds=timeout_s))
    tensor, stages = parallel_sizes(options)
    if (size := dist.get_world_size()) != processes:
        raise ConfigError(
            f"learner.processes is {processes} and torch.distributed has {size} processes; set learner.processes, "
            f"which starts them, or give torchrun --nproc-per-node={processes}"
        )
    check_processes(options, size)
    state = core.parallel_state
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(tensor, stages, distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)))
        timeout = datetime.timedelta(seconds=timeout_s)
        host_group = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        _worlds.append(_here(Peers(timeout_s), host_group))
    world = _worlds[0]
    if (world.tensor_size, world.stages) != (tensor, stages):
        raise ConfigError(
            f"all models of a learner share their processes, which are cut {world.tensor_size} (tensor) by "
            f"{world.stages} (pipeline); another asks for {tensor} by {stages}"
        )
    world.enter()
    torch.manual_seed(seed)
    core.model_parallel_cuda_manual_seed(seed)
    return world


def here() -> World:
    """After `initialize`."""
    assert _worlds, "world.initialize comes first"
    return _worlds[0]


def padded_vocabulary(shape: ModelShape, tensor: int) -> int:
    """Rows of the embedding: as many for each tensor-parallel rank.  Those beyond the vocabulary stay 0."""
    return -(-shape.vocab_size // tensor) * tensor


def place(shape: ModelShape, world: World) -> Place:
    """What of the model this process holds."""
    layers = shape.layers // world.stages
    return Place(
        tp_rank=world.tensor_rank,
        tp_size=world.tensor_size,
        first_layer=world.stage * layers,
        num_layers=layers,
        first_stage=world.first_stage,
        last_stage=world.last_stage,
        padded_vocab=padded_vocabulary(shape, world.tensor_size),
    )


def _join(timeout: datetime.timedelta) -> None:
    backend = "gloo" if core.ON_CPU else "nccl"
    if "WORLD_SIZE" not in os.environ:
        # A store in memory needs no port, so learners on one machine cannot collide.
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if os.environ.get("MASTER_ADDR") in _LOOPBACK:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if not core.ON_CPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timeout)


def _here(peers: Peers, host_group: dist.ProcessGroup | None) -> World:
    state = core.parallel_state
    world = World(
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        stage=state.get_pipeline_model_parallel_rank(),
        stages=state.get_pipeline_model_parallel_world_size(),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        device=torch.device("cpu") if core.ON_CPU else torch.device("cuda", torch.cuda.current_device()),
        peers=peers,
        host_group=host_group,
    )
    if world != world.of_rank(peers.rank):
        raise EngineError(f"megatron-core's order of ranks is not ours: rank {peers.rank} is {world}")
    return world
