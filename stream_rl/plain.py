"""Plain values (None, bools, numbers, strings, lists, maps) to bytes and back, for pipes between our own processes.

Messages between peers have declared types and go through `stream_rl.wire`; this is for what has no type of its own,
as the data that a user's task hands from its prompts to its reward.
"""

from typing import Any

import msgpack

from stream_rl.errors import WireError


def pack(value: Any) -> bytes:
    """Bytes of `value`; tuples come back as lists.  Raises WireError for anything that is not a plain value."""
    try:
        packed: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError("not_plain", f"only None, bools, 64-bit ints, floats, strings, lists, maps: {error}") from error
    return packed


def unpack(data: bytes) -> Any:
    """Inverse of `pack`.  Raises WireError for anything else."""
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise WireError("not_msgpack", f"{len(data)} bytes: {error}") from error
