"""The queue's state as bytes and back, without running anyone's code.

A graph of plain values, containers, arrays and objects of our own classes becomes one msgpack document: a table with
an entry for everything that has an identity, and references into it.  So shared things stay shared, cycles are no
matter, and nothing recurses however the graph is linked; only tuples, frozensets and the like nest in place.

Loading makes every object by `cls.__new__`, never by a constructor, and only of classes that were allowed by name.
Whatever is wrong with the bytes raises SnapshotError; they cannot make it allocate more than a small multiple of
themselves.
"""

import contextlib
import enum
import gc
import importlib
import inspect
import operator
import pkgutil
import reprlib
import types
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import msgspec
import numpy as np

import queues
from stream_rl import config, messages, wire
from stream_rl import types as nouns
from stream_rl.errors import StreamRLError
from stream_rl.metrics import Histogram

FORMAT = b"stream_rl snapshot 3\n"
_HEAD_BYTES = len(FORMAT) + 4
_NOT_STATE = ("process", "journal", "database", "snapshot")
"""Modules of the queue that are shell around the state."""

# What has no identity is written in place: [code, ...].
_REFERENCE, _TUPLE, _FROZENSET, _LONG, _NAMED, _ENUM = range(6)
# What has one is an entry of the table: [code, ...].
_OBJECT, _LIST, _DICT, _COUNTER, _SET, _DEQUE, _BYTEARRAY, _ARRAY, _NUMPY = range(9)

_PLAIN = frozenset({type(None), bool, float, str, bytes})
"""Written as they are; ints too, but those of more than 64 bits."""
_ATOMS = _PLAIN | {int}
_CONTAINERS = frozenset({list, dict, Counter, set, deque, bytearray, array, np.ndarray})
_TYPECODES = "bBhHiIlLqQfd"
_DTYPES = {np.dtype(code): np.dtype(code).name for code in "?bBhHiIqQefd"}
_NAMED_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class SnapshotError(StreamRLError, ValueError):
    """State that cannot be written, or bytes that are no snapshot of ours."""


@cache
def classes() -> Mapping[str, type[Any]]:
    """The classes whose objects may be part of the state, by name: those of the queue's modules, every message, and
    the words and settings of stream_rl.  A class that is new in one of these modules is in it by itself."""
    names = [module.name for module in pkgutil.iter_modules(queues.__path__) if module.name not in _NOT_STATE]
    modules = [importlib.import_module(f"{queues.__name__}.{name}") for name in names]
    assert messages.Hello in wire.registered().values()
    found: list[type[Any]] = [Histogram, *wire.registered().values()]
    for module in [*modules, config, nouns]:
        found += [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    return types.MappingProxyType({_name(cls): cls for cls in found if _is_simple(cls)})


def dump(root: object, allowed: Mapping[str, type[Any]] | None = None) -> bytes:
    """`root` and everything that it reaches.  A class may name attributes to leave out in `TRANSIENT`.

    Raises SnapshotError with the path to a thing that cannot be written.
    """
    allowed = classes() if allowed is None else allowed
    try:
        with _no_collection():
            try:
                payload = msgspec.msgpack.encode(_Dump(allowed, _ATOMS).document(root))
            except OverflowError:  # an int of more than 64 bits, somewhere: take them one by one
                payload = msgspec.msgpack.encode(_Dump(allowed, _PLAIN).document(root))
    except (ValueError, TypeError, RecursionError) as error:  # a lone surrogate, 4 GiB in one string
        raise SnapshotError(f"the state of {type(root).__name__} cannot be written: {error}") from error
    return b"".join((FORMAT, zlib.crc32(payload).to_bytes(4, "little"), payload))


def load(data: bytes, allowed: Mapping[str, type[Any]] | None = None) -> Any:
    """What `dump` was given, built anew; attributes in TRANSIENT are not there.

    Raises SnapshotError for anything that `dump` did not make.
    """
    if data[: len(FORMAT)] != FORMAT:
        raise SnapshotError(f"expected a snapshot that starts with {FORMAT!r}, got {bytes(data[: len(FORMAT)])!r}")
    payload = memoryview(data)[_HEAD_BYTES:]
    if zlib.crc32(payload).to_bytes(4, "little") != data[len(FORMAT) : _HEAD_BYTES]:
        raise SnapshotError(f"the snapshot of {len(data)} bytes is torn: its checksum does not fit")
    try:
        with _no_collection():
            return _Load(classes() if allowed is None else allowed).document(msgspec.msgpack.decode(payload))
    except SnapshotError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise SnapshotError(f"the snapshot is malformed: {type(error).__name__}: {str(error)[:200]}") from error
    except RecursionError as error:
        raise SnapshotError("the snapshot is malformed: nested too deeply") from error


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Half of the time went into looking for cycles among hundreds of thousands of lists that are all in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- classes -------------------------------------------------------------------------------------------------------


def _name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_named_tuple(cls: type[Any]) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _is_simple(cls: type[Any]) -> bool:
    """An enum, a NamedTuple, or a class whose objects are their attributes."""
    return issubclass(cls, enum.Enum) or _is_named_tuple(cls) or getattr(cls, "__new__") is object.__new__  # noqa: B009


def _slots(cls: type[Any]) -> tuple[str, ...]:
    """Attributes in slots, those of its bases first."""
    found: list[str] = []
    for base in reversed(cls.__mro__):
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            private = slot.startswith("__") and not slot.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{slot}" if private else slot)
    transient = ("__dict__", "__weakref__", *getattr(cls, "TRANSIENT", ()))
    return tuple(name for name in found if name not in transient)


def _attributes(thing: Any) -> dict[str, Any]:
    """What an object holds by name, without what is transient."""
    held = {name: getattr(thing, name) for name in _slots(type(thing)) if hasattr(thing, name)}
    if hasattr(thing, "__dict__"):
        transient = getattr(thing, "TRANSIENT", ())
        held |= {name: value for name, value in thing.__dict__.items() if name not in transient}
    return held


# -- to bytes ------------------------------------------------------------------------------------------------------


class _Dump:
    def __init__(self, allowed: Mapping[str, type[Any]], as_it_is: frozenset[type[Any]]) -> None:
        self._as_it_is = as_it_is
        self._classes = {cls: name for name, cls in allowed.items()}
        self._layouts: dict[tuple[type[Any], tuple[str, ...]], int] = {}
        self._whole: dict[type[Any], tuple[int, Callable[[Any], tuple[Any, ...]]]] = {}
        """Layouts of classes with several slots and nothing else, and what gets all of them."""
        self._numbers: dict[int, int] = {}
        """Place in the table by id()."""
        self._things: list[Any] = []
        self._parents: list[int] = []
        """By place: that of the thing through which it was reached first."""
        self._current = -1
        self._hashed_early = False

    def document(self, root: object) -> list[Any]:
        try:
            start = self._value(root)
            table = []
            for place, thing in enumerate(self._things):  # grows while it is walked
                self._current = place
                table.append(self._entry(thing))
        except RecursionError as error:
            raise SnapshotError(f"{self._path()} is nested too deeply") from error
        layouts = [[self._classes[cls], *names] for cls, names in self._layouts]
        return [layouts, table, start]

    def _value(self, value: Any) -> Any:
        kind, as_it_is = type(value), self._as_it_is
        if kind in as_it_is:
            return value
        if kind is int:
            return value if -(1 << 63) <= value < 1 << 64 else [_LONG, f"{value:x}"]
        if kind is tuple:
            return [_TUPLE, *[v if type(v) in as_it_is else self._value(v) for v in value]]
        if kind in _CONTAINERS:
            return [_REFERENCE, self._number(value)]
        if kind is frozenset:
            return [_FROZENSET, *self._members(value)]
        if kind not in self._classes:
            raise SnapshotError(f"{self._path(value)} is a {_name(kind)}, which cannot be part of a snapshot")
        if issubclass(kind, enum.Enum):
            return [_ENUM, self._layout(kind, ()), self._value(value.value)]
        if issubclass(kind, tuple):
            return [_NAMED, self._layout(kind, ()), *[self._value(v) for v in value]]
        if self._hashed_early and getattr(kind, "__hash__") is not object.__hash__:  # noqa: B009
            raise SnapshotError(
                f"{self._path(value)} is a {_name(kind)} in a frozenset: it would be hashed before it has its "
                "attributes; keep it in a set or a tuple"
            )
        return [_REFERENCE, self._number(value)]

    def _members(self, value: frozenset[Any]) -> list[Any]:
        before, self._hashed_early = self._hashed_early, True
        members = [self._value(v) for v in value]
        self._hashed_early = before
        return members

    def _number(self, thing: Any) -> int:
        number = self._numbers.get(id(thing))
        if number is None:
            number = self._numbers[id(thing)] = len(self._things)
            self._things.append(thing)
            self._parents.append(self._current)
        return number

    def _entry(self, thing: Any) -> list[Any]:
        value, kind, as_it_is = self._value, type(thing), self._as_it_is
        if kind is list:
            return [_LIST, *[v if type(v) in as_it_is else value(v) for v in thing]]
        if kind is bytearray:
            return [_BYTEARRAY, thing]
        if kind is dict or kind is Counter:
            pairs = [v if type(v) in as_it_is else value(v) for pair in thing.items() for v in pair]
            return [_DICT if kind is dict else _COUNTER, *pairs]
        if kind is set:
            return [_SET, *[value(v) for v in thing]]
        if kind is deque:
            return [_DEQUE, thing.maxlen, *[value(v) for v in thing]]
        if kind is array:
            if thing.typecode not in _TYPECODES:
                raise SnapshotError(f"{self._path()} is an array of {thing.typecode!r}, expected one of {_TYPECODES}")
            return [_ARRAY, thing.typecode, thing.tobytes()]
        if kind is np.ndarray:
            if thing.dtype not in _DTYPES:
                raise SnapshotError(f"{self._path()} is an array of {thing.dtype}, expected one of {[*_NAMED_DTYPES]}")
            return [_NUMPY, _DTYPES[thing.dtype], thing.shape, thing.tobytes()]
        layout, attributes = self._object(thing, kind)
        return [_OBJECT, layout, *[v if type(v) in as_it_is else value(v) for v in attributes]]

    def _object(self, thing: Any, kind: type[Any]) -> tuple[int, Iterable[Any]]:
        if (whole := self._whole.get(kind)) is not None:
            with contextlib.suppress(AttributeError):  # one that is not set
                return whole[0], whole[1](thing)
        held = _attributes(thing)
        names = tuple(held)
        layout = self._layout(kind, names)
        if kind.__dictoffset__ == 0 and len(names) > 1 and names == _slots(kind):
            self._whole[kind] = layout, operator.attrgetter(*names)
        return layout, held.values()

    def _layout(self, cls: type[Any], names: tuple[str, ...]) -> int:
        return self._layouts.setdefault((cls, names), len(self._layouts))

    # -- where it is -------------------------------------------------------------------------------------------

    def _path(self, *leaf: Any) -> str:
        """From the root to what is being written, or to `leaf` in it."""
        words: list[str] = []
        child: Any = leaf[0] if leaf else None
        place = self._current
        if not leaf and place >= 0:
            child, place = self._things[place], self._parents[place]
        while place >= 0:
            parent = self._things[place]
            words.append(next(_labels_of(child, _items(parent)), "?"))
            child, place = parent, self._parents[place]
        root = self._things[0] if self._things else child
        return type(root).__name__ + "".join(reversed(words))


def _items(thing: Any) -> Iterator[tuple[str, Any]]:
    """Everything directly inside a thing, with how one would write the way to it."""
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", value) for key, value in thing.items())
        yield from ((f" key {number}", key) for number, key in enumerate(thing))
    elif isinstance(thing, (list, tuple, deque, set, frozenset)):
        yield from ((f"[{number}]", value) for number, value in enumerate(thing))
    else:
        yield from ((f".{name}", value) for name, value in _attributes(thing).items())


def _labels_of(child: Any, items: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for label, value in items:
        if value is child:
            yield label
        elif isinstance(value, (tuple, frozenset)):
            yield from (label + inner for inner in _labels_of(child, _items(value)))


# -- from bytes ----------------------------------------------------------------------------------------------------


class _Load:
    def __init__(self, allowed: Mapping[str, type[Any]]) -> None:
        self._allowed = allowed
        self._layouts: list[tuple[type[Any], tuple[str, ...], bool]] = []
        """Class, attributes, and whether these are all in its __dict__."""
        self._things: list[Any] = []

    def document(self, document: Any) -> Any:
        """Every thing is made empty, then filled, so that references may go anywhere.  Objects are filled before what
        hashes them: dicts and sets come last."""
        layouts, table, start = document
        self._layouts = [self._layout(*layout) for layout in layouts]
        self._things = [self._empty(*_expect(list, entry)) for entry in table]
        later = []
        for thing, entry in zip(self._things, table, strict=True):
            if entry[0] == _OBJECT:
                self._fill(thing, entry)
            elif (fill := _FILL.get(entry[0])) is not None:
                later.append((fill, thing, entry))
        value = self._value
        for fill, thing, entry in later:
            fill(thing, [v if type(v) in _ATOMS else value(v) for v in entry[1:]])
        return value(start)

    def _layout(self, name: Any, *names: Any) -> tuple[type[Any], tuple[str, ...], bool]:
        cls = self._allowed.get(name) if isinstance(name, str) else None
        if cls is None:
            raise SnapshotError(f"the snapshot holds a {reprlib.repr(name)}, which this program does not know")
        if wrong := [name for name in names if not isinstance(name, str) or name.startswith("__")]:
            raise SnapshotError(f"the snapshot's {_name(cls)} has attributes named {reprlib.repr(wrong)}")
        slots = _slots(cls)
        if cls.__dictoffset__ == 0 and (unknown := set(names) - set(slots)):
            raise SnapshotError(f"the snapshot's {_name(cls)} has {reprlib.repr(sorted(unknown))}, not {slots}")
        return cls, names, not slots

    def _at(self, number: Any) -> tuple[type[Any], tuple[str, ...], bool]:
        if type(number) is not int or number < 0:
            raise SnapshotError(f"expected the number of a class, got {reprlib.repr(number)}")
        return self._layouts[number]

    def _empty(self, code: Any, *content: Any) -> Any:
        if code == _OBJECT:
            cls, names, _ = self._at(content[0])
            if issubclass(cls, (tuple, enum.Enum)) or len(names) != len(content) - 1:
                raise SnapshotError(f"an entry of {_name(cls)} has {len(content) - 1} values, expected {len(names)}")
            return object.__new__(cls)
        if code == _DEQUE:
            return deque(maxlen=content[0])
        if code == _BYTEARRAY:
            return bytearray(_expect(bytes, *content))
        if code == _ARRAY:
            typecode, data = content
            return array(_expect(str, typecode), _expect(bytes, data))
        if code == _NUMPY:
            name, shape, data = content
            flat = np.frombuffer(bytearray(_expect(bytes, data)), dtype=_NAMED_DTYPES[name])
            return flat.reshape([_expect(int, size) for size in shape])
        return _EMPTY[code]()

    def _fill(self, thing: Any, entry: list[Any]) -> None:
        _, names, in_dict = self._at(entry[1])
        value = self._value
        values = [v if type(v) in _ATOMS else value(v) for v in entry[2:]]
        if in_dict:
            thing.__dict__.update(zip(names, values, strict=True))
            return
        for name, held in zip(names, values, strict=True):
            object.__setattr__(thing, name, held)  # frozen dataclasses refuse their own

    def _value(self, encoded: Any) -> Any:
        if type(encoded) in _ATOMS:
            return encoded
        code, *content = _expect(list, encoded)
        if code == _REFERENCE:
            [number] = content
            if type(number) is not int or number < 0:
                raise SnapshotError(f"expected a place in the table, got {reprlib.repr(number)}")
            return self._things[number]
        if code == _TUPLE:
            return tuple([v if type(v) in _ATOMS else self._value(v) for v in content])
        if code == _FROZENSET:
            return frozenset([self._value(v) for v in content])
        if code == _LONG:
            return int(_expect(str, *content), 16)
        if code not in (_NAMED, _ENUM):
            raise SnapshotError(f"expected a value, got code {reprlib.repr(code)}")
        cls, _, _ = self._at(content[0])
        values = [self._value(v) for v in content[1:]]
        if code == _ENUM and issubclass(cls, enum.Enum):
            return cls._value2member_map_[values[0]]
        if code == _NAMED and _is_named_tuple(cls) and len(values) == len(cls._fields):
            return tuple.__new__(cls, values)
        raise SnapshotError(f"{reprlib.repr(values)} is no {_name(cls)}")


def _expect(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise SnapshotError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _fill_dict(thing: dict[Any, Any], values: list[Any]) -> None:
    dict.update(thing, zip(values[::2], values[1::2], strict=True))


def _fill_deque(thing: deque[Any], values: list[Any]) -> None:
    thing.extend(values[1:])


_EMPTY: dict[int, Callable[[], Any]] = {_LIST: list, _DICT: dict, _COUNTER: Counter, _SET: set}
_FILL: dict[int, Callable[[Any, list[Any]], None]] = {
    _LIST: list.extend,
    _DICT: _fill_dict,
    _COUNTER: _fill_dict,
    _SET: set.update,
    _DEQUE: _fill_deque,
}
