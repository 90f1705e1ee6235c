"""How many groups may be under way at once.

Outstanding groups (admitted and not opened + in flight + ready + leased) are held at a limit: `over_provision` times
what one step is expected to take, so that a token is about that many steps old when it trains, or what `Steering`
finds.  The expectation follows the sampled tokens of the groups that completed.

What is being grown counts as it occupies engines: an episode that spends half of its time on its environment is half an
episode to them, and twice as many keep them as busy.
"""

import math
from collections.abc import Iterable, Mapping

from queues.steering import Steering
from stream_rl.config import Queue, Rollout
from stream_rl.errors import ConfigError

_FIRST_WEIGHT, _WEIGHT = 0.1, 0.02
"""Of the newest group in the moving average, which begins with ten and comes to be over the last fifty: lengths are
long-tailed, and a step that is thought to take fewer groups than it does leaves engines idle."""
_TURN_WEIGHT = 0.01
"""Of the newest turn: waits are long-tailed, and admission follows them at its leisure."""
LEAST_OCCUPANCY = 0.125
"""However long environments take, at most eight times as many groups are grown: each has processes somewhere."""


def check(queue: Queue, rollout: Rollout) -> None:
    """Raises ConfigError for settings under which a step could wait for ever or nothing could train."""
    for name, number, least in (
        ("queue.min_tokens", queue.min_tokens, 1),
        ("queue.first_groups", queue.first_groups, 1),
        ("queue.max_token_age", queue.max_token_age, -1),
        ("rollout.group_size", rollout.group_size, 1),
        ("rollout.max_new_tokens", rollout.max_new_tokens, 1),
        ("queue.group_deadline_s", queue.group_deadline_s, 0),
        ("queue.commit_seconds", queue.commit_seconds, 0),
        ("queue.snapshot_bytes", queue.snapshot_bytes, 1 << 16),
        *((f"queue.max_token_age_of.{task}", age, -1) for task, age in queue.max_token_age_of.items()),
    ):
        if not number >= least:
            raise ConfigError(f"{name} must be at least {least}, got {number}")
    for name, factor in (
        ("queue.over_provision", queue.over_provision),
        ("queue.target_token_age", queue.target_token_age),
    ):
        if not 0 < factor < math.inf:
            raise ConfigError(f"{name} must be a positive number, got {factor}")
    if queue.min_tokens > queue.max_tokens:
        raise ConfigError(
            f"queue.min_tokens is {queue.min_tokens} and queue.max_tokens {queue.max_tokens}: a lease that may not "
            f"hold what a step needs; raise max_tokens or lower min_tokens (half of max_tokens is usual)"
        )
    groups = math.ceil(queue.over_provision * queue.first_groups)
    most = groups * rollout.group_size * rollout.max_new_tokens
    if most < queue.min_tokens and queue.mode in ("streaming", "rounds"):
        raise ConfigError(
            f"the first step can never fill: {groups} groups (queue.over_provision * queue.first_groups) of "
            f"{rollout.group_size} answers of {rollout.max_new_tokens} tokens are at most {most} tokens, and "
            f"queue.min_tokens is {queue.min_tokens}; raise first_groups or lower min_tokens"
        )


def share(groups: Iterable[int], loads: Mapping[str, int]) -> dict[str, list[int]]:
    """New groups for each actor, so that those with the fewest get the next; only actors that get any."""
    loads = dict(loads)
    shares: dict[str, list[int]] = {}
    for group in groups:
        actor = min(loads, key=lambda name: (loads[name], name))
        loads[actor] += 1
        shares.setdefault(actor, []).append(group)
    return shares


class Admission:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.by_batch = queue.mode in ("synchronous", "one_step_off")
        """A step trains on the groups that were admitted together, all of them."""
        steered = queue.mode == "streaming" and queue.in_flight == "steered"
        self._steering = Steering(queue) if steered else None
        self.tokens_per_group = queue.min_tokens / queue.first_groups
        """Moving average over completed groups.  It starts from what the recipe expects and not from the first group
        to complete: the first are the shortest, and would ask for several times too many."""
        self.num_completed = 0
        """Groups, so far."""
        self.occupancy = 1.0
        """Share of its time that a growing trajectory is in an engine; exactly 1 where nothing waits for environments.
        It moves slowly, from 1, and at most to LEAST_OCCUPANCY."""
        self._ran_s = self._waited_s = 0.0
        """Moving averages over turns, from 0: only their ratio is of use."""

    def turn(self, ran_s: float, waited_s: float) -> None:
        """A turn of the model took so long, and its environment so long after it."""
        self._ran_s += _TURN_WEIGHT * (ran_s - self._ran_s)
        self._waited_s += _TURN_WEIGHT * (waited_s - self._waited_s)
        if self._waited_s > 0:
            share = self._ran_s / (self._ran_s + self._waited_s)
            self.occupancy += _TURN_WEIGHT * (max(share, LEAST_OCCUPANCY) - self.occupancy)

    def completed(self, tokens: int) -> None:
        """A group completed with this many sampled tokens."""
        weight = max(_WEIGHT, 1 / (1 / _FIRST_WEIGHT + self.num_completed))
        self.num_completed += 1
        self.tokens_per_group += weight * (tokens - self.tokens_per_group)

    @property
    def groups_per_step(self) -> int:
        # A task whose answers are all empty must not ask for unboundedly many groups at once.
        least = min(1.0, self._queue.min_tokens / self._queue.first_groups)
        return math.ceil(self._queue.min_tokens / max(self.tokens_per_group, least))

    @property
    def limit(self) -> int:
        """Groups that may be under way, as they occupy engines."""
        if self.by_batch:
            return self._queue.first_groups
        if self._steering is not None:
            return self._steering.limit(self.groups_per_step)
        return math.ceil(self._queue.over_provision * self.groups_per_step)

    def applied(self, now: float, received_tokens: int, age_mean: float) -> None:
        """A step was applied: `received_tokens` have come so far; those that it trained were of this mean age."""
        if self._steering is not None:
            self._steering.occupancy = self.occupancy
            self._steering.applied(now, received_tokens, age_mean, self.groups_per_step)

    def grant(self, growing: int, grown: int, starving: bool) -> int:
        """Groups to admit now, beside those that are admitted or in flight and those that are whole.  `starving`: a
        lease waits, and nothing under way could fill it; then at least one, or a step that needs more than was expected
        would wait for ever."""
        return max(math.floor((self.limit - grown) / self.occupancy) - growing, int(starving))
