"""The number under way steers itself: to the knee, below the target age, and never away.

The plant is three lines: what is under way gives a rate, and by Little's law an age.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from queues import snapshot
from queues.steering import MOST_PER_AGE, MOST_STEPS, STEP, Steering
from stream_rl.config import Queue

PER_STEP = 10
TOKENS = 1000.0


def steering(target: float = 100.0, over_provision: float = 2.0) -> Steering:
    queue = Queue(
        min_tokens=1,
        max_tokens=2,
        first_groups=PER_STEP,
        over_provision=over_provision,
        target_token_age=target,
    )
    return Steering(queue)


def knee_at(groups: float) -> Callable[[float], float]:
    """Tokens a second: in proportion to what is under way, up to the knee."""
    return lambda under_way: min(under_way, groups)


@dataclass
class Plant:
    """Every step trains TOKENS tokens; so it takes as long as it takes to sample them."""

    steering: Steering
    rate: Callable[[float], float]
    age_per_step: float = 0.5
    """Age of trained tokens, over steps' worth under way."""
    noise: float = 0.0
    per_step: int = PER_STEP
    now: float = 50.0
    received: float = 0.0
    limits: list[int] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, steps: int) -> "Plant":
        for _ in range(steps):
            limit = self.steering.limit(self.per_step)
            rate = self.rate(limit) * self.chance.lognormvariate(0, self.noise)
            age = self.age_per_step * limit / self.per_step
            self.now += TOKENS / rate
            self.received += TOKENS
            self.steering.applied(self.now, int(self.received), age, self.per_step)
            self.limits.append(limit)
            self.ages.append(age)
        return self

    def settled(self, steps: int = 100) -> float:
        """Mean limit over the last steps."""
        return sum(self.limits[-steps:]) / steps


@pytest.mark.parametrize("over_provision", [1.0, 2.0, 8.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_it_finds_the_knee_from_below_and_from_above(over_provision: float, noise: float) -> None:
    plant = Plant(steering(over_provision=over_provision), knee_at(65.0), noise=noise).run(800)
    assert 65 / STEP <= plant.settled(300) <= 65 * STEP


def test_it_starts_where_the_recipe_says_whatever_the_first_groups_came_to() -> None:
    young = steering(over_provision=3.0)
    assert young.limit(PER_STEP) == young.limit(PER_STEP // 2) == 3 * PER_STEP


def test_age_above_the_target_shrinks_it_in_one_measurement() -> None:
    plant = Plant(steering(target=2.0, over_provision=12.0), knee_at(1000.0)).run(1)
    assert plant.ages == [6.0]
    plant.run(60)
    assert plant.settled(20) == pytest.approx(2.0 / 0.5 * PER_STEP, rel=0.15)
    assert max(plant.run(300).ages[-300:]) <= 2.0 * STEP


def test_up_to_the_target_it_goes_for_throughput() -> None:
    plant = Plant(steering(target=3.0, over_provision=1.0), knee_at(1000.0)).run(500)
    assert 0.8 * 3.0 <= sum(plant.ages[-200:]) / 200 <= 1.05 * 3.0


def test_a_slow_learner_is_given_no_more_than_it_can_use() -> None:
    """Engines that could do ten times as much: what is not needed would only grow old in the queue."""
    plant = Plant(steering(over_provision=10.0), knee_at(30.0)).run(600)
    assert plant.settled(200) <= 30 * STEP


@pytest.mark.parametrize(("before", "after"), [(30.0, 90.0), (90.0, 30.0)])
def test_it_follows_engines_that_come_and_go(before: float, after: float) -> None:
    plant = Plant(steering(), knee_at(before), noise=0.02).run(600)
    plant.rate = knee_at(after)
    assert after / STEP**1.5 <= plant.run(600).settled(200) <= after * STEP**1.5


@pytest.mark.parametrize("while_trying", [False, True])
def test_answers_that_get_shorter_leave_no_engine_idle(while_trying: bool) -> None:
    """A step comes to take four times the groups; up to a step's groups are whole and wait, and occupy no engine."""
    plant = Plant(steering(), knee_at(55.0))
    plant.rate = lambda limit: min(max(limit - plant.per_step, 0.1), 55.0)
    plant.run(300)
    while bool(plant.steering.home) != while_trying:
        plant.run(1)
    running = plant.limits[-1] - PER_STEP
    for plant.per_step in range(PER_STEP, 4 * PER_STEP):
        plant.run(1)
        assert plant.limits[-1] - plant.per_step >= 0.6 * running, "but for a trial of less"
    for plant.per_step in range(4 * PER_STEP, PER_STEP, -1):
        plant.run(1)
    assert plant.limits[-1] - plant.per_step <= 1.5 * running


def test_engines_that_come_are_noticed_while_it_rests() -> None:
    plant = Plant(steering(), lambda n: n / (1 + n / 20)).run(300)
    while plant.steering.rest < 7 or plant.steering.settling:
        plant.run(1)
    resting = plant.limits[-1]
    plant.rate = lambda n: n / (1 + n / 80)
    assert max(plant.run(20).limits[-20:]) >= resting * 1.2


def test_a_soft_knee_is_where_more_no_longer_pays() -> None:
    """n / (a + b n): at the end, a quarter more would bring less than 4 %, a quarter less would have cost more."""
    plant = Plant(steering(), lambda n: n / (1 + n / 40)).run(800)
    assert 100 <= plant.settled(300) <= 320


def test_one_very_long_step_changes_nothing() -> None:
    calm, struck = (Plant(steering(), knee_at(65.0)).run(300) for _ in range(2))
    fast, struck.rate = struck.rate, lambda _: 0.01
    struck.run(1)
    struck.rate = fast
    assert calm.run(101).settled(100) == pytest.approx(struck.run(100).settled(100), rel=0.02)


def test_steps_that_take_very_long_now_and_then_do_not_hide_the_knee() -> None:
    """Checkpoints and restarts, of which a measurement holds none, or one, or three."""
    for seed in range(8):
        plant, chance = Plant(steering(), knee_at(65.0)), random.Random(seed)
        for _ in range(1000):
            plant.rate = knee_at(65.0) if chance.random() < 0.85 else lambda _: 2.0
            plant.run(1)
        assert 65 <= plant.settled(300) <= 65 * STEP


def test_it_is_mostly_at_rest_when_nothing_changes() -> None:
    plant = Plant(steering(), knee_at(65.0)).run(2000)
    often = max(plant.limits[-1000:], key=plant.limits[-1000:].count)
    assert plant.limits[-1000:].count(often) > 600


def test_it_falls_gently_so_that_admission_never_stops() -> None:
    plant = Plant(steering(target=2.0, over_provision=15.0), knee_at(65.0)).run(400)
    falls = [a - b for a, b in zip(plant.limits, plant.limits[1:], strict=False)]
    assert max(falls) >= 1
    assert max(falls) <= PER_STEP / 2 + 1


def test_noise_alone_cannot_make_it_run_away() -> None:
    """A rate that depends on nothing: every trial costs thrift, so it goes down."""
    for seed in range(5):
        plant = Plant(steering(over_provision=20.0), lambda _: 50.0, noise=0.1, chance=random.Random(seed)).run(3000)
        assert plant.settled(500) < 100


@example([(1e-308, 10**9, 0.0, 1)] * 40, 1.0, 2.0)  # more tokens a second than a float holds
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e4),
            st.integers(-10, 10**9),
            st.one_of(st.floats(0, 1e6), st.just(math.nan)),
            st.integers(1, 10**4),
        ),
        max_size=200,
    ),
    st.floats(0.1, 50),
    st.floats(0.01, 100),
)
def test_whatever_comes_it_stays_between_one_step_and_the_most(
    steps: list[tuple[float, int, float, int]], target: float, over_provision: float
) -> None:
    steered = steering(target, over_provision)
    now = received = 0.0
    for elapsed, tokens, age, per_step in steps:
        now, received = now + elapsed, received + tokens
        steered.applied(now, int(received), age, per_step)
        assert per_step <= steered.limit(per_step) <= math.ceil(max(1.0, MOST_PER_AGE * target) * per_step)
        assert len(steered.rates) <= MOST_STEPS


def test_a_snapshot_of_it_goes_on_alike() -> None:
    plant = Plant(steering(), knee_at(65.0), noise=0.05).run(173)
    copy = Plant(snapshot.load(snapshot.dump(plant.steering)), plant.rate, noise=0.05, now=plant.now)
    copy.received = plant.received
    copy.chance.setstate(plant.chance.getstate())
    assert copy.run(200).limits == plant.run(200).limits[-200:]
