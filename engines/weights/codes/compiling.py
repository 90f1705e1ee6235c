"""How the loops become machine code."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

from stream_rl.errors import WeightsError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(arguments: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Machine code for arguments of these types, where W stands for either width; other threads run while it does.

    It is made here and now, in one order in all processes: numba numbers its files by it, and processes that compiled
    at the same time in different orders would overwrite each other's.
    """
    signatures = [f"({arguments.replace('W', width)},)" for width in ("int16", "int32")]
    cached = bool(numba.config.CACHE_DIR)
    jit = numba.njit(list(dict.fromkeys(signatures)), cache=cached, nogil=True, error_model="numpy")
    return cast(Callable[[Callable[P, R]], Callable[P, R]], jit)


def ascended(well: bool, elements: int) -> None:
    if not well:
        raise WeightsError(f"positions must ascend below {elements}")
