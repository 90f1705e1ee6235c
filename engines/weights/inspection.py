"""What is in an update's file, for people."""

from typing import Any

import torch

from engines.weights import parts
from engines.weights.codes import payload
from engines.weights.codes.payload import Form
from engines.weights.directory import About
from stream_rl.messages import UpdatePart


def examine(about: About, updates: list[UpdatePart]) -> dict[str, Any]:
    """Numbers of a whole file, and of each tensor in it.  Raises WeightsError for a part that is damaged."""
    tensors: dict[str, dict[str, Any]] = {}
    for part in updates:
        parts.check(part)
        forms = payload.contents(part.payload).forms if part.names else []
        for name, count, dtype, form in zip(part.names, part.counts, part.dtypes, forms, strict=True):
            found = tensors.setdefault(name, {"dtype": dtype, "elements": 0, "slices": 0, "dense": 0})
            found["elements"] += count
            found["slices"] += 1
            found["dense"] += form is Form.DENSE
    payload_bytes = sum(part.payload.size for part in updates)
    width = max((getattr(torch, found["dtype"]).itemsize for found in tensors.values()), default=2)
    return {
        "run": about.run,
        "base": list(about.base),
        "target": list(about.target),
        "anchor": about.anchor,
        "code": about.code,
        "target_hash": about.target_hash,
        "parts": len(updates),
        "payload_bytes": payload_bytes,
        "full_bytes": width * about.elements,
        "changed": about.changed,
        "elements": about.elements,
        "changed_share": about.changed / max(about.elements, 1),
        "bits_per_changed": 8 * payload_bytes / max(about.changed, 1),
        "tensors": tensors,
    }
