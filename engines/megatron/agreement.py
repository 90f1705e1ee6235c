"""What the learner's ranks say to one another beside training: short byte strings over gloo, in a group of their own,
so that a thread may do it while the model's own collectives run."""

import datetime
from collections.abc import Callable
from typing import TypeVar, cast

import safetensors
import torch
import torch.distributed as dist

from stream_rl.errors import EngineError, StreamRLError, WeightsError

Result = TypeVar("Result")


class Peers:
    """All ranks of the learner, or the only one.  One thread at a time."""

    def __init__(self, timeout_s: float) -> None:
        """Made by all ranks at the same point.  timeout_s: how long one waits for the slowest."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        self._group = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def exchange(self, own: bytes) -> list[bytes]:
        """What each rank says, in their order.  Raises EngineError if one is lost or silent."""
        if self._group is None:
            return [own]
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            most = max(int(size) for size in sizes)
            padded = torch.zeros(most, dtype=torch.uint8)
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else padded[:0]
            gathered = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(gathered, padded, group=self._group)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self.rank} of {self.size} expected the others' word within {self._timeout_s} s, and one of "
                f"them is gone or too slow: {error}"
            ) from error
        return [each[: int(size)].numpy().tobytes() for each, size in zip(gathered, sizes, strict=True)]

    def together(self, act: Callable[[], Result]) -> Result:
        """Every rank does its `act`, and gets what its own returned.

        Raises WeightsError on all of them if one fails.
        """
        if self._group is None:
            return act()
        trouble, result = "", None
        try:
            result = act()
        except (StreamRLError, OSError, safetensors.SafetensorError) as error:
            trouble = str(error) or repr(error)
        for rank, said in enumerate(self.exchange(trouble.encode())):
            if said:
                raise WeightsError(f"rank {rank} of {self.size}: {said.decode()}")
        return cast(Result, result)
