"""Histograms that merge, JSON lines that any reader takes, names that flatten and come back."""

import json
import math
import pathlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_rl.metrics import BUCKETS_PER_OCTAVE, Histogram, JsonLines, flatten, quantile, read_lines, unflatten

LIGHT = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
POSITIVE = st.floats(1e-300, 1e300)
VALUES = st.lists(POSITIVE | st.floats(-1e6, 0.0), max_size=40)
SHARES = st.floats(0.0, 1.0)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@LIGHT
@given(st.lists(POSITIVE, min_size=1, max_size=40), st.integers(1, 40))
def test_a_quantile_of_a_histogram_is_that_of_its_values_to_a_bucket(values: list[float], rank: int) -> None:
    rank = min(rank, len(values))
    q = (rank - 0.5) / len(values)
    exact = sorted(values)[rank - 1]
    assert quantile(values, q) == exact
    assert abs(math.log2(histogram_of(values).quantile(q) / exact)) <= 1 / BUCKETS_PER_OCTAVE + 1e-9


@LIGHT
@given(VALUES, VALUES, SHARES)
def test_merged_histograms_are_the_histogram_of_all_values(first: list[float], second: list[float], q: float) -> None:
    merged = Histogram()
    merged.merge(histogram_of(first).counts())
    merged.merge(json.loads(json.dumps(histogram_of(second).counts())))
    whole = histogram_of(first + second)
    assert merged.counts() == whole.counts()
    assert merged.total == len(first) + len(second)
    assert merged.quantile(q) == whole.quantile(q) or (math.isnan(merged.quantile(q)) and not first + second)


@LIGHT
@given(st.lists(POSITIVE, min_size=1, max_size=20), SHARES, SHARES)
def test_quantiles_grow_with_their_share(values: list[float], p: float, q: float) -> None:
    histogram = histogram_of(values)
    assert histogram.quantile(min(p, q)) <= histogram.quantile(max(p, q))
    assert quantile(values, min(p, q)) <= quantile(values, max(p, q))


def test_zero_and_below_share_one_bucket_whose_middle_is_zero() -> None:
    histogram = histogram_of([0.0, -0.0, -3.0, 5e-324])
    assert histogram.counts()["zero"] == 3
    assert histogram.quantile(0.5) == 0.0
    assert 0.0 < histogram.quantile(1.0) < 1e-320 or histogram.quantile(1.0) == 5e-324


def test_an_empty_histogram_and_an_empty_list_have_no_quantile() -> None:
    assert math.isnan(Histogram().quantile(0.5)) and math.isnan(quantile([], 0.5))
    assert Histogram().total == 0 and Histogram().counts() == {}


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.2, 1.0), (0.21, 2.0), (0.5, 3.0), (0.99, 5.0), (1.0, 5.0)])
def test_a_quantile_of_a_list_is_its_nearest_rank(q: float, expected: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], q) == expected


def test_every_line_is_there_for_a_reader_as_soon_as_it_is_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    for n in range(3):
        lines.write({"step": n, "text": "a\nb ü"})
        assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == list(
            range(n + 1)
        )
    lines.close()
    again = JsonLines(path)
    again.write({"step": 3})
    again.close()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_line_is_json_whatever_the_number(tmp_path: pathlib.Path, value: float) -> None:
    def no_json(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON: other readers than Python's refuse the line")

    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"age_p99": value, "deeper": {"still": value}, "several": [1.0, value]})
    lines.close()
    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=no_json)


@pytest.mark.parametrize("left", ["", '{"step": 0}\n', '{"step": 0}\n{"st', '{"st'])
def test_a_torn_line_stays_by_itself(tmp_path: pathlib.Path, left: str) -> None:
    path = tmp_path / "learner.jsonl"
    path.write_text(left)
    for _ in range(2):
        lines = JsonLines(path)
        lines.write({"step": 1})
        lines.close()
    wanted = left if not left or left.endswith("\n") else left + "\n"
    assert path.read_text() == wanted + '{"step": 1}\n' * 2
    assert list(read_lines(path)) == [{"step": 0}] * left.startswith('{"step": 0}') + [{"step": 1}] * 2


def test_what_is_no_whole_line_is_passed_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.jsonl"
    assert list(read_lines(path)) == []
    path.write_bytes(b'{"a": 1}\n\xff\n\0\0\0\n[2]\n\n{"a": 3}\n{"a": 4}')
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


NAMES = st.text("abc_/ ", min_size=1, max_size=4)
LEAVES = (
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=6).filter(lambda s: s not in ("true", "false"))
)
TREES = st.dictionaries(
    NAMES,
    st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=6),
    max_size=4,
)


@LIGHT
@given(TREES)
def test_a_flattened_tree_comes_back_after_its_numbers_travelled_as_floats(tree: dict[str, Any]) -> None:
    numbers, strings = flatten(tree)
    assert unflatten({name: float(value) for name, value in numbers.items()}, strings) == tree
    assert unflatten(numbers, strings) == tree


def test_names_are_dotted_and_booleans_travel_as_strings() -> None:
    numbers, strings = flatten({"a": {"b": 1, "c": {"d": True}}, "e": "x"})
    assert numbers == {"a.b": 1} and strings == {"a.c.d": "true", "e": "x"}
    back = unflatten(numbers, strings)
    assert back["a"]["c"]["d"] is True


def test_a_nan_comes_back_as_a_nan() -> None:
    assert math.isnan(unflatten(*flatten({"a": math.nan}))["a"])
