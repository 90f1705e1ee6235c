"""The small code and payloads of many tensors: near the bound, only on the right base, and nothing but WeightsError for
bytes that they cannot have made."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from weights_builders import random_bits

from engines.weights.codes import chunks, payload, small, specimens, ulp
from engines.weights.codes.bitstreams import Reader, Writer, best_parameter
from engines.weights.codes.changes import Change, Known
from engines.weights.codes.payload import Code, Form
from engines.weights.codes.ulp import SparseDelta
from scripts.bench import codec as bench
from scripts.bench.codec_rates import rates
from scripts.bench.codec_sizes import bounds, sizes
from stream_rl.errors import ConfigError, WeightsError
from stream_rl.types import ByteArray

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([0, 1, 2, 63, 65, 1000, 5000])
SHARES = st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0])
Pair = tuple[torch.Tensor, torch.Tensor]


def pair_of(seed: int, dtype: torch.dtype, elements: int, share: float) -> Pair:
    """Bits before and after, of every kind; most changes are of a step or a few."""
    rng = np.random.default_rng(seed)
    old = random_bits(rng, dtype, elements)
    near = ulp.stepped(
        old, torch.from_numpy(rng.geometric(0.6, elements) * rng.choice([-1, 1], elements)).to(old.dtype)
    )
    moved = torch.where(torch.from_numpy(rng.random(elements) < 0.95), near, random_bits(rng, dtype, elements))
    return old, torch.where(torch.from_numpy(rng.random(elements) < share), moved, old)


def change_of(pair: Pair, dtype: torch.dtype) -> Change:
    return Change(dtype, ulp.diff(*pair), *pair)


def known_of(pair: Pair, dtype: torch.dtype) -> Known:
    return Known(dtype, pair[0].numel(), pair[0])


def after(old: torch.Tensor, result: SparseDelta | torch.Tensor) -> torch.Tensor:
    return ulp.apply_(old.clone(), result) if isinstance(result, SparseDelta) else result


def one_frame(pair: Pair, mantissa: int = 7) -> ByteArray:
    delta = ulp.diff(*pair)
    return np.concatenate(small.encode(pair[0].numpy(), delta.indices.numpy(), delta.steps.numpy(), mantissa))


# -- numbers and Rice's code -----------------------------------------------------------------------------------------


def written(writer: Writer) -> ByteArray:
    return np.concatenate([np.empty(0, np.uint8), *writer.pieces])


@LIGHT
@given(st.lists(st.integers(0, 2**62)))
def test_whole_numbers_come_back(values: list[int]) -> None:
    writer = Writer()
    writer.numbers(*values)
    reader = Reader(written(writer))
    assert [reader.number() for _ in values] == values
    reader.end()


@LIGHT
@given(SEEDS, st.integers(0, 300), st.integers(0, 12))
def test_values_in_rices_code_come_back_and_take_what_it_says(seed: int, count: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    parameters = rng.integers(0, most + 1, count)
    values = rng.geometric(0.3, count) - 1 << parameters
    writer = Writer()
    writer.rice(values, parameters)
    code = written(writer)
    reader = Reader(code)
    assert np.array_equal(reader.rice(parameters, values + 1), values)
    reader.end()
    bits = int(((values >> parameters) + 1 + parameters).sum())
    assert code.size <= bits / 8 + 2 + 1 + most
    if count:
        with pytest.raises(WeightsError, match="beyond"):
            Reader(code).rice(parameters, np.where(np.arange(count) == count - 1, values, values + 1))


def test_bits_after_the_last_value_are_refused() -> None:
    one = np.zeros(1, np.int64)
    for code, says in (([1, 0], None), ([2, 0, 0], "beyond the last"), ([1, 255], "1 values were promised")):
        reader = Reader(np.array(code, np.uint8))
        if says is None:
            assert reader.rice(one, one + 1).tolist() == [0]
        else:
            with pytest.raises(WeightsError, match=says):
                reader.rice(one, one + 1)
    with pytest.raises(WeightsError, match="beyond the last"):
        Reader(np.array([2], np.uint8)).bits(1)


def test_the_best_parameter_is_found() -> None:
    rng = np.random.default_rng(0)
    for mean in (0.1, 1, 5, 70, 1000, 50_000):
        values = rng.geometric(1 / (1 + mean), 2000) - 1
        cost = [int((values >> k).sum()) + k * values.size for k in range(30)]
        assert cost[best_parameter(values)] == min(cost)
    assert best_parameter(np.empty(0, np.int64)) == 0


# -- one frame -------------------------------------------------------------------------------------------------------


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), SIZES, SHARES)
def test_a_frame_leads_from_old_to_new_bit_for_bit(seed: int, dtype: torch.dtype, elements: int, share: float) -> None:
    old, new = pair_of(seed, dtype, elements, share)
    mantissa = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    frame = one_frame((old, new), mantissa)
    frame.flags.writeable = False
    indices, steps = small.decode(frame, old.numpy(), mantissa)
    delta = SparseDelta(elements, torch.from_numpy(indices), torch.from_numpy(steps))
    expected = ulp.diff(old, new)
    assert torch.equal(delta.indices, expected.indices) and torch.equal(delta.steps, expected.steps)


@pytest.mark.parametrize(("share", "most"), [(0.003, 9.5), (0.014, 7.5), (0.04, 6.5)])
def test_a_change_takes_little_more_than_the_bound(share: float, most: float) -> None:
    old, new = specimens.made_up(int(15_000 / share), share, seed=1)
    assert abs(float((old != new).float().mean()) / share - 1) < 0.05
    bits = 8 * one_frame((old, new)).size / int((old != new).sum())
    bound = bounds(old.numpy(), new.numpy())
    assert bits < most
    assert bound["bound_given_exponent"] < bits < 1.06 * bound["bound_given_exponent"] < bound["bound_alike"]


def test_other_weights_than_the_base_are_refused_by_name() -> None:
    old, new = specimens.made_up(5000, 0.01, seed=0)
    frame = one_frame((old, new))
    for element in (0, 2500, 4999):
        for bit in (1, 1 << 7, 1 << 14):
            other = old.clone()
            other[element] ^= bit
            with pytest.raises(WeightsError, match="made for other weights"):
                small.decode(frame, other.numpy(), 7)
    for other in (old[:-1], torch.cat([old, old[:1]]), new, old.flip(0)):
        with pytest.raises(WeightsError, match="made for other weights"):
            small.decode(frame, other.contiguous().numpy(), 7)


def refused_or_sound(frame: ByteArray, old: torch.Tensor) -> bool:
    try:
        indices, steps = small.decode(frame, old.numpy(), 7)
    except WeightsError:
        return True
    assert (indices[1:] > indices[:-1]).all() and steps.all()
    ulp.apply_(old.clone(), SparseDelta(old.numel(), torch.from_numpy(indices), torch.from_numpy(steps)))
    return False


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_a_frame_that_is_cut_short_goes_on_or_has_a_flipped_bit_is_refused_or_sound(share: float) -> None:
    old, new = pair_of(2, torch.bfloat16, 400, share)
    frame = one_frame((old, new))
    assert not refused_or_sound(frame, old)
    for size in range(frame.size):
        assert refused_or_sound(frame[:size], old), size
    assert refused_or_sound(np.concatenate([frame, np.zeros(1, np.uint8)]), old)
    refused = 0
    for bit in range(8 * frame.size):
        flipped = frame.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        refused += refused_or_sound(flipped, old)
    assert 32 <= refused < 8 * frame.size


@LIGHT
@given(SEEDS, st.integers(1, 60))
def test_a_frame_of_chance_is_refused_or_sound(seed: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = pair_of(seed, torch.bfloat16, 300, 0.2)
    frame = one_frame((old, new))
    chance = np.concatenate([frame[:4], rng.choice(np.array([0, 1, 2, 127, 128, 255], np.uint8), 50)])
    refused_or_sound(chance, old)
    at = rng.integers(4, frame.size, flips)
    frame[at] = rng.integers(0, 256, flips)
    refused_or_sound(frame, old)


HUGE = 2**62


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([0], "1 to 16 classes"),
        ([17], "1 to 16 classes"),
        ([HUGE], "1 to 16 classes"),
        ([1, 1, 0], "ascend from exponent 0"),
        ([2, 0, 0, 0, 0], "ascend from exponent 0"),
        ([2, 0, 256, 0, 0], "ascend from exponent 0"),
        ([2, 0, HUGE, 0, 0], "ascend from exponent 0"),
        ([1, 0, 33], "at most 32"),
        ([1, 0, HUGE], "at most 32"),
        ([1, 0, 0, 11, 0], "of \\[10\\]"),
        ([1, 0, 0, HUGE, 0], "of \\[10\\]"),
        ([2, 0, 9, 0, 0, 6, 0, 6, 0], "of \\[10, 10\\]"),
        ([1, 0, 0, 1, 33], "parameters"),
        ([1, 0, 0, 10, 0, HUGE], "more bytes were promised"),
        ([1, 0, 0, 10, 0, 0], "10 values were promised"),
    ],
)
def test_what_is_wrong_with_a_header_is_named(numbers: list[int], says: str) -> None:
    old = torch.zeros(10, dtype=torch.int16)
    writer = Writer()
    writer.array(one_frame((old, old))[:4])
    writer.numbers(*numbers)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=says):
        small.decode(written(writer), old.numpy(), 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def frame_with(old: torch.Tensor, unary: list[int], tail: int) -> ByteArray:
    """One change of more than a step, whose excess is `unary` and then `tail`, the only one that is there."""
    writer = Writer()
    writer.array(one_frame((old, old))[:4])
    writer.numbers(1, 0, 0)
    writer.numbers(1, 0, 1, 0)  # the first element changed
    writer.bits(np.array([True]))  # downwards
    writer.numbers(1, 0, 1, 0)  # the first of those by more than a step
    writer.numbers(len(unary))
    writer.array(np.array(unary, np.uint8))
    writer.array(np.array([tail], "<u2"))
    return written(writer)


def test_a_step_fits_its_width() -> None:
    old = torch.zeros(10, dtype=torch.int16)
    indices, steps = small.decode(frame_with(old, [255, 127], (1 << 15) - 2), old.numpy(), 7)
    assert (indices.tolist(), steps.tolist()) == ([0], [-(1 << 15)])
    for tail in ((1 << 15) - 1, (1 << 16) - 2, (1 << 16) - 1):
        with pytest.raises(WeightsError, match="more than 16 bits"):
            small.decode(frame_with(old, [255, 127], tail), old.numpy(), 7)


# -- many tensors ----------------------------------------------------------------------------------------------------


@LIGHT
@given(SEEDS, st.lists(st.tuples(st.sampled_from(DTYPES), SIZES, SHARES), max_size=6), st.sampled_from(Code))
@example(0, [(torch.float32, 0, 0.0), (torch.float32, 1, 0.0)], Code.FAST)  # a frame of no bytes, and then one
def test_a_payload_brings_every_tensor_from_old_to_new(
    seed: int, made: list[tuple[torch.dtype, int, float]], code: Code
) -> None:
    pairs = [pair_of(seed + i, *each) for i, each in enumerate(made)]
    dtypes = [dtype for dtype, _, _ in made]
    changes = [change_of(pair, dtype) for pair, dtype in zip(pairs, dtypes, strict=True)]
    known = [known_of(pair, dtype) for pair, dtype in zip(pairs, dtypes, strict=True)]
    sent = payload.encode(changes, code)
    dense = sum(old.numel() * old.element_size() for old, _ in pairs)
    assert sent.size <= dense + 4 + 4 * len(pairs)
    for result, (old, new) in zip(payload.decode(sent, known), pairs, strict=True):
        assert torch.equal(after(old, result), new)
    without_new = [Change(change.dtype, change.delta, change.old) for change in changes]
    for result, change in zip(payload.decode(payload.encode(without_new, code), known), changes, strict=True):
        assert isinstance(result, SparseDelta)
        assert torch.equal(result.indices, change.sparse.indices) and torch.equal(result.steps, change.sparse.steps)


@pytest.mark.parametrize("code", Code)
def test_each_tensor_has_the_form_that_is_smaller(code: Code) -> None:
    rng = np.random.default_rng(0)
    old = random_bits(rng, torch.bfloat16, 10_000)
    pairs = {
        Form.SPARSE: (old, ulp.stepped(old, torch.ones_like(old))),
        Form.DENSE: (old, random_bits(rng, torch.bfloat16, 10_000)),
    }
    changes = [change_of(pair, torch.bfloat16) for pair in pairs.values()]
    sent = payload.encode(changes, code)
    assert payload.contents(sent).forms == list(pairs)
    without_new = [Change(change.dtype, change.delta, change.old) for change in changes]
    assert sent.size < payload.encode(without_new, code).size
    assert sent.size < 2 * 20_000
    tiny = change_of((old[:3], old[:3] + 1), torch.bfloat16)
    assert payload.contents(payload.encode([tiny, tiny], code)).forms == [Form.DENSE, Form.DENSE]


def test_a_dtype_without_a_sparse_form_is_dense() -> None:
    new = torch.arange(5, dtype=torch.uint8)
    for code in Code:
        sent = payload.encode([Change(torch.uint8, None, None, new)], code)
        [result] = payload.decode(sent, [Known(torch.uint8, 5)])
        assert isinstance(result, torch.Tensor) and torch.equal(result, new)
        with pytest.raises(WeightsError, match="can only be dense"):
            payload.encode([Change(torch.uint8, None)], code)
    sparse = payload.encode([change_of(pair_of(0, torch.bfloat16, 100, 0.01), torch.bfloat16)], Code.FAST)
    with pytest.raises(WeightsError, match="no sparse form"):
        payload.decode(sparse, [Known(torch.uint8, 100)])


def test_tensors_are_cut_into_chunks_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [(torch.bfloat16, 30), (torch.float32, 250), (torch.bfloat16, 0), (torch.bfloat16, 270), (torch.float32, 1)]
    pairs = [pair_of(i, dtype, elements, 0.2) for i, (dtype, elements) in enumerate(made)]
    changes = [Change(dtype, ulp.diff(*pair), pair[0]) for (dtype, _), pair in zip(made, pairs, strict=True)]
    known = [known_of(pair, dtype) for (dtype, _), pair in zip(made, pairs, strict=True)]
    monkeypatch.setattr(chunks, "CHUNK", 100)
    sent = payload.encode(changes, Code.SMALL)
    assert len(payload.contents(sent).frames) == 3 + 3
    for result, (old, new) in zip(payload.decode(sent, known), pairs, strict=True):
        assert torch.equal(after(old, result), new)
    with ThreadPoolExecutor(2) as pool:
        assert np.array_equal(payload.encode(changes, Code.SMALL, pool.map), sent)
        for result, (old, new) in zip(payload.decode(sent, known, pool.map), pairs, strict=True):
            assert torch.equal(after(old, result), new)


def test_small_needs_what_it_applies_to() -> None:
    pair = pair_of(0, torch.bfloat16, 1000, 0.01)
    with pytest.raises(WeightsError, match="needs the bits"):
        payload.encode([Change(torch.bfloat16, ulp.diff(*pair))], Code.SMALL)
    sent = payload.encode([change_of(pair, torch.bfloat16)], Code.SMALL)
    with pytest.raises(WeightsError, match="needs the bits"):
        payload.decode(sent, [Known(torch.bfloat16, 1000)])
    [delta] = payload.decode(
        payload.encode([change_of(pair, torch.bfloat16)], Code.FAST), [Known(torch.bfloat16, 1000)]
    )
    assert torch.equal(after(pair[0], delta), pair[1])


@pytest.mark.parametrize("code", Code)
def test_a_payload_with_a_fault_is_refused_or_sound(code: Code) -> None:
    made = [(torch.bfloat16, 200, 0.02), (torch.float32, 40, 1.0), (torch.bfloat16, 3, 0.5)]
    pairs = [pair_of(i, *each) for i, each in enumerate(made)]
    known = [known_of(pair, dtype) for pair, (dtype, _, _) in zip(pairs, made, strict=True)]
    sent = payload.encode([change_of(pair, dtype) for pair, (dtype, _, _) in zip(pairs, made, strict=True)], code)

    def refused(data: ByteArray, tensors: list[Known]) -> bool:
        try:
            results = payload.decode(data, tensors)
        except WeightsError:
            return True
        for (old, _), result in zip(pairs, results, strict=True):
            assert after(old, result).shape == old.shape
        return False

    assert not refused(sent, known)
    for size in range(sent.size):
        assert refused(sent[:size], known)
    assert refused(np.concatenate([sent, np.zeros(1, np.uint8)]), known)
    assert refused(sent, known[:-1]) and refused(sent, [*known, known[0]]) and refused(sent, known[::-1])
    assert 0 < sum(refused(np.bitwise_xor(sent, flip), known) for flip in single_bits(sent.size)) < 8 * sent.size


def single_bits(size: int) -> list[ByteArray]:
    bits = np.eye(8 * size, dtype=np.uint8)
    return list(np.packbits(bits, axis=1, bitorder="little"))


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([], "promised"),
        ([2], "format 2"),
        ([1, 3], "code 3"),
        ([1, 1, HUGE, 0], "cannot be"),
        ([1, 1, 0, HUGE], "cannot be"),
        ([1, 1, 1, 0, 2], "form 2"),
        ([1, 1, 0, 1, HUGE], "promised"),
        ([1, 1, 0, 0, 0], "left over"),
        ([1, 1, 0, 0], "has 0 tensors, expected 1"),
        ([1, 1, 1, 0, 1], "expected 1 sparse and 0 dense frames"),
        ([1, 2, 1, 0, 1], "expected 1 sparse and 0 dense frames"),
        ([1, 1, 1, 1, 0, 1, 0], "10 x torch.bfloat16 cannot be 1 bytes"),
    ],
)
def test_what_is_wrong_with_a_payload_is_named(numbers: list[int], says: str) -> None:
    writer = Writer()
    writer.numbers(*numbers)
    with pytest.raises(WeightsError, match=says):
        payload.decode(written(writer), [Known(torch.bfloat16, 10, torch.zeros(10, dtype=torch.int16))])


def test_everything_can_be_made_ready_at_the_start() -> None:
    payload.prepare()


# -- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_finds_ours_smaller_than_the_baselines() -> None:
    old, new = specimens.made_up(1 << 19, 0.014, seed=0)
    found = sizes([specimens.change(old[:1000], new[:1000]), specimens.change(old[1000:], new[1000:])])
    bits = found["bits_per_changed"]
    assert found["changed"] == int((old != new).sum())
    assert bits["bound_given_exponent"] < bits["small"] < bits["bound_alike"] < bits["fast"] < 13
    assert bits["small"] * 1.8 < bits["gap_xor_zstd1"] < bits["xor_zstd1"] < bits["index32_and_bf16"]


def test_the_benchmark_measures_what_it_has_checked() -> None:
    for code in Code:
        found = rates(1 << 16, 0.01, code, pairs=2)
        assert found["code"] == code.name.lower() and found["bytes"] == 1 << 16
        for name in ("encode_over_memcpy", "apply_over_memcpy"):
            assert 0 < found[name]["low"] <= found[name]["mean"] <= found[name]["high"]


def test_the_benchmark_refuses_what_gives_no_interval() -> None:
    for pairs in (1, 1000):
        with pytest.raises(ConfigError, match="pairs must be"):
            bench.run(1 << 16, pairs, 1, print)


def test_a_model_trains_and_its_steps_are_small() -> None:
    training = specimens.Training(first_steps=2, warm_up=1, measured=1)
    before, between = specimens.training_snapshots(1e-6, specimens.trained(training), training)
    share = sum(
        int((a != b).sum()) for a, b in zip(specimens.bits(before), specimens.bits(between), strict=True)
    ) / sum(weight.numel() for weight in before.values())
    assert 0.001 < share < 0.1
