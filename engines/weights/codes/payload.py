"""The changes of many tensors as one run of bytes.

    format, code, number of tensors, number of frames      numbers of 7 bits a byte
    form of each tensor                                    a byte: dense or sparse
    size of each frame                                     numbers of 7 bits a byte
    frames                                                 one after the other

`fast` has a frame for each sparse tensor, `small` one for each chunk of them (see `chunks`).  After them each dense
tensor has one: all its new bits.  A tensor is dense where that is smaller.  Frames are independent of each other.

Names, dtypes and shapes are not in here: the message around it has them, and the receiver knows them anyway.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from engines.weights.codes import chunks, fast, small
from engines.weights.codes.bitstreams import Reader, Writer
from engines.weights.codes.changes import MANTISSA, Change, Each, Frame, Known
from engines.weights.codes.ulp import SparseDelta, apply_, compose, diff
from engines.weights.fingerprint import bits_from_bytes
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray

FORMAT = 1


class Code(IntEnum):
    FAST = 1
    SMALL = 2


class Form(IntEnum):
    DENSE = 0
    SPARSE = 1


@dataclass(frozen=True, slots=True)
class Contents:
    """What a payload says of itself."""

    code: Code
    forms: list[Form]
    """Of each tensor."""
    frames: list[ByteArray]


def encode(changes: Sequence[Change], code: Code, each: Each = map) -> ByteArray:
    """The bytes for `changes`, in this order."""
    forms, frames = (_fast if code is Code.FAST else _small)(changes, each)
    for change, form in zip(changes, forms, strict=True):
        if form is Form.DENSE:
            if change.new is None:
                raise WeightsError(f"a change of {change.dtype} can only be dense, and the new bits are not here")
            frames.append([change.new.cpu().numpy().view(np.uint8)])
    writer = Writer()
    writer.numbers(FORMAT, code, len(forms), len(frames), *forms)
    writer.numbers(*(sum(piece.size for piece in frame) for frame in frames))
    return np.concatenate([*writer.pieces, *(piece for frame in frames for piece in frame)])


def contents(payload: ByteArray) -> Contents:
    """Raises WeightsError for anything that is no payload."""
    reader = Reader(payload)
    if (version := reader.number()) != FORMAT:
        raise WeightsError(f"the payload has format {version}, this end knows {FORMAT}")
    if (code := reader.number()) not in list(Code):
        raise WeightsError(f"the payload has code {code}, this end knows {[int(known) for known in Code]}")
    num_tensors, num_frames = reader.number(), reader.number()
    if num_tensors + num_frames > payload.size:
        raise WeightsError(f"{payload.size} bytes cannot be {num_tensors} tensors in {num_frames} frames")
    forms = reader.array(num_tensors, "u1")
    if forms.max(initial=0) > max(Form):
        raise WeightsError(f"a tensor has form {forms.max()}, this end knows {[int(known) for known in Form]}")
    sizes = [reader.number() for _ in range(num_frames)]
    frames = [reader.take(size) for size in sizes]
    reader.end()
    return Contents(Code(code), [Form(form) for form in forms.tolist()], frames)


def decode(payload: ByteArray, tensors: Sequence[Known], each: Each = map) -> list[SparseDelta | torch.Tensor]:
    """For each of `tensors`, in the order in which they were encoded, the difference, or all its new bits.

    Raises WeightsError for bytes that `encode` cannot have made of such tensors, or made from other old bits.
    """
    found = contents(payload)
    if len(found.forms) != len(tensors):
        raise WeightsError(f"the payload has {len(found.forms)} tensors, expected {len(tensors)}")
    sparse = [tensor for tensor, form in zip(tensors, found.forms, strict=True) if form is Form.SPARSE]
    for tensor in sparse:
        if tensor.dtype not in MANTISSA:
            raise WeightsError(f"{tensor.dtype} has no sparse form")
    num_sparse = len(sparse) if found.code is Code.FAST else chunks.num_frames(sparse)
    if len(found.frames) != num_sparse + len(tensors) - len(sparse):
        raise WeightsError(
            f"expected {num_sparse} sparse and {len(tensors) - len(sparse)} dense frames, got {len(found.frames)}"
        )
    if found.code is Code.FAST:
        deltas = iter(_fast_deltas(found.frames[:num_sparse], sparse))
    else:
        deltas = iter(chunks.decode(found.frames[:num_sparse], sparse, each))
    dense = iter(found.frames[num_sparse:])
    return [
        next(deltas) if form is Form.SPARSE else _dense_bits(next(dense), tensor)
        for tensor, form in zip(tensors, found.forms, strict=True)
    ]


def prepare() -> None:
    """Load and compile everything, which takes seconds the first time on a machine: at a process's start, before
    anybody waits for it."""
    for dtype, integers in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        old = torch.zeros(100, dtype=integers)
        new = torch.arange(100, dtype=integers)
        delta = diff(old, new)
        for code in Code:
            decode(encode([Change(dtype, delta, old)], code), [Known(dtype, old.numel(), old)])
        apply_(old, compose(delta, diff(new, new)))


def _fast(changes: Sequence[Change], each: Each) -> tuple[list[Form], list[Frame]]:
    """Form of each tensor, and the frames of those that are sparse."""
    coded = iter(each(fast.encode, [change.delta for change in changes if change.delta is not None]))
    frames = [[] if change.delta is None else next(coded) for change in changes]
    forms = [_form(change, _size([frame])) for change, frame in zip(changes, frames, strict=True)]
    return forms, [frame for frame, form in zip(frames, forms, strict=True) if form is Form.SPARSE]


def _small(changes: Sequence[Change], each: Each) -> tuple[list[Form], list[Frame]]:
    """The same.  What a tensor takes is estimated; that all of them take less than dense ones is made sure of."""
    forms = [_form(change, 0 if change.delta is None else _small_size(change.delta)) for change in changes]
    sparse = [change for change, form in zip(changes, forms, strict=True) if form is Form.SPARSE]
    frames = chunks.encode(sparse, each)
    as_dense = sum(change.sparse.elements * change.dtype.itemsize for change in sparse)
    if _size(frames) >= as_dense and all(change.new is not None for change in sparse):
        return [Form.DENSE for _ in changes], []
    return forms, frames


def _form(change: Change, size: float) -> Form:
    """`size`: bytes that the tensor takes if it is sparse."""
    if change.delta is None or (change.new is not None and size >= change.delta.elements * change.dtype.itemsize):
        return Form.DENSE
    return Form.SPARSE


def _small_size(delta: SparseDelta) -> float:
    """About, in bytes.  A quarter of the elements take less than all of them, whatever their steps."""
    if delta.changed * 4 <= delta.elements:
        return 0
    return small.expected_bits(delta.elements, delta.steps.numpy()) / 8


def _size(frames: list[Frame]) -> int:
    return sum(piece.size for frame in frames for piece in frame)


def _fast_deltas(frames: list[ByteArray], tensors: Sequence[Known]) -> list[SparseDelta]:
    """Frames of one width that follow each other are read at once: mostly all of them."""
    deltas: list[SparseDelta] = []
    for width, run in itertools.groupby(zip(frames, tensors, strict=True), lambda pair: pair[1].dtype.itemsize):
        some, of = zip(*run, strict=True)
        ends = np.cumsum([frame.size for frame in some], dtype=np.int64)
        elements = np.array([tensor.elements for tensor in of], np.int64)
        dtype = torch.int16 if width == 2 else torch.int32
        deltas += fast.decode_frames(_joined(some), ends, elements, dtype)
    return deltas


def _joined(frames: Sequence[ByteArray]) -> ByteArray:
    """Neighbours in one payload as one, without a copy."""
    first = next((frame for frame in frames if frame.size), frames[0])  # numpy says of an empty one that it begins at 0
    return np.lib.stride_tricks.as_strided(first, (sum(frame.size for frame in frames),), (1,))


def _dense_bits(frame: ByteArray, tensor: Known) -> torch.Tensor:
    if frame.size != tensor.elements * tensor.dtype.itemsize:
        raise WeightsError(f"{tensor.elements} x {tensor.dtype} cannot be {frame.size} bytes")
    return bits_from_bytes(frame.copy(), tensor.dtype)
