"""Plain values and request ids: they come back as they were, and what nobody made is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_rl import plain
from stream_rl.errors import WireError
from stream_rl.types import make_rid, parse_rid

MEDIUM = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
PLAIN = st.recursive(
    SCALARS | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@MEDIUM
@given(PLAIN)
def test_plain_values_come_back(value: Any) -> None:
    assert repr(plain.unpack(plain.pack(value))) == repr(value)


@MEDIUM
@given(st.binary(max_size=64))
def test_plain_bytes_are_unpacked_or_refused(data: bytes) -> None:
    try:
        plain.unpack(data)
    except WireError as error:
        reason = error.reason
    else:
        return
    assert reason == "not_msgpack"


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, -(2**63) - 1, [np.float32(1)], {"a": [lambda: 0]}])
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(WireError) as caught:
        plain.pack(value)
    assert caught.value.reason == "not_plain"


@MEDIUM
@given(st.text("ab-_9", min_size=1, max_size=5), st.integers(0), st.integers(0), st.integers(0))
def test_request_ids_come_back_and_none_is_a_prefix_of_another(run: str, group: int, member: int, segment: int) -> None:
    rid = make_rid(run, group, member, segment)
    assert parse_rid(rid) == (run, group, member, segment)
    assert not make_rid(run, group, member, segment + 1).startswith(rid)
    assert not make_rid(run, group, member, segment * 10).startswith(rid) or segment == 0


@pytest.mark.parametrize(
    "rid",
    [
        *("", "r", "r/1/2/3", "/1/2/3.", "r/1/2/.", "r/1/2/3.4.", "r/1/2", "r/1/2/3/4.", "r/a/2/3."),
        *("r/1_0/2/3.", "r/ 1/2/3.", "r/+1/2/3.", "r/01/2/3.", "r/١/2/3.", "r/-1/2/3."),
    ],
)
def test_a_request_id_that_nobody_made_is_refused(rid: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the contract names no more
        parse_rid(rid)
