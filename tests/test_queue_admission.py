"""Settings under which nothing could ever train are refused at start."""

import math

import pytest

from queues.admission import Admission, check
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


def test_starving_admits_one_more_than_the_limit():
    admission = Admission(Queue(**GOOD))
    assert admission.limit == 8
    assert admission.grant(outstanding=8, starving=False) <= 0
    assert admission.grant(outstanding=20, starving=True) == 1
