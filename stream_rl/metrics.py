"""Numbers: mergeable histograms and JSON lines."""

import contextlib
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

BUCKETS_PER_OCTAVE = 16
"""Bucket width 2^(1/16): a quantile is right to 4.4 %."""


class Histogram:
    """Counts of positive values in logarithmic buckets; merges by adding.  Zero and below share one bucket."""

    def __init__(self) -> None:
        self._buckets: Counter[int | None] = Counter()

    def add(self, value: float) -> None:
        self._buckets[math.floor(math.log2(value) * BUCKETS_PER_OCTAVE) if value > 0 else None] += 1

    def merge(self, counts: Mapping[str, int]) -> None:
        """Add what another histogram's `counts` gave."""
        for bucket, count in counts.items():
            self._buckets[None if bucket == "zero" else int(bucket)] += count

    def counts(self) -> dict[str, int]:
        """Buckets by name, in a form that can travel."""
        return {"zero" if bucket is None else str(bucket): count for bucket, count in self._buckets.items()}

    @property
    def total(self) -> int:
        return self._buckets.total()

    def quantile(self, q: float) -> float:
        """The value below which a share `q` lies, as the geometric middle of its bucket; NaN when empty."""
        rest = q * self.total
        for bucket in sorted(self._buckets, key=lambda b: -math.inf if b is None else b):
            rest -= self._buckets[bucket]
            if rest <= 0 and self.total:
                return 0.0 if bucket is None else float(2 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))
        return math.nan


def quantile(values: list[float], q: float) -> float:
    """Nearest-rank quantile of a small list; NaN when empty."""
    if not values:
        return math.nan
    return sorted(values)[min(len(values) - 1, max(0, math.ceil(q * len(values)) - 1))]


def finite(tree: Any) -> Any:
    """The same tree with null for NaN and infinities, which JSON does not have."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


class JsonLines:
    """Appends one JSON object a line; each line is flushed, so a reader may follow.

    What a killed process left of a line stays a line of its own: see `read_lines`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        with path.open("ab+") as file:
            if size := file.tell():
                file.seek(size - 1)
                if file.read() != b"\n":
                    file.write(b"\n")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none if it is not there.  What is no whole line is passed over:
    one that is being written, or that a crash cut off."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if line.endswith(b"\n") and isinstance(record, dict):
                yield record


def flatten(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, float], dict[str, str]]:
    """Nested numbers and strings as dotted names: (numbers, strings).  Booleans travel as strings."""
    numbers: dict[str, float] = {}
    strings: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = flatten(value, f"{name}.")
            numbers |= inner[0]
            strings |= inner[1]
        elif isinstance(value, bool):
            strings[name] = "true" if value else "false"
        elif isinstance(value, (int, float)):
            numbers[name] = value
        else:
            strings[name] = str(value)
    return numbers, strings


def unflatten(numbers: Mapping[str, float], strings: Mapping[str, str]) -> dict[str, Any]:
    """Inverse of `flatten`; integers that travelled as floats come back as integers."""
    tree: dict[str, Any] = {}
    leaves: list[tuple[str, float | str]] = [*numbers.items(), *strings.items()]
    for name, value in leaves:
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if isinstance(value, str):
            node[leaf] = {"true": True, "false": False}.get(value, value)
        else:
            node[leaf] = int(value) if float(value).is_integer() else value
    return tree
