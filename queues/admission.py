"""How many groups may be under way at once.

Outstanding groups (credits not yet used + in flight + ready + leased) are held at `over_provision` times what one
step is expected to take, so that a token is about that many steps old when it trains.  The expectation follows the
trainable tokens of the groups that completed.
"""

import math

from stream_rl.config import Queue, Rollout
from stream_rl.errors import ConfigError

_WEIGHT = 0.1
"""Of the newest group in the moving average: about the last ten steps of a few groups each."""


def check(queue: Queue, rollout: Rollout) -> None:
    """Raises ConfigError for settings under which a step could wait for ever or nothing could train."""
    for name, number, least in (
        ("queue.min_tokens", queue.min_tokens, 1),
        ("queue.first_groups", queue.first_groups, 1),
        ("queue.max_token_age", queue.max_token_age, -1),
        ("rollout.group_size", rollout.group_size, 1),
        ("rollout.max_new_tokens", rollout.max_new_tokens, 1),
    ):
        if number < least:
            raise ConfigError(f"{name} must be at least {least}, got {number}")
    if not 0 < queue.over_provision < math.inf:
        raise ConfigError(f"queue.over_provision must be a positive number, got {queue.over_provision}")
    if queue.min_tokens > queue.max_tokens:
        raise ConfigError(
            f"queue.min_tokens is {queue.min_tokens} and queue.max_tokens {queue.max_tokens}: a lease that may not "
            f"hold what a step needs; raise max_tokens or lower min_tokens (half of max_tokens is usual)"
        )
    groups = math.ceil(queue.over_provision * queue.first_groups)
    most = groups * rollout.group_size * rollout.max_new_tokens
    if most < queue.min_tokens:
        raise ConfigError(
            f"the first step can never fill: {groups} groups (queue.over_provision * queue.first_groups) of "
            f"{rollout.group_size} answers of {rollout.max_new_tokens} tokens are at most {most} tokens, and "
            f"queue.min_tokens is {queue.min_tokens}; raise first_groups or lower min_tokens"
        )


class Admission:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.tokens_per_group = queue.min_tokens / queue.first_groups
        """Moving average over completed groups.  It starts from what the recipe expects and not from the first group
        to complete: the first are the shortest, and would ask for several times too many."""

    def completed(self, trainable_tokens: int) -> None:
        """A group completed with this many tokens that may train."""
        self.tokens_per_group += _WEIGHT * (trainable_tokens - self.tokens_per_group)

    @property
    def groups_per_step(self) -> int:
        # A task whose answers are all empty must not ask for unboundedly many groups at once.
        least = min(1.0, self._queue.min_tokens / self._queue.first_groups)
        return math.ceil(self._queue.min_tokens / max(self.tokens_per_group, least))

    @property
    def limit(self) -> int:
        return math.ceil(self._queue.over_provision * self.groups_per_step)

    def grant(self, outstanding: int, starving: bool) -> int:
        """Groups to admit now.  `starving`: a lease waits, and nothing under way could fill it; then at least one, or
        a step that needs more than was expected would wait for ever."""
        return max(self.limit - outstanding, int(starving))
