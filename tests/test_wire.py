"""The wire format against its contract: every message comes back as it was, and nothing but WireError gets out."""

import dataclasses
import math
import struct
import typing
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_rl import messages, wire
from stream_rl.errors import WireError
from stream_rl.types import ARRAY_DTYPES, Version
from stream_rl.wire import Frame, decode, encode

LIGHT = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
MEDIUM = settings(LIGHT, max_examples=120)
TYPES = {name: cls for name, cls in wire.registered().items() if cls.__module__.startswith("stream_rl.messages.")}
REASONS = {
    "frame_count",
    "header_too_long",
    "not_msgpack",
    "header_shape",
    "wire_version",
    "unknown_type",
    "array_count",
    "field_type",
    "array_shape",
    "array_too_large",
    "array_length",
}
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def dtype_of(hint: Any) -> np.dtype[Any] | None:
    return ARRAY_DTYPES.get(hint)


@st.composite
def arrays(draw: st.DrawFn, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Any shape of one to four sizes, any bits."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype).reshape(shape)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type."""
    if (dtype := dtype_of(hint)) is not None:
        return arrays(dtype)
    if hint is Version:
        return st.builds(Version, values(int), values(int))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=4)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(),
        str: st.text(max_size=12),
        bytes: st.binary(max_size=12),
    }
    return simple[hint]


def instances(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: values(hints[field.name]) for field in dataclasses.fields(cls)})


def canonical(value: Any) -> Any:
    """A form in which only what is the same bit for bit compares equal."""
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("<d", value))
    if isinstance(value, Version):
        return ("version", tuple(value))
    if isinstance(value, list):
        return [canonical(each) for each in value]
    if isinstance(value, dict):
        return {key: canonical(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return (type(value).__name__, value)


def conforms(value: Any, hint: Any) -> bool:
    if (dtype := dtype_of(hint)) is not None:
        return isinstance(value, np.ndarray) and value.dtype == dtype and value.flags.owndata
    if hint is Version:
        return type(value) is Version and all(type(each) is int for each in value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return type(value) is list and all(conforms(each, arguments[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(
            conforms(key, arguments[0]) and conforms(each, arguments[1]) for key, each in value.items()
        )
    return type(value) is hint


def assert_well_formed(message: Any) -> None:
    assert type(message) in wire.registered().values()
    for name, hint in typing.get_type_hints(type(message)).items():
        assert conforms(getattr(message, name), hint), (name, hint, getattr(message, name))


def refusal(frames: Sequence[Frame]) -> str:
    """The reason for which `frames` are refused; anything but a WireError is a failure."""
    with pytest.raises(WireError) as caught:
        decode(frames)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def taken(read: Callable[[], Any]) -> Any | None:
    """What `read` gives, or None if it is refused for a known reason."""
    try:
        return read()
    except WireError as error:
        reason = error.reason
    assert reason in REASONS
    return None


def make_chunks() -> messages.Chunks:
    return messages.Chunks(
        run="r",
        engine="engine-0",
        incarnation=1,
        sequence=2,
        rids=["r/0/0/0.", "r/0/1/0."],
        finishes=["", "stop"],
        starts=np.array([0, 4], np.int64),
        counts=np.array([2, 1], np.int32),
        token_ids=np.array([5, 6, 7], np.int32),
        logprobs=np.array([-0.5, -0.0, np.nan], np.float32),
        spans=np.array([[0, 0, 1, 2], [1, 0, 2, 1]], np.int64),
    )


def changed(change: Callable[[list[Any]], Any], message: Any = None) -> list[Frame]:
    """Frames of a message whose header went through `change`."""
    frames = encode(make_chunks() if message is None else message)
    header = msgpack.unpackb(frames[0])
    change(header)
    return [msgpack.packb(header), *frames[1:]]


def with_shape(shape: Any, frame: bytes = b"") -> list[Frame]:
    """Chunks whose first array states `shape` and brings `frame`."""
    frames = changed(lambda header: header[3].__setitem__(0, shape))
    frames[1] = frame
    return frames


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_message_type_comes_back_bit_for_bit(name: str) -> None:
    @LIGHT
    @given(instances(TYPES[name]))
    def back(message: Any) -> None:
        frames = encode(message)
        decoded = decode([bytes(frame) for frame in frames])
        assert type(decoded) is type(message)
        assert canonical(decoded) == canonical(message)
        assert_well_formed(decoded)
        assert [bytes(frame) for frame in encode(decoded)] == [bytes(frame) for frame in frames]

    back()


def test_every_declared_message_is_registered_under_its_own_name() -> None:
    declared = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type) and value.__module__.startswith(messages.__name__)
    }
    assert declared == set(TYPES)
    assert len(TYPES) > 30


def test_a_second_message_of_the_same_name_is_refused() -> None:
    class Done:
        what: str

    with pytest.raises(TypeError, match="Done"):
        wire.message(Done)


def test_messages_are_frozen_and_take_keywords_only() -> None:
    message = messages.Done(what="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.what = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        messages.Done("x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
        np.arange(24, dtype=np.uint8)[::-1],
        np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(4, 6)),
        np.empty((3, 0, 2), np.uint8),
        np.zeros(1 << 20, np.uint8),
    ],
    ids=["strided", "reversed", "fortran", "empty", "large"],
)
def test_arrays_travel_whatever_their_layout(array: np.ndarray[Any, Any]) -> None:
    version, columns = Version(0, 1), {name: [] for name in ("names", "starts", "counts", "dtypes")}
    message = messages.UpdatePart(
        run="r", base=version, target=version, anchor=True, part=0, parts=1, checksum=0, payload=array, **columns
    )
    decoded = decode([bytes(frame) for frame in encode(message)])
    assert decoded.payload.shape == array.shape
    assert np.array_equal(decoded.payload, array)


def test_a_big_endian_array_travels_by_value() -> None:
    message = messages.OpenGroup(sequence=0, group=0, task="t", members=1, prompt_ids=np.array([1, 258], ">i4"))
    assert decode([bytes(frame) for frame in encode(message)]).prompt_ids.tolist() == [1, 258]


def test_decoded_arrays_do_not_alias_the_frames() -> None:
    frames = [bytearray(frame) for frame in encode(make_chunks())]
    decoded = decode([frames[0], *(memoryview(frame) for frame in frames[1:])])
    before = canonical(decoded)
    for frame in frames:
        frame[:] = b"\xff" * len(frame)
    assert canonical(decoded) == before
    decoded.token_ids[:] = 0
    assert all(frame == b"\xff" * len(frame) for frame in frames)


def test_every_truncation_of_the_header_is_refused() -> None:
    header, *rest = encode(make_chunks())
    assert {refusal([header[:length], *rest]) for length in range(len(header))} == {"not_msgpack"}
    assert refusal([bytes(header) + b"\x00", *rest]) == "not_msgpack"


def test_every_wrong_length_of_an_array_is_refused() -> None:
    frames = [bytes(frame) for frame in encode(make_chunks())]
    for i in range(1, len(frames)):
        for wrong in (b"", frames[i][:-1], frames[i] + b"\x00", frames[i] * 2):
            assert refusal([*frames[:i], wrong, *frames[i + 1 :]]) == "array_length"


def test_missing_and_extra_frames_are_refused() -> None:
    frames = encode(make_chunks())
    assert refusal([]) == "frame_count"
    assert refusal([*frames, *[b""] * wire.MAX_FRAMES]) == "frame_count"
    assert refusal([*frames, b""]) == "array_count"
    for length in range(1, len(frames)):
        assert refusal(frames[:length]) == "array_count"


def test_a_header_longer_than_allowed_is_refused_on_both_sides() -> None:
    assert refusal([bytes(wire.MAX_HEADER_BYTES + 1)]) == "header_too_long"
    with pytest.raises(WireError) as caught:
        encode(messages.Done(what="x" * (wire.MAX_HEADER_BYTES + 1)))
    assert caught.value.reason == "header_too_long"


@pytest.mark.parametrize("version", [0, 2, -1, 2**64 - 1, "1", None, [1], math.nan, b"\x01", {"a": 1}])
def test_another_wire_version_is_refused_by_name(version: Any) -> None:
    assert refusal(changed(lambda header: header.__setitem__(0, version))) == "wire_version"


@pytest.mark.parametrize(
    "name", ["", "Chunk", "chunks", "Chunks ", "__class__", "Version", None, 7, b"Chunks", ["Chunks"], {}]
)
def test_an_unknown_type_is_refused_by_name(name: Any) -> None:
    frames = changed(lambda header: header.__setitem__(1, name))
    assert refusal(frames) == "unknown_type"
    with pytest.raises(WireError, match="no message type"):
        decode(frames)


@pytest.mark.parametrize("header", [None, 1, "x", [], [1], [1, "Done", {}], [1, "Done", {}, [], 0], {"a": 1}, b""])
def test_a_header_that_is_not_four_things_is_refused(header: Any) -> None:
    assert refusal([msgpack.packb(header)]) == "header_shape"


@pytest.mark.parametrize(
    "shape", [[-1], [2, -1], [-2, -1], [True], [2.0], [None], ["2"], [[2]], 2, None, "2", {}, [1] * 5]
)
def test_a_shape_that_is_no_list_of_sizes_is_refused(shape: Any) -> None:
    assert refusal(with_shape(shape, bytes(16))) == "array_shape"


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**63], [2**64 - 1] * 4, [2**32, 2**32], [2**31, 2**33, 1]])
def test_a_shape_whose_size_overflows_is_refused(shape: list[int]) -> None:
    assert refusal(with_shape(shape)) in {"array_shape", "array_too_large"}


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**64 - 1], [0, 2**40, 2**40], [2**62, 2**62, 0], [2**61, 0]])
def test_an_empty_array_with_impossible_sizes_is_refused(shape: list[int]) -> None:
    assert refusal(with_shape(shape)) in {"array_shape", "array_too_large"}


@pytest.mark.parametrize("shapes", [None, 5, {}, "abcde", [], [[2]] * 4, [[2]] * 6])
def test_shapes_that_do_not_match_the_declaration_are_refused(shapes: Any) -> None:
    assert refusal(changed(lambda header: header.__setitem__(3, shapes))) == "array_count"


def bombs() -> list[bytes]:
    depths = (100, 511, 513, 1025, 200_000)
    nested = [opener * depth + b"\xc0" for depth in depths for opener in (b"\x91", b"\x81\xa1a")]
    counts = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    extensions = [
        b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\xc7\x05\xff12345",
        b"\xc9\xff\xff\xff\xff\x01",
    ]
    return [*nested, *counts, *extensions, b"\xc1", b"\xa4\xff\xff\xff\xff", b"\xd9", b""]


@pytest.mark.parametrize("bomb", bombs(), ids=lambda bomb: f"{bomb[:4].hex()}x{len(bomb)}")
def test_msgpack_bombs_are_refused_wherever_they_stand(bomb: bytes) -> None:
    refusal([bomb])
    refusal([b"\x94\x01\xa4Done" + bomb + b"\x90"])
    refusal([b"\x94\x01\xa4Done\x81\xa4what" + bomb + b"\x90"])
    refusal([b"\x94\x01\xa4Done\x81\xa4what\xa1x" + bomb])
    refusal([b"\x94\x01" + bomb + b"\x81\xa4what\xa1x\x90"])
    refusal([b"\x94" + bomb + b"\xa4Done\x81\xa4what\xa1x\x90"])


@pytest.mark.parametrize("key", [1, None, b"x", 1.5, True])
def test_keys_that_are_no_strings_are_refused(key: Any) -> None:
    assert refusal([msgpack.packb([1, "Done", {"what": "x", key: 1}, []])]) in {"not_msgpack", "field_type"}
    assert refusal([msgpack.packb([1, "ActorStats", {"counters": {key: 1.0}}, []])]) in {"not_msgpack", "field_type"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", None),
        ("run", 3),
        ("run", b"r"),
        ("incarnation", "1"),
        ("incarnation", 1.5),
        ("incarnation", True),
        ("incarnation", math.nan),
        ("incarnation", math.inf),
        ("sequence", [2]),
        ("rids", "r/0/0/0."),
        ("rids", [1]),
        ("rids", {"a": "b"}),
        ("finishes", [None]),
        ("unheard", 1),
    ],
)
def test_a_field_of_another_type_is_refused(field: str, value: Any) -> None:
    assert refusal(changed(lambda header: header[2].__setitem__(field, value))) == "field_type"


@pytest.mark.parametrize(
    "version", [None, 3, "0.3", [], [0], [0, 1, 2], [0, "1"], [0, math.nan], {"history": 0, "step": 1}]
)
def test_a_version_that_is_no_pair_of_integers_is_refused(version: Any) -> None:
    frames = changed(
        lambda header: header[2].__setitem__("target", version), messages.VersionTaken(target=Version(0, 1))
    )
    assert refusal(frames) == "field_type"


@pytest.mark.parametrize("fields", [None, 1, "x", [], ["r", "x"], {}])
def test_fields_that_are_missing_are_refused(fields: Any) -> None:
    assert refusal(changed(lambda header: header.__setitem__(2, fields))) == "field_type"


def test_a_field_with_a_default_may_be_missing_and_gets_a_fresh_default() -> None:
    fields = {"sequence": 0, "group": 1, "member": 2, "status": "done"}
    first, second = (decode([msgpack.packb([1, "CloseTrajectory", fields, []])]) for _ in range(2))
    assert first.reward == 0.0 and first.reward_parts == {}
    assert first.reward_parts is not second.reward_parts


@MEDIUM
@given(data=st.data())
def test_any_plain_value_in_any_place_is_taken_at_its_declared_type_or_refused(data: st.DataObject) -> None:
    cls = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    frames = [bytes(frame) for frame in encode(data.draw(instances(cls)))]
    header = msgpack.unpackb(frames[0])
    slot = data.draw(st.integers(0, 3))
    value = data.draw(PLAIN)
    if slot == 2 and header[2] and data.draw(st.booleans()):
        header[2][data.draw(st.sampled_from(sorted(header[2])))] = value
    elif slot == 3 and header[3]:
        header[3][data.draw(st.integers(0, len(header[3]) - 1))] = value
    else:
        header[slot] = value
    message = taken(lambda: decode([msgpack.packb(header), *frames[1:]]))
    if message is not None:
        assert_well_formed(message)


@MEDIUM
@given(st.lists(st.binary(max_size=64), max_size=5))
def test_random_bytes_are_refused(frames: list[bytes]) -> None:
    refusal(frames)


@MEDIUM
@given(data=st.data())
def test_flipped_bytes_are_refused_or_still_make_a_well_formed_message(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(make_chunks())]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    message = taken(lambda: decode(frames))
    if message is not None:
        assert_well_formed(message)


@MEDIUM
@given(st.lists(st.integers(0, 2**64 - 1), max_size=5), st.binary(max_size=32))
def test_any_shape_is_taken_or_refused(shape: list[int], frame: bytes) -> None:
    message = taken(lambda: decode(with_shape(shape, frame)))
    if message is not None:
        assert message.starts.shape == tuple(shape) and message.starts.nbytes == len(frame)
