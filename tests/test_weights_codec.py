"""Fingerprint and codec: every bit counts, every bit comes back, and no buffer gets further than WeightsError."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_builders import make_tensors, random_bits, special_bits

from engines.weights import codec, fingerprint
from engines.weights.codec import DENSE, SPARSE, TensorUpdate
from stream_rl.errors import WeightsError
from stream_rl.types import ByteArray

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 3, 7, 64, 257])


def reference_sum(name: str, bits: np.ndarray) -> int:  # type: ignore[type-arg]
    """splitmix64's finalizer in unsigned 64-bit arithmetic, straight from the paper, over the documented mix."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = np.arange(bits.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += bits.astype(np.int64).view(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        z += np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return int(z.sum(dtype=np.uint64))


def sum_of(tensor: torch.Tensor, name: str = "w") -> int:
    return fingerprint.model_sum([(name, tensor)])


def tensor_of(bits: list[int], dtype: torch.dtype) -> torch.Tensor:
    raw = np.array(bits, np.dtype(f"u{dtype.itemsize}"))
    return torch.from_numpy(raw.view(np.dtype(f"i{dtype.itemsize}"))).view(dtype)


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), st.integers(0, 300), st.text(max_size=8))
def test_a_fingerprint_equals_splitmix64_in_numpy(seed: int, dtype: torch.dtype, elements: int, name: str) -> None:
    bits = random_bits(np.random.default_rng(seed), dtype, elements)
    assert fingerprint.tensor_sum(name, bits) == reference_sum(name, bits.numpy())


def test_a_fingerprint_does_not_depend_on_the_block_it_is_summed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = random_bits(np.random.default_rng(0), torch.bfloat16, 1000)
    whole = fingerprint.tensor_sum("w", bits)
    for block in (1, 3, 999, 1000, 1001):
        monkeypatch.setattr(fingerprint, "BLOCK", block)
        assert fingerprint.tensor_sum("w", bits) == whole
    assert whole == reference_sum("w", bits.numpy())


def test_a_fingerprint_crosses_the_real_block_edge() -> None:
    bits = torch.arange(fingerprint.BLOCK + 5, dtype=torch.int32)
    assert fingerprint.tensor_sum("w", bits) == reference_sum("w", bits.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_tells_all_special_values_apart(dtype: torch.dtype) -> None:
    patterns = special_bits(dtype)
    assert len({sum_of(tensor_of([bits], dtype)) for bits in patterns}) == len(patterns)
    zero = sum_of(torch.zeros(1, dtype=dtype))
    assert zero != sum_of(-torch.zeros(1, dtype=dtype))
    assert zero == sum_of(tensor_of([0], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_tells_every_single_flipped_bit(dtype: torch.dtype) -> None:
    tensor = make_tensors(3, dtype, {"w": (3, 4)})["w"]
    bits = fingerprint.bits_of(tensor).reshape(-1).numpy()
    sums = {sum_of(tensor)}
    for element in range(bits.size):
        for bit in range(8 * dtype.itemsize):
            flipped = bits.view(f"u{dtype.itemsize}").copy()
            flipped[element] ^= np.array(1 << bit, flipped.dtype)
            sums.add(sum_of(torch.from_numpy(flipped.view(bits.dtype)).view(dtype).reshape(3, 4)))
    assert len(sums) == 1 + bits.size * 8 * dtype.itemsize


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES))
def test_a_fingerprint_adds_up_over_tensors_in_any_order_and_over_shards(seed: int, dtype: torch.dtype) -> None:
    tensors = make_tensors(seed, dtype)
    whole = fingerprint.model_sum(tensors.items())
    assert fingerprint.model_sum(reversed(list(tensors.items()))) == whole
    assert sum(fingerprint.model_sum([item]) for item in tensors.items()) % (1 << 64) == whole
    shards = 0
    for name, tensor in tensors.items():
        bits = fingerprint.bits_of(tensor).reshape(-1)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(bits.numel()))
        for shard in order.split(3):
            shards += fingerprint.element_sum(fingerprint.seed_of(name), shard, bits[shard])
    assert shards % (1 << 64) == whole


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), st.data())
def test_a_fingerprint_sees_swapped_elements_and_swapped_names(
    seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    bits = random_bits(np.random.default_rng(seed), dtype, 20)
    i, j = data.draw(st.integers(0, 19)), data.draw(st.integers(0, 19))
    swapped = bits.clone()
    swapped[i], swapped[j] = bits[j].clone(), bits[i].clone()
    assert (fingerprint.tensor_sum("w", swapped) == fingerprint.tensor_sum("w", bits)) == torch.equal(swapped, bits)
    other = random_bits(np.random.default_rng(seed + 1), dtype, 20)
    straight = fingerprint.tensor_sum("a", bits) + fingerprint.tensor_sum("b", other)
    crossed = fingerprint.tensor_sum("b", bits) + fingerprint.tensor_sum("a", other)
    assert (straight - crossed) % (1 << 64) != 0


def test_a_fingerprint_reads_checkpoint_order_whatever_the_memory_layout() -> None:
    tensor = make_tensors(1, torch.float32, {"w": (4, 6)})["w"]
    assert sum_of(tensor.t().contiguous().t()) == sum_of(tensor)
    assert sum_of(tensor.t()) != sum_of(tensor)
    assert sum_of(torch.tensor(1.5)) == sum_of(torch.tensor([1.5]))
    assert sum_of(torch.empty(0)) == 0


def test_a_fingerprint_is_shown_as_sixteen_digits() -> None:
    assert fingerprint.text(0) == "0" * 16 and fingerprint.text((1 << 64) - 1) == "f" * 16


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), st.floats(0, 1))
def test_a_sum_kept_up_to_date_from_changed_elements_equals_the_recomputed_one(
    seed: int, dtype: torch.dtype, share: float
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, dtype, 100)
    total = fingerprint.tensor_sum("w", bits)
    for _ in range(4):
        where = torch.from_numpy(np.flatnonzero(rng.random(100) < share))
        new = random_bits(rng, dtype, where.numel())
        total -= fingerprint.element_sum(fingerprint.seed_of("w"), where, bits[where])
        total += fingerprint.element_sum(fingerprint.seed_of("w"), where, new)
        bits[where] = new
        assert total % (1 << 64) == fingerprint.tensor_sum("w", bits)


# -- codec -----------------------------------------------------------------------------------------------------------


def applied(update: TensorUpdate, old: torch.Tensor) -> torch.Tensor:
    new = old.clone()
    if update.indices is None:
        new.copy_(update.bits)
    else:
        new[update.indices] = update.bits
    return new


def through(update: TensorUpdate, elements: int) -> TensorUpdate:
    code, buffers = codec.encode(update)
    return codec.decode(update.name, update.dtype, elements, code, [buffer.copy() for buffer in buffers])


@LIGHT
@given(SEEDS, st.sampled_from(DTYPES), SIZES, st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 1.0]))
def test_a_difference_travels_and_applies_bit_for_bit(
    seed: int, dtype: torch.dtype, elements: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    old = random_bits(rng, dtype, elements)
    new = torch.where(torch.from_numpy(rng.random(elements) < share), random_bits(rng, dtype, elements), old)
    kept_old, kept_new = old.clone(), new.clone()
    update = codec.diff("w", dtype, old, new)
    assert (update is None) == torch.equal(old, new)
    if update is None:
        return
    arrived = through(update, elements)
    assert (arrived.name, arrived.dtype) == ("w", dtype)
    assert torch.equal(applied(arrived, old), new)
    assert torch.equal(applied(arrived, applied(arrived, old)), new)
    assert torch.equal(old, kept_old) and torch.equal(new, kept_new)
    if update.indices is not None:
        assert update.changed == int((old != new).sum())
        old[update.indices] = 0
        new[update.indices] = 0
        assert torch.equal(applied(arrived, kept_old), kept_new), "an update does not alias what it was made from"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_special_value_replaces_every_other(dtype: torch.dtype) -> None:
    patterns = special_bits(dtype)
    old = fingerprint.bits_of(tensor_of([a for a in patterns for _ in patterns], dtype))
    new = fingerprint.bits_of(tensor_of([b for _ in patterns for b in patterns], dtype))
    update = codec.diff("w", dtype, old, new)
    assert update is not None and torch.equal(applied(through(update, old.numel()), old), new)


def test_the_smaller_code_is_chosen() -> None:
    old = torch.zeros(1000, dtype=torch.int16)
    for changed in (1, 10, 100, 300, 400, 1000):
        new = old.clone()
        new[:changed] = 1
        update = codec.diff("w", torch.bfloat16, old, new)
        assert update is not None
        code, buffers = codec.encode(update)
        assert sum(buffer.size for buffer in buffers) == min(6 * changed, 2000)
        assert code == (SPARSE if 6 * changed < 2000 else DENSE)


def buffer_of(*values: int, dtype: str = "<u4") -> ByteArray:
    return np.array(values, dtype).view(np.uint8)


@pytest.mark.parametrize(
    ("code", "buffers"),
    [
        ("", []),
        (DENSE, []),
        (DENSE, [np.zeros(19, np.uint8)]),
        (DENSE, [np.zeros(21, np.uint8)]),
        (DENSE, [np.zeros(0, np.uint8)]),
        (DENSE, [np.zeros(20, np.uint8), np.zeros(0, np.uint8)]),
        ("dense ", [np.zeros(20, np.uint8)]),
        ("pickle", [np.zeros(20, np.uint8)]),
        (SPARSE, []),
        (SPARSE, [np.zeros(20, np.uint8)]),
        (SPARSE, [np.zeros(0, np.uint8), np.zeros(0, np.uint8)]),
        (SPARSE, [np.zeros(3, np.uint8), np.zeros(2, np.uint8)]),
        (SPARSE, [buffer_of(0), np.zeros(1, np.uint8)]),
        (SPARSE, [buffer_of(0), np.zeros(4, np.uint8)]),
        (SPARSE, [buffer_of(10), np.zeros(2, np.uint8)]),
        (SPARSE, [buffer_of(2**32 - 1), np.zeros(2, np.uint8)]),
        (SPARSE, [buffer_of(2**31), np.zeros(2, np.uint8)]),
        (SPARSE, [buffer_of(3, 3), np.zeros(4, np.uint8)]),
        (SPARSE, [buffer_of(4, 3), np.zeros(4, np.uint8)]),
        (SPARSE, [buffer_of(3, 11, 4), np.zeros(6, np.uint8)]),
        (SPARSE, [buffer_of(0), np.zeros(2, np.uint8), np.zeros(0, np.uint8)]),
    ],
)
def test_buffers_that_fit_no_update_of_ten_elements_are_refused(code: str, buffers: list[ByteArray]) -> None:
    with pytest.raises(WeightsError, match="w: "):
        codec.decode("w", torch.bfloat16, 10, code, buffers)


@LIGHT
@given(
    st.sampled_from(DTYPES),
    st.integers(0, 6),
    st.sampled_from([SPARSE, DENSE, "x"]),
    st.lists(st.binary(max_size=24), max_size=3),
)
def test_random_buffers_are_refused_or_fit(dtype: torch.dtype, elements: int, code: str, raw: list[bytes]) -> None:
    buffers = [np.frombuffer(bytearray(each), np.uint8) for each in raw]
    try:
        update = codec.decode("w", dtype, elements, code, buffers)
    except WeightsError:
        return
    assert applied(update, torch.zeros(elements, dtype=update.bits.dtype)).numel() == elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_that_start_at_odd_addresses_are_read_right(dtype: torch.dtype) -> None:
    bits = random_bits(np.random.default_rng(5), dtype, 33)
    raw = np.concatenate([np.zeros(1, np.uint8), bits.numpy().view(np.uint8)])
    assert torch.equal(codec.decode("w", dtype, 33, DENSE, [raw[1:]]).bits.clone(), bits)
    positions = np.concatenate([np.zeros(1, np.uint8), np.arange(33, dtype=np.uint32).view(np.uint8)])
    update = codec.decode("w", dtype, 33, SPARSE, [positions[1:], raw[1:]])
    assert torch.equal(applied(update, torch.zeros_like(bits)), bits)


def test_a_tensor_without_elements_has_a_dense_update() -> None:
    nothing = TensorUpdate("w", torch.float32, None, torch.empty(0, dtype=torch.int32))
    assert through(nothing, 0).changed == 0
