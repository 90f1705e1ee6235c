"""Messages to frames and back.

Frame 0 is msgpack: [wire version, message type, fields, array shapes].  The other frames are the raw buffers of the
message's arrays, in declared order.  The dtype of an array is part of its declaration and never travels, so a peer
cannot choose it.  Arrays are copied out at once: a view would keep the whole message alive.

Nothing here trusts its input.  Whatever is wrong with a message raises `WireError` with a short reason that can be
counted; nothing else escapes.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import msgpack
import msgspec
import numpy as np

from stream_rl.errors import WireError
from stream_rl.types import ARRAY_DTYPES

WIRE_VERSION = 1
MAX_FRAMES = 32
MAX_HEADER_BYTES = 8 << 20
"""Headers hold ids and scalars; the largest is a chunk message of a few thousand requests."""
MAX_ARRAY_BYTES = 1 << 30
"""One array of one message.  Weights travel in parts far smaller than this."""

T = TypeVar("T")
Frame = bytes | bytearray | memoryview


class _Codec(typing.NamedTuple):
    cls: type[Any]
    header: type[msgspec.Struct]
    scalars: tuple[str, ...]
    arrays: tuple[tuple[str, np.dtype[Any]], ...]


_codecs: dict[str, _Codec] = {}


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def message(cls: type[T]) -> type[T]:
    """Class decorator: make it a frozen keyword-only dataclass that can travel.  Fields are scalars, strings, lists
    and dicts of those, or one of the arrays of `types.ARRAY_DTYPES`."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)(cls)
    hints = typing.get_type_hints(made)
    arrays: list[tuple[str, np.dtype[Any]]] = []
    scalars: list[str] = []
    fields: list[Any] = []
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        hint = hints[field.name]
        if hint in ARRAY_DTYPES:
            arrays.append((field.name, ARRAY_DTYPES[hint]))
            continue
        scalars.append(field.name)
        if field.default is not dataclasses.MISSING:
            fields.append((field.name, hint, field.default))
        elif field.default_factory is not dataclasses.MISSING:
            fields.append((field.name, hint, msgspec.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, hint))
    header = msgspec.defstruct(f"{made.__name__}Header", fields, forbid_unknown_fields=True, kw_only=True)
    if made.__name__ in _codecs:
        raise TypeError(f"two messages are called {made.__name__}")
    _codecs[made.__name__] = _Codec(made, header, tuple(scalars), tuple(arrays))
    return made


def encode(message: Any) -> list[Frame]:
    """Frames of `message`, in order.  Array frames are views of the message's arrays: send before changing them."""
    codec = _codecs[type(message).__name__]
    shapes, frames = [], []
    for name, dtype in codec.arrays:
        array = np.ascontiguousarray(getattr(message, name), dtype=dtype)
        shapes.append(array.shape)
        frames.append(array.reshape(-1).view(np.uint8).data if array.size else b"")
    fields = {name: getattr(message, name) for name in codec.scalars}
    header = msgpack.packb([WIRE_VERSION, type(message).__name__, fields, shapes])
    if len(header) > MAX_HEADER_BYTES:
        raise WireError("header_too_long", f"{type(message).__name__} header has {len(header)} bytes")
    return [header, *frames]


def decode(frames: Sequence[Frame]) -> Any:
    """The message in `frames`.  Raises WireError for anything that is not exactly one of our messages."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError("frame_count", f"expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError("header_too_long", f"expected at most {MAX_HEADER_BYTES} bytes, got {len(frames[0])}")
    try:
        header = msgpack.unpackb(frames[0])
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise WireError("not_msgpack", f"frame 0 of {len(frames[0])} bytes: {error}") from error
    if not isinstance(header, list) or len(header) != 4:
        raise WireError("header_shape", "frame 0 must be [wire version, type, fields, shapes]")
    version, name, fields, shapes = header
    if version != WIRE_VERSION:
        raise WireError("wire_version", f"this side speaks wire version {WIRE_VERSION}, the message {version!r}")
    codec = _codecs.get(name) if isinstance(name, str) else None
    if codec is None:
        raise WireError("unknown_type", f"no message type {name!r}")
    if not isinstance(shapes, list) or len(shapes) != len(codec.arrays) or len(frames) != 1 + len(shapes):
        raise WireError("array_count", f"{name} has {len(codec.arrays)} arrays, the message {len(frames) - 1} frames")
    try:
        head = msgspec.convert(fields, codec.header)
    except (msgspec.ValidationError, TypeError, RecursionError) as error:
        raise WireError("field_type", f"{name}: {error}") from error
    values = {field: getattr(head, field) for field in codec.scalars}
    for (field, dtype), shape, frame in zip(codec.arrays, shapes, frames[1:], strict=True):
        values[field] = _array(name, field, dtype, shape, frame)
    return codec.cls(**values)


def _array(name: str, field: str, dtype: np.dtype[Any], shape: object, frame: Frame) -> np.ndarray[Any, Any]:
    if not isinstance(shape, list) or len(shape) > 4:
        raise WireError("array_shape", f"{name}.{field}: a shape is a list of at most 4 sizes, got {shape!r}")
    count = 1
    for n in shape:
        if type(n) is not int or not 0 <= n <= MAX_ARRAY_BYTES:
            raise WireError("array_shape", f"{name}.{field}: a shape is a list of sizes, got {shape!r}")
        count *= n
    if count * dtype.itemsize > MAX_ARRAY_BYTES:
        raise WireError("array_too_large", f"{name}.{field}: {count * dtype.itemsize} bytes > {MAX_ARRAY_BYTES}")
    if len(frame) != count * dtype.itemsize:
        raise WireError("array_length", f"{name}.{field}: {shape} of {dtype} is not {len(frame)} bytes")
    try:
        return np.frombuffer(frame, dtype=dtype).reshape(shape).copy()
    except ValueError as error:  # numpy's own limits, on shapes with a 0 in them
        raise WireError("array_shape", f"{name}.{field}: {shape}: {error}") from error


def registered() -> types.MappingProxyType[str, type[Any]]:
    """Every message type by name, for tests that want to try them all."""
    return types.MappingProxyType({name: codec.cls for name, codec in _codecs.items()})
