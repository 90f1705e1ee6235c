"""How many groups may be under way in streaming mode: the number steers itself.

    1. Hold the limit until everything under way was admitted at it, then measure: the tokens that come in a second, and
       the mean age at which they train.
    2. Age above the target: shrink in proportion (Little's law: age is what is under way, over what a step takes).
    3. Otherwise try a step more and a step less in turn, and move to where rate / limit ** THRIFT is higher.
    4. Where neither is, rest; longer each time, unless the rate changes by itself (engines came or went).
    5. Never less than one step takes, never more than MOST_PER_AGE steps' worth for each version of the target.
    6. When a step comes to take more groups, as many more wait for it to fill: the limit follows, group for group.  If
       it did not, answers that get shorter would leave engines idle.

Past the engines' knee a larger limit brings no more tokens, and while the learner is the slower side it brings none
either, so 3 lets go of whatever only waits.  A larger limit is kept only for a gain in rate, so it cannot run away.
"""

import math
import statistics

from stream_rl.config import Queue

STEP = 1.25
"""Between two limits that are compared."""
LEAST = 0.08
"""Relative difference that is worth a comparison."""
THRIFT = 0.15
"""A limit that is 1 % larger has to bring 0.15 % more tokens a second.  The knee is where it does not."""
PRECISION = 0.02
"""Relative standard error of a measured rate, unless MOST_STEPS come first."""
FEWEST_STEPS, MOST_STEPS = 4, 32
FALL = 0.5
"""Of a step's groups: a limit falls by this much a step at most.  Admission that stops leaves a gap that comes around
again and again."""
MARGIN = 1.01
"""A trial has to be so much better: where it makes no difference, the limit stays where it is."""
MOST_REST = 16
"""Measurements between two trials, at most."""
CHANGED = 1.2
"""A rate that moves by this factor while the limit rests means other engines."""
MOST_PER_AGE = 8.0
"""A token spends an eighth at least of its group's time under way between being sampled and being trained: a larger
limit than this would be too old at any rate."""


class Steering:
    """Plain numbers only: it is part of the queue's snapshot."""

    def __init__(self, queue: Queue) -> None:
        self._target = queue.target_token_age
        self._start = queue.over_provision * queue.first_groups
        self.per_step = queue.first_groups
        """Groups that a step was expected to take when the last was applied."""
        self.groups = 0.0
        """Where the limit is or falls to, not rounded; 0 until the first step was applied."""
        self.falling = 0.0
        """Groups by which the limit is still above it."""
        self.home = 0.0
        """While another limit is tried: the one to go back to; else 0."""
        self.home_score = 0.0
        """0: not measured."""
        self.direction = 1
        """Of the next trial."""
        self.failed = False
        """The trial before did not pay: if this one, in the other direction, does not either, this is the place."""
        self.rest = 0
        """Measurements until the next trial."""
        self.patience = 1
        """The next rest."""
        self.settling = 0
        """Steps until everything under way was admitted at this limit."""
        self.rates: list[float] = []
        self.ages: list[float] = []
        self.last_s = math.nan
        self.last_received = 0
        self.occupancy = 1.0
        """Limits are of groups as they occupy engines; under way are as many, over this."""

    def limit(self, groups_per_step: int) -> int:
        """Groups that may be under way: admitted and not yet trained."""
        return math.ceil(self._bounded(self.groups + self.falling or self._start, groups_per_step))

    def applied(self, now: float, received_tokens: int, age_mean: float, groups_per_step: int) -> None:
        """A step was applied.

        received_tokens: sampled tokens that have come from the engines so far.
        age_mean: versions; of the tokens that the step trained, nan if it trained none.
        groups_per_step: what a step is expected to take.
        """
        elapsed, tokens = now - self.last_s, received_tokens - self.last_received
        self.last_s, self.last_received = now, received_tokens
        self.falling = max(0.0, self.falling - FALL * groups_per_step)
        more, self.per_step = groups_per_step - self.per_step, groups_per_step
        if not self.groups:
            self._go_to(self._start + more, groups_per_step)
            return
        self.groups = self._bounded(self.groups + more, groups_per_step)
        if self.home:
            self.home = self._bounded(self.home + more, groups_per_step)
        if self.settling:
            self.settling -= 1
        elif elapsed > 0 and math.isfinite(rate := tokens / elapsed) and math.isfinite(age_mean):
            self.rates.append(rate)
            self.ages.append(age_mean)
            if self._is_known():
                # The median, since a checkpoint or a restart makes one step very long.
                self._measured(statistics.median(self.rates), statistics.fmean(self.ages), groups_per_step)

    def _is_known(self) -> bool:
        """Whether the rate is known: precisely, or to be clearly above or below what a trial has to beat."""
        steps = len(self.rates)
        if not FEWEST_STEPS <= steps < MOST_STEPS:
            return steps >= MOST_STEPS
        error, rate = statistics.stdev(self.rates) / math.sqrt(steps), statistics.median(self.rates)
        to_beat = MARGIN * self.home_score * self.groups**THRIFT if self.home else math.inf
        return error <= PRECISION * rate or 2 * error < abs(rate - to_beat) < math.inf

    def _measured(self, rate: float, age: float, groups_per_step: int) -> None:
        here = self.groups
        score = rate / here**THRIFT
        if age > self._target:
            self.home = self.home_score = 0.0
            self._go_to(here * self._target / age, groups_per_step)
            return
        if not self.home:
            if self.home_score and not 1 / CHANGED < score / self.home_score < CHANGED:
                self.direction = 1 if score > self.home_score else -1
                self.failed, self.rest, self.patience = False, 0, 1
            self.home_score = score
        elif score > MARGIN * self.home_score:
            # Where it came from is a trial in the other direction that did not pay.
            self.home, self.home_score, self.failed, self.patience = 0.0, score, True, 1
        else:
            self._go_back(groups_per_step)
            return
        if self.rest:
            self.rest -= 1
            self._go_to(here, groups_per_step, settled=True)
        else:
            self._try(here, age, groups_per_step)

    def _go_back(self, groups_per_step: int) -> None:
        """From a trial that did not pay."""
        back, self.home = self.home, 0.0
        self.direction = -self.direction
        if self.failed:
            self.rest, self.patience = self.patience, min(2 * self.patience, MOST_REST)
        self.failed = not self.failed
        self._go_to(back, groups_per_step)

    def _try(self, here: float, age: float, groups_per_step: int) -> None:
        """Go a step from a limit that was measured."""
        for _ in range(2):
            there = here * STEP**self.direction
            there = max(there, here + 1) if self.direction > 0 else min(there, here - 1)
            there = self._bounded(min(there, here * self._target / age) if age else there, groups_per_step)
            if abs(there - here) >= max(1.0, LEAST * here):
                self.home = here
                self._go_to(there, groups_per_step)
                return
            self.direction = -self.direction
        self._go_to(here, groups_per_step, settled=True)

    def _go_to(self, groups: float, groups_per_step: int, settled: bool = False) -> None:
        before, self.groups = self.groups, self._bounded(groups, groups_per_step)
        self.falling = max(0.0, before + self.falling - self.groups)
        self.settling = 0 if settled else self._turnover(groups_per_step)
        self.rates, self.ages = [], []

    def _turnover(self, groups_per_step: int) -> int:
        """Steps until the limit has fallen, and as many groups were trained as are under way."""
        return math.ceil((self.groups / self.occupancy + self.falling / FALL) / max(1, groups_per_step))

    def _bounded(self, groups: float, groups_per_step: int) -> float:
        most = max(MOST_PER_AGE * self._target, 1.0) * groups_per_step
        return min(max(groups, float(groups_per_step)), most)
