"""What a run wrote down while it went on: the lines of its metrics.jsonl."""

import json
import pathlib
from typing import Any


def read(directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run by kind (step, version, stock, status, restart), each in order."""
    path = directory / "metrics.jsonl"
    records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("step", "version", "stock", "status", "restart")}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):  # the last one of a run that goes on may be half written
            record = json.loads(line)
            records[record["kind"]].append(record)
    return records
