"""Settings under which nothing could ever train are refused at start."""

import math
import random
import statistics

import pytest

from queues.admission import LEAST_OCCUPANCY, Admission, check
from stream_rl.config import Queue, Rollout
from stream_rl.errors import ConfigError

GOOD = {"min_tokens": 64, "max_tokens": 128, "first_groups": 4, "over_provision": 2.0, "in_flight": "fixed"}


def test_a_usual_recipe_passes():
    check(Queue(**GOOD), Rollout(group_size=2, max_new_tokens=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_tokens": 129}, "queue.min_tokens is 129 and queue.max_tokens 128"),
        ({"min_tokens": 65}, "at most 64 tokens, and queue.min_tokens is 65"),
        ({"min_tokens": 0}, "queue.min_tokens must be at least 1"),
        ({"first_groups": 0}, "queue.first_groups must be at least 1"),
        ({"max_token_age": -2}, "queue.max_token_age must be at least -1"),
        ({"over_provision": 0.0}, "positive"),
        ({"over_provision": math.inf}, "positive"),
        ({"over_provision": math.nan}, "positive"),
    ],
)
def test_what_cannot_work_is_refused_in_words(change, words):
    with pytest.raises(ConfigError, match=words):
        check(Queue(**(GOOD | change)), Rollout(group_size=2, max_new_tokens=4))


def test_empty_groups_do_not_ask_for_unboundedly_many():
    admission = Admission(Queue(**GOOD))
    for _ in range(1000):
        admission.completed(0)
    assert admission.limit == 128


def test_what_a_step_takes_is_known_although_lengths_are_long_tailed():
    chance, queue = random.Random(0), Queue(**(GOOD | {"min_tokens": 64_000, "max_tokens": 10**6, "first_groups": 8}))
    admission, found = Admission(queue), []
    for _ in range(2000):
        admission.completed(round(1000 * chance.lognormvariate(-0.5, 1.0)))
        found.append(admission.groups_per_step)
    assert found[0] <= 10, "the first to complete are the shortest"
    assert statistics.median(found[30:80]) > 32, "but it does not hold on to what the recipe expected"
    assert statistics.median(found[200:]) == pytest.approx(64, rel=0.1)
    assert statistics.stdev(found[200:]) < 0.2 * 64


def test_starving_admits_one_more_than_the_limit():
    admission = Admission(Queue(**GOOD))
    assert admission.limit == 8
    assert admission.grant(5, 3, starving=False) <= 0
    assert admission.grant(20, 0, starving=True) == 1


# -- occupancy -------------------------------------------------------------------------------------------------


def after_turns(ran_s: float, waited_s: float, turns: int = 2000) -> Admission:
    admission = Admission(Queue(**GOOD))
    for _ in range(turns):
        admission.turn(ran_s, waited_s)
    return admission


@pytest.mark.parametrize("ran_s", [0.0, 1e-9, 3.0, 1e6])
def test_where_nothing_waits_for_an_environment_nothing_changes(ran_s):
    assert after_turns(ran_s, 0.0).occupancy == 1.0
    assert after_turns(ran_s, 0.0).grant(3, 2, starving=False) == 3


def test_what_is_half_of_its_time_at_its_environment_counts_half():
    admission = after_turns(2.0, 2.0)
    assert admission.occupancy == pytest.approx(0.5, rel=1e-3)
    assert admission.limit == 8
    assert admission.grant(0, 0, starving=False) == 15
    assert admission.grant(10, 0, starving=False) == 5
    assert admission.grant(0, 4, starving=False) == 7, "what is whole occupies no engine, and counts as it is"


def test_time_counts_and_not_the_number_of_turns():
    admission = Admission(Queue(**GOOD))
    for _ in range(20_000):
        for waited_s in (0.0, 0.0, 0.0, 12.0):
            admission.turn(1.0, waited_s)
    assert admission.occupancy == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("ran_s", [0.0, 1e-9])
def test_environments_of_hours_do_not_let_it_run_away(ran_s):
    admission = after_turns(ran_s, 1e5, turns=100_000)
    assert admission.occupancy == pytest.approx(LEAST_OCCUPANCY)
    assert admission.grant(0, 0, starving=False) <= 8 * admission.limit


def test_one_turn_tells_little():
    assert after_turns(0.0, 1e6, turns=1).occupancy > 0.99
