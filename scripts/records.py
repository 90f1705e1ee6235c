"""What a run wrote down while it went on: the lines of its metrics.jsonl."""

import pathlib
from typing import Any

from stream_rl.metrics import read_lines

KINDS = ("step", "version", "stock", "status", "restart", "resume")


def read(directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run by kind, each in order."""
    records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for record in read_lines(directory / "metrics.jsonl"):
        records[record["kind"]].append(record)
    return records
