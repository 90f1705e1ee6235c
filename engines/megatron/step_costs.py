"""What a learner's steps cost: the CPU time of the model's own work and of everything else, and memory."""

import resource
import time
from typing import Any

import torch
from torch import Tensor

from engines.megatron import core
from engines.megatron.learner import LossFunction, MegatronLearner
from stream_rl.types import TrainingBatch

MODEL = ("forward", "logprobs", "backward", "optimizer")
"""What every training step has.  logprobs: log-softmax and entropy of the model's output, in the forward pass;
optimizer: megatron-core's, with clipping."""


class StepSplit:
    """CPU time by its use, of a learner in one process on a CPU that from now on finds its changes, as in a run.

    The clock is that of all threads of the process.  Boundaries are where torch says that a pass begins or ends, so
    whatever is between two of them is counted as ours, named or not.
    """

    def __init__(self, learner: MegatronLearner) -> None:
        learner.watch_changes()
        self._learner = learner
        self._seconds = dict.fromkeys(MODEL, 0.0)
        self._began: dict[str, float] = {}
        gpt = learner.network.gpt
        gpt.register_forward_pre_hook(lambda module, inputs: self._begin("forward"))
        gpt.register_forward_hook(self._after_forward)
        optimizer = learner._optimizer
        step = optimizer.step

        def timed_step(*arguments: Any, **keywords: Any) -> Any:
            self._begin("optimizer")
            result = step(*arguments, **keywords)
            self._end("optimizer")
            return result

        optimizer.step = timed_step

    def train_step(self, batch: TrainingBatch, loss: LossFunction) -> tuple[dict[str, float], dict[str, float]]:
        """The learner's step; its report and CPU seconds: of each of MODEL, of `finding` the changes, and `other`."""

        def between(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self._end("logprobs")
            value, metrics = loss(*arguments)
            value.register_hook(self._at_backward)  # type: ignore[no-untyped-call]
            return value, metrics

        self._seconds = dict.fromkeys(MODEL, 0.0)
        started = time.process_time()
        report = self._learner.train_step(batch, between)
        finding = self._learner.take_changes().cpu_seconds
        whole = time.process_time() - started
        seconds = dict(self._seconds)
        seconds["optimizer"] -= finding  # it compares within the optimizer's step
        other = whole - sum(seconds.values()) - finding
        return report, seconds | {"finding": finding, "other": other}

    def _after_forward(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._end("forward")
        self._begin("logprobs")

    def _at_backward(self, gradient: Tensor) -> None:
        self._begin("backward")
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end("backward"))

    def _begin(self, name: str) -> None:
        self._began[name] = time.process_time()

    def _end(self, name: str) -> None:
        self._seconds[name] += time.process_time() - self._began.pop(name)


def peak_memory_bytes() -> int:
    """Of this process so far: on its GPU, in tensors; without one, resident."""
    if core.ON_CPU:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def profiled(learner: MegatronLearner, batch: TrainingBatch, loss: LossFunction, rows: int = 40) -> str:
    """What one more step takes longest over, as a table of torch's operations and, on a GPU, its kernels."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if not core.ON_CPU:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        learner.train_step(batch, loss)
        learner.wait()
    by = "self_cpu_time_total" if core.ON_CPU else "self_cuda_time_total"
    table: str = profile.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=100)
    return table
