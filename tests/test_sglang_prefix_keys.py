"""Prefix keys: a trajectory's turns share one while it is young enough, and nothing else ever does with older ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.sglang import prefix_keys
from engines.sglang.prefix_keys import PrefixKeys, of_version
from stream_rl.types import Version, make_rid


def test_later_segments_keep_the_key_until_it_is_too_old() -> None:
    keys = PrefixKeys(max_age=2)
    key = [
        keys.of_segment(make_rid("r", 0, 0, segment), Version(0, step)) for segment, step in enumerate([5, 6, 7, 8, 9])
    ]
    assert key == [of_version(Version(0, step)) for step in (5, 5, 5, 8, 8)]


def test_another_history_and_another_trajectory_take_the_live_version() -> None:
    keys = PrefixKeys(max_age=8)
    keys.of_segment(make_rid("r", 0, 1, 0), Version(0, 5))
    assert keys.of_segment(make_rid("r", 0, 11, 0), Version(0, 6)) == of_version(Version(0, 6))
    assert keys.of_segment(make_rid("r", 0, 1, 1), Version(0, 6)) == of_version(Version(0, 5))
    assert keys.of_segment(make_rid("r", 0, 1, 2), Version(1, 5)) == of_version(Version(1, 5))


def test_without_an_age_every_version_has_its_own() -> None:
    keys = PrefixKeys(max_age=0)
    for step in (1, 1, 2, 3):
        assert keys.of_segment(make_rid("r", 0, 0, step), Version(0, step)) == of_version(Version(0, step))


def test_memory_is_bounded_and_the_longest_unasked_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_keys, "MAX_TRAJECTORIES", 3)
    keys = PrefixKeys(max_age=100)
    for step, member in enumerate([0, 1, 2, 0, 3]):
        keys.of_segment(make_rid("r", 0, member, step), Version(0, step))
    assert len(keys) == 3
    assert keys.of_segment(make_rid("r", 0, 0, 9), Version(0, 9)) == of_version(Version(0, 0))
    assert keys.of_segment(make_rid("r", 0, 1, 9), Version(0, 9)) == of_version(Version(0, 9))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60), st.integers(0, 5))
def test_a_key_is_never_older_than_allowed_nor_changed_without_need(asks: list[tuple[int, int]], max_age: int) -> None:
    keys, live, held = PrefixKeys(max_age), 0, dict[int, int]()
    for segment, (member, steps) in enumerate(asks):
        live += steps
        key = keys.of_segment(make_rid("r", 7, member, segment), Version(2, live))
        version = int(key.rpartition(".")[2])
        assert live - max_age <= version <= live
        if member in held and live - held[member] <= max_age:
            assert version == held[member]
        else:
            assert version == live
        held[member] = version
