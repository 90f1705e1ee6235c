"""What is simulated: the sizes and speeds of a run."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from queues.admission import check
from stream_rl.config import Queue, Rollout
from stream_rl.errors import ConfigError

SETTLING_SHARE = 0.3
"""Of the steps: nothing of them is measured.  Queues fill, steering finds its place."""
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
AGENT_SIZES = ((1.0, 16, 8), (10.0, 8, 4), (float("inf"), 4, 4))
"""(versions spanned at most, groups of a step, members of a group): steps get smaller as more of them are needed."""
TRAJECTORIES = 25_600
"""Of an agents' run whose number of steps is left open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Decoding gets little faster past half of an engine's slots, as on a GPU whose batch is limited by computing."""

    lengths: str = "lognormal:1.0"
    steps: int = 200
    seed: int = 0
    ratio: float = 3.0
    """Groups under way, in steps' worth, where the policy leaves it open."""
    max_token_age: int = 8
    target_token_age: float = 4.0
    versions_spanned: float = 1.0
    """By a trajectory in the mean, when engines are full; ratios and ages above are in proportion to it."""

    groups: int = 16
    """That a step takes: in the mean, or exactly, as the policy has it."""
    group_size: int = 8
    mean_tokens: float = 256.0
    """Of a trajectory."""
    prompt_share: float = 0.5
    """Of the variance of (log) lengths: how much is between prompts rather than within a group."""
    most_tokens: int = 8192
    prompt_tokens: int = 4

    engines: int = 2
    slots: int = 96
    """Requests that one engine runs at once; more wait inside it."""
    step_s: float = 0.005
    """A decode step takes step_s + running * step_request_s."""
    step_request_s: float = 0.03 / 96
    chunk_tokens: int = 16

    learner_fixed_s: float = 0.2
    learner_speed: float = 0.9
    """Tokens a second, as a multiple of what full engines generate.  Past 1 the engines alone are the limit."""
    publish_s: float = 0.3
    """From an applied step until its weights are live in the engines."""
    commit_every: int = 10

    @property
    def ratios(self) -> tuple[float, ...]:
        """That are compared."""
        return tuple(self.versions_spanned * ratio for ratio in RATIOS)

    @property
    def max_staleness(self) -> int:
        """The bound of the systems that drop: what they admit is so many steps' worth beyond the one that trains."""
        return max(1, round(self.ratio - 1))

    @property
    def step_tokens(self) -> int:
        """Trainable tokens that make a step."""
        return int(self.groups * self.group_size * self.mean_tokens)

    @property
    def full_step_s(self) -> float:
        """A decode step with every slot taken."""
        return self.step_s + self.slots * self.step_request_s

    @property
    def engines_tokens_per_s(self) -> float:
        """Of all engines with every slot taken."""
        return self.engines * self.slots / self.full_step_s

    @property
    def nominal_step_s(self) -> float:
        """A learner's step when the engines are full and it waits for them."""
        return self.step_tokens / self.engines_tokens_per_s

    def queue(self, **changes: Any) -> Queue:
        """The queue's recipe section; `changes` are the policy's.  Raises ConfigError."""
        fields: dict[str, Any] = {
            "min_tokens": self.step_tokens,
            "max_tokens": 2 * self.step_tokens,
            "first_groups": self.groups,
            "over_provision": self.ratio,
            "in_flight": "fixed",
            "max_token_age": self.max_token_age,
            "target_token_age": self.target_token_age,
        }
        queue = Queue(**(fields | changes))
        check(queue, Rollout(group_size=self.group_size, max_new_tokens=self.most_tokens))
        return queue


def setting(lengths: str, **given: Any) -> Setting:
    """The setting for `lengths` (see `scripts.simulation.lengths`), with what is given (and not None) in place of its
    own.  Raises ConfigError."""
    base = Setting(lengths=lengths)
    kind, _, argument = lengths.partition(":")
    if kind == "agent":
        spanned = number(lengths, argument)
        groups, group_size = next((groups, size) for most, groups, size in AGENT_SIZES if spanned <= most)
        slots = base.slots * groups * group_size // (base.groups * base.group_size)
        base = dataclasses.replace(
            base,
            versions_spanned=spanned,
            ratio=base.ratio * spanned,
            max_token_age=round(base.max_token_age * spanned),
            target_token_age=base.target_token_age * spanned,
            groups=groups,
            group_size=group_size,
            slots=slots,
            step_request_s=base.step_request_s * base.slots / slots,
            chunk_tokens=8,
            steps=TRAJECTORIES // (groups * group_size),
        )
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def number(lengths: str, argument: str) -> float:
    """Raises ConfigError for what is no positive number."""
    try:
        value = float(argument)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--lengths {lengths}: expected a positive number after the colon, got {argument!r}")
    return value
