"""Two learner ranks over gloo, each a process: `python megatron_ranks.py RANK STORE MODEL MODE`.

Exits with 0 if what the ranks find changed is, together, what changed.
"""

import pathlib
import sys

import torch
import torch.distributed as dist

from engines.megatron import changes, found, model, world
from engines.megatron.changes import ChangeFinder
from engines.megatron.checkpoint import CheckpointTensors
from engines.megatron.huggingface import to_huggingface
from engines.megatron.layout import layout
from engines.megatron.model_shape import read_model_shape
from engines.megatron.optimizer import build_optimizer
from engines.weights.codes.ulp import stepped
from engines.weights.fingerprint import bits_of

RANKS, STEPS = 2, 3
FlatBits = dict[str, torch.Tensor]


def main(rank: int, store: str, directory: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    world.initialize(0, {}, processes=RANKS, timeout_s=60.0)
    changes.CHUNK, changes.IN_PLACE_CHUNK, found.SLICE = 1500, 2500, 700
    shape = read_model_shape(directory)
    with CheckpointTensors(pathlib.Path(directory)) as weights:
        built = model.build_model(shape, model.transformer_config(shape, {}), weights)
    gpt = built.module if shape.dtype == "bfloat16" else built
    distributed, overlap = mode != "plain", mode == "overlap"
    overlaps = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    ddp = model.wrap(built, {"use_distributed_optimizer": distributed} | overlaps)
    optimizer, _ = build_optimizer(ddp, {"lr": 1e-3, "weight_decay": 0.1}, {})
    finder = ChangeFinder(gpt, optimizer, layout(shape), rank, RANKS)

    def weights_now(synchronized: bool = True) -> FlatBits:
        if synchronized:
            model.synchronize(ddp)
        parameters = {name: parameter.detach() for name, parameter in gpt.named_parameters()}
        return {name: bits_of(tensor.reshape(-1)).clone() for name, tensor in to_huggingface(shape, parameters)}

    chance = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        before = weights_now()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for parameter in gpt.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=chance))
            if overlap:
                parameter.grad_added_to_main_grad = True
        if overlap:
            ddp.start_grad_sync()
        ddp.finish_grad_sync()
        assert optimizer.step()[0]
        pieces = finder.take().pieces()
        here = weights_now(synchronized=False)
        after = weights_now()
        stale = any(not torch.equal(here[name], after[name]) for name in here)
        assert stale == overlap, "only the overlapped gather leaves others' shards a step old"
        assert any(not torch.equal(before[name], after[name]) for name in before)
        compared = sum(bits.numel() for bits in before.values())
        mine = sum(piece.change.changed for piece in pieces)
        assert 0 < mine < 0.7 * compared, f"rank {rank} found {mine} of {compared}: the ranks share the work"
        for name, bits in before.items():
            steps, times = torch.zeros_like(bits, dtype=torch.int64), torch.zeros(bits.numel(), dtype=torch.int64)
            for piece in pieces:
                if piece.name == name:
                    where = piece.start + piece.change.sparse.indices
                    steps[where] += piece.change.sparse.steps.to(torch.int64)
                    times[where] += 1
                    if piece.change.new is not None:
                        assert torch.equal(piece.change.new, after[name][piece.start : piece.stop])
            for tensor in (steps, times):
                dist.all_reduce(tensor)
            assert int(times.max()) <= 1, f"{name}: an element has two finders"
            assert torch.equal(times.bool(), before[name] != after[name]), name
            assert torch.equal(stepped(bits, steps.to(bits.dtype)), after[name]), name
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
