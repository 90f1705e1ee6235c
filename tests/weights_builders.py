"""Small builders for the weights' tests: a torch model that fuses and ties as SGLang's do, tensors of any bits."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import numpy as np
import torch

from engines.sglang.load_map import LoadMap, TensorShape, trace
from engines.sglang.staging import LiveWeights
from engines.weights import fingerprint
from stream_rl.messages import UpdatePart
from stream_rl.types import Version

RUN = "r"
FIRST = Version(0, 0)
VOCABULARY, HIDDEN, INNER, QUERY, KEY = 6, 4, 8, 4, 2
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (VOCABULARY, HIDDEN),
    "q": (QUERY, HIDDEN),
    "k": (KEY, HIDDEN),
    "v": (KEY, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "norm": (HIDDEN,),
    "scale": (),
    "q_bias": (QUERY,),
    "k_bias": (KEY,),
    "v_bias": (KEY,),
}
FUSED = {
    "q": ("qkv", 0),
    "k": ("qkv", QUERY),
    "v": ("qkv", QUERY + KEY),
    "q_bias": ("qkv_bias", 0),
    "k_bias": ("qkv_bias", QUERY),
    "v_bias": ("qkv_bias", QUERY + KEY),
    "gate": ("gate_up", 0),
    "up": ("gate_up", INNER),
}
Tensors = dict[str, torch.Tensor]


def special_bits(dtype: torch.dtype) -> list[int]:
    """Zeros, the smallest and largest denormal, infinities, quiet and signalling NaNs with payloads; of both signs."""
    width, mantissa = {torch.float32: (32, 23), torch.bfloat16: (16, 7), torch.float16: (16, 10)}[dtype]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    positive = [
        0,
        1,
        (1 << mantissa) - 1,
        1 << mantissa,
        infinity - 1,
        infinity,
        infinity | 1,
        infinity | 1 << (mantissa - 1),
    ]
    positive.append(infinity | ((1 << mantissa) - 1))
    return [bits | sign << (width - 1) for bits in positive for sign in (0, 1)]


def random_bits(rng: np.random.Generator, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """Flat integers: any bit pattern, the special ones often."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    raw = rng.integers(0, 1 << (8 * dtype.itemsize), elements, dtype=np.uint64).astype(unsigned)
    special = rng.choice(np.array(special_bits(dtype), unsigned), elements)
    mixed = np.where(rng.random(elements) < 0.5, special, raw).astype(unsigned)
    return torch.from_numpy(mixed.view(np.dtype(f"i{dtype.itemsize}")))


def make_tensors(
    seed: int, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: random_bits(rng, dtype, int(np.prod(shape, dtype=np.int64))).view(dtype).reshape(shape)
        for name, shape in shapes.items()
    }


def perturbed(tensors: Tensors, rng: np.random.Generator, share: float) -> Tensors:
    """New bits for about `share` of the elements, in new tensors."""
    new = {}
    for name, tensor in tensors.items():
        old = fingerprint.bits_of(tensor).reshape(-1)
        chosen = torch.from_numpy(rng.random(old.numel()) < share)
        bits = torch.where(chosen, random_bits(rng, tensor.dtype, old.numel()), old)
        new[name] = bits.view(tensor.dtype).reshape(tensor.shape)
    return new


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(fingerprint.bits_of(a[name]), fingerprint.bits_of(b[name]))
        for name in a
    )


def hash_of(tensors: Tensors) -> str:
    return fingerprint.text(fingerprint.model_sum(tensors.items()))


class Model(torch.nn.Module):
    """Fuses q, k, v, their biases, and gate, up; its head is its embedding."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        made: dict[str, tuple[int, ...]] = {"qkv": (QUERY + 2 * KEY, HIDDEN), "qkv_bias": (QUERY + 2 * KEY,)}
        made["gate_up"] = (2 * INNER, HIDDEN)
        made |= {name: shape for name, shape in SHAPES.items() if name not in FUSED}
        for name, shape in made.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.head = self.embed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.load_one(name, tensor)

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        target, start = FUSED.get(name, (name, 0))
        parameter = getattr(self, target).data
        if name in FUSED:
            parameter = parameter.narrow(0, start, tensor.shape[0])
        parameter.copy_(tensor)

    def live(self) -> Tensors:
        """A copy of what is live, in checkpoint names, read without any map."""
        found = {}
        for name, shape in SHAPES.items():
            target, start = FUSED.get(name, (name, 0))
            parameter = getattr(self, target).data
            found[name] = (parameter.narrow(0, start, shape[0]) if name in FUSED else parameter).clone()
        return found


def tensor_shapes(dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorShape]:
    return {name: TensorShape(shape, dtype) for name, shape in SHAPES.items()}


def map_of(model: Model, dtype: torch.dtype = torch.bfloat16) -> LoadMap:
    return LoadMap(trace(model.named_parameters(), model.load_weights, tensor_shapes(dtype)))


class Shard(Model):
    """One of several ranks: q, k, v, their biases, gate and up by rows (a head of k and v on several ranks, if they are
    too few), down by columns, the vocabulary by rows and padded, everything else whole."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.nn.Module.__init__(self)
        self.rank, self.ranks, self.vocabulary = rank, ranks, -(-VOCABULARY // ranks)
        rows = {"q": QUERY // ranks, "k": max(1, KEY // ranks), "v": max(1, KEY // ranks)}
        rows |= {"gate": INNER // ranks, "up": INNER // ranks}
        self.rows = rows
        self.starts = {"q": 0, "k": rows["q"], "v": rows["q"] + rows["k"], "gate": 0, "up": rows["gate"]}
        made: dict[str, tuple[int, ...]] = {
            "embed": (self.vocabulary, HIDDEN),
            "qkv": (rows["q"] + 2 * rows["k"], HIDDEN),
            "qkv_bias": (rows["q"] + 2 * rows["k"],),
            "gate_up": (2 * rows["gate"], HIDDEN),
            "down": (HIDDEN, INNER // ranks),
            "norm": (HIDDEN,),
            "scale": (),
        }
        for name, shape in made.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.head = self.embed

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        if name in FUSED:
            part = name.removesuffix("_bias")
            target, rows = getattr(self, FUSED[name][0]).data, self.rows[part]
            first = self.rank * rows if part not in "kv" else self.rank * KEY // self.ranks
            target.narrow(0, self.starts[part], rows).copy_(tensor.narrow(0, first, rows))
        elif name == "embed":
            first = min(self.rank * self.vocabulary, VOCABULARY)
            some = tensor.narrow(0, first, min(self.vocabulary, VOCABULARY - first))
            self.embed.data[: some.shape[0]].copy_(some)
            self.embed.data[some.shape[0] :].fill_(0)
        elif name == "down":
            columns = INNER // self.ranks
            self.down.data.copy_(tensor.narrow(1, self.rank * columns, columns))
        else:
            super().load_one(name, tensor)


def make_live(tensors: Tensors, version: Version = FIRST) -> tuple[LiveWeights, Model]:
    """A model that holds `tensors` as `version`."""
    dtype = tensors["embed"].dtype
    model = Model(dtype)
    model.load_weights(tensors.items())
    return LiveWeights(RUN, map_of(model, dtype), version), model


def make_shards(tensors: Tensors, ranks: int, version: Version = FIRST) -> list[tuple[LiveWeights, Model]]:
    """The same, divided over the ranks of one engine."""
    dtype = tensors["embed"].dtype
    models = [Shard(rank, ranks, dtype) for rank in range(ranks)]
    for model in models:
        model.load_weights(tensors.items())
    traced = [trace(model.named_parameters(), model.load_weights, tensor_shapes(dtype)) for model in models]
    rows = [each.rows() for each in traced]
    return [
        (LiveWeights(RUN, LoadMap(each, rank, rows), version), model)
        for rank, (each, model) in enumerate(zip(traced, models, strict=True))
    ]


def take(live: LiveWeights, parts: Iterable[UpdatePart]) -> Version | None:
    """Receive parts in this order; what is staged then."""
    for part in parts:
        assert live.receive(part)
    return live.staged and live.staged[0]


def commit(live: LiveWeights, target: Version, attempt: int = 0) -> None:
    live.commit(target, attempt, nullcontext)
