"""Under which key a request finds and leaves its prefix in SGLang's cache: no hit ever crosses a key.

A trajectory's first request here takes the live version's key.  Later ones keep it while it is young enough, so that
the next turn reuses what the one before left; nothing under a key was computed with weights older than its version.
"""

from collections import OrderedDict

from stream_rl.types import Version

MAX_TRAJECTORIES = 1 << 15
"""Remembered; beyond, the one that was not asked for the longest takes the live version again.  About 8 MB."""


class PrefixKeys:
    def __init__(self, max_age: int) -> None:
        """max_age: versions that a kept key may be behind the live one."""
        self._max_age = max_age
        self._kept: OrderedDict[str, Version] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of_segment(self, rid: str, live: Version) -> str:
        """For a request of the run, which `stream_rl.types.make_rid` named."""
        trajectory = rid.rpartition("/")[0]
        kept = self._kept.get(trajectory)
        if kept is None or kept.history != live.history or not 0 <= live.step - kept.step <= self._max_age:
            kept = live
        self._kept[trajectory] = kept
        self._kept.move_to_end(trajectory)
        if len(self._kept) > MAX_TRAJECTORIES:
            self._kept.popitem(last=False)
        return of_version(kept)


def of_version(live: Version) -> str:
    """For what is not of the run, as an evaluation, which is to measure one version."""
    return f"version {live}"
