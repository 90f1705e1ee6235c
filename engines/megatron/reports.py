"""What a step's micro-batches say, put together over all ranks: metrics, and the norm of the gradient."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.agreement import Peers
from engines.megatron.world import World

Report = dict[str, Tensor]
"""Of one micro-batch: scalars that add up over micro-batches, or maxima, if the name ends in "_max"."""
_MAXIMUM = "_max"
_PIECE = 1 << 16 if core.ON_CPU else 1 << 26
"""Elements of a gradient whose squares are summed in float32: a CPU's sum of 50 million is wrong by 0.8 %."""


def without_weight(report: Report) -> Report:
    """What changes nothing when it is put together with others."""
    return {
        name: torch.full_like(value, -math.inf if name.endswith(_MAXIMUM) else 0.0) for name, value in report.items()
    }


def reduced(reports: Sequence[Report]) -> dict[str, float]:
    """Of one rank's micro-batches; one transfer for all of them."""
    merged = []
    for name in reports[0]:
        values = torch.stack([report[name].float() for report in reports])
        merged.append(values.max() if name.endswith(_MAXIMUM) else values.sum())
    return dict(zip(reports[0], torch.stack(merged).tolist(), strict=True))


def agreed(own: dict[str, float], square: float, peers: Peers) -> tuple[dict[str, float], float]:
    """Of all ranks, on each of them the same: their reports as one, and the gradient's norm.

    own: empty on a rank that has nothing to say.  square: of the norm of its part of the gradient.
    What is not finite anywhere is not finite in the sum.
    """
    said = [json.loads(word) for word in peers.exchange(json.dumps([own, square]).encode())]
    totals: dict[str, float] = {}
    for report, _ in said:
        for name, value in report.items():
            if name not in totals:
                totals[name] = value
            elif name.endswith(_MAXIMUM):
                totals[name] = max(totals[name], value)
            else:
                totals[name] += value
    return totals, math.sqrt(sum(square for _, square in said))


def squared_gradient_norm(wrapped: Any, optimizer: Any, world: World) -> float:
    """Of this rank's part of the whole gradient, which is in the DDP's buffers: over all ranks each element once.

    Another rank counts what is replicated over tensor-parallel ranks beyond the first, the last stage's copy of tied
    embeddings, and of what is replicated over data-parallel ranks beyond the first; with the distributed optimizer
    each of these has the whole gradient of a shard of its own.
    """
    if world.peers.size == 1:
        # few flat buffers, so this is one pass over memory each
        pieces = [piece for buffer in wrapped.buffers for piece in buffer.grad_data.split(_PIECE)]
        return _squared(torch._foreach_norm(pieces))
    distributed = wrapped.ddp_config.use_distributed_optimizer
    if not distributed and world.data_rank:
        return 0.0
    ranges = _ranges(optimizer) if distributed else {}
    parts = []
    for parameter in wrapped.parameters():
        shared = getattr(parameter, "shared", False)
        replicated = world.tensor_rank and not getattr(parameter, "tensor_model_parallel", False)
        if shared or replicated or (distributed and parameter not in ranges):
            continue
        gradient = parameter.main_grad.view(-1)
        parts.append(gradient[slice(*ranges[parameter])] if distributed else gradient)
    return _squared(torch._foreach_norm(parts)) if parts else 0.0


def _squared(norms: Sequence[Tensor]) -> float:
    return float(torch.stack(list(norms)).double().square().sum())


def _ranges(optimizer: Any) -> dict[Tensor, tuple[int, int]]:
    """Where in each parameter the shard of this rank begins and ends."""
    found = {}
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in chained.model_param_gbuf_map if isinstance(chained, core.DistributedOptimizer) else ():
            own = chained._get_model_param_range_map(parameter)["param"]
            found[parameter] = own.start, own.end
    return found
