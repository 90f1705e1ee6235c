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
from engines.weights.codes.changes import MANTISSA, Change, Each, Frame, Known, Run
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


_FORMS = list(Form)


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
    code = _code(reader)
    num_tensors, num_frames = reader.number(), reader.number()
    if num_tensors + num_frames > payload.size:
        raise WeightsError(f"{payload.size} bytes cannot be {num_tensors} tensors in {num_frames} frames")
    forms = reader.array(num_tensors, "u1")
    if forms.max(initial=0) > max(Form):
        raise WeightsError(f"a tensor has form {forms.max()}, this end knows {[int(known) for known in Form]}")
    frames = [reader.take(size) for size in reader.numbers(num_frames)]
    reader.end()
    return Contents(code, [_FORMS[form] for form in forms.tolist()], frames)


def code_of(payload: ByteArray) -> Code:
    """Raises WeightsError for anything that does not begin as a payload."""
    return _code(Reader(payload))


def _code(reader: Reader) -> Code:
    if (version := reader.number()) != FORMAT:
        raise WeightsError(f"the payload has format {version}, this end knows {FORMAT}")
    if (code := reader.number()) not in list(Code):
        raise WeightsError(f"the payload has code {code}, this end knows {[int(known) for known in Code]}")
    return Code(code)


def decode(payload: ByteArray, tensors: Sequence[Known], each: Each = map) -> list[SparseDelta | torch.Tensor]:
    """For each of `tensors`, in the order in which they were encoded, the difference, or all its new bits.

    Raises WeightsError for bytes that `encode` cannot have made of such tensors, or made from other old bits.
    """
    runs, dense = decode_runs(payload, tensors, each)
    found: dict[int, SparseDelta | torch.Tensor] = dict(dense)
    for run in runs:
        found.update(zip(run.tensors, run.deltas(tensors[i].elements for i in run.tensors), strict=True))
    return [found[i] for i in range(len(tensors))]


def decode_runs(
    payload: ByteArray, tensors: Sequence[Known], each: Each = map
) -> tuple[list[Run], dict[int, torch.Tensor]]:
    """The same with as few objects as can be: the differences, a run for all neighbours of one width, and the new bits
    of dense tensors by their number."""
    found = contents(payload)
    if len(found.forms) != len(tensors):
        raise WeightsError(f"the payload has {len(found.forms)} tensors, expected {len(tensors)}")
    sparse = [i for i, form in enumerate(found.forms) if form is Form.SPARSE]
    dense = [i for i, form in enumerate(found.forms) if form is Form.DENSE]
    if unknown := {tensors[i].dtype for i in sparse} - MANTISSA.keys():
        raise WeightsError(f"{unknown.pop()} has no sparse form")
    of_small = [tensors[i] for i in sparse] if found.code is Code.SMALL else []
    num_sparse = chunks.num_frames(of_small) if of_small else len(sparse)
    if len(found.frames) != num_sparse + len(dense):
        raise WeightsError(f"expected {num_sparse} sparse and {len(dense)} dense frames, got {len(found.frames)}")
    bits = {i: _dense_bits(frame, tensors[i]) for i, frame in zip(dense, found.frames[num_sparse:], strict=True)}
    if of_small:
        return _small_runs(sparse, chunks.decode(found.frames[:num_sparse], of_small, each)), bits
    return _fast_runs(found.frames[:num_sparse], sparse, tensors), bits


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


def _fast_runs(frames: list[ByteArray], numbers: list[int], tensors: Sequence[Known]) -> list[Run]:
    """Frames of one width that follow each other are read at once: mostly all of them."""
    runs = []
    for width, of in itertools.groupby(range(len(numbers)), lambda at: tensors[numbers[at]].dtype.itemsize):
        some = list(of)
        here, chosen = frames[some[0] : some[-1] + 1], numbers[some[0] : some[-1] + 1]
        ends = np.cumsum([frame.size for frame in here], dtype=np.int64)
        elements = np.array([tensors[i].elements for i in chosen], np.int64)
        runs.append(Run(chosen, *fast.decode_frames(_joined(here), ends, elements, width)))
    return runs


def _small_runs(numbers: list[int], deltas: list[SparseDelta]) -> list[Run]:
    runs = []
    for _, of in itertools.groupby(zip(numbers, deltas, strict=True), lambda pair: pair[1].steps.dtype):
        some, found = zip(*of, strict=True)
        counts = np.array([delta.changed for delta in found], np.int64)
        indices, steps = (torch.cat([getattr(delta, name) for delta in found]) for name in ("indices", "steps"))
        runs.append(Run(list(some), counts, indices.numpy(), steps.numpy()))
    return runs


def _joined(frames: Sequence[ByteArray]) -> ByteArray:
    """Neighbours in one payload as one, without a copy."""
    first = next((frame for frame in frames if frame.size), frames[0])  # numpy says of an empty one that it begins at 0
    return np.lib.stride_tricks.as_strided(first, (sum(frame.size for frame in frames),), (1,))


def _dense_bits(frame: ByteArray, tensor: Known) -> torch.Tensor:
    if frame.size != tensor.elements * tensor.dtype.itemsize:
        raise WeightsError(f"{tensor.elements} x {tensor.dtype} cannot be {frame.size} bytes")
    return bits_from_bytes(frame.copy(), tensor.dtype)
