"""Where the elements of megatron-core's parameters lie in a Hugging Face checkpoint: one description, for whole weights
and for single changed elements.

megatron-core fuses query, key and value, weights and biases alike, interleaved by key head (the query heads that a key
head serves, then its key, then its value), and stacks the MLP's gate on its up projection.  Tensor parallelism cuts
query, key, value, gate, up and the vocabulary by rows, the output and down projections by columns.  Pipeline stages
count their layers from 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from engines.megatron.model_shape import ModelShape
from stream_rl.errors import ConfigError

EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = ("decoder.final_layernorm.weight", "model.norm.weight")
OUTPUT = ("output_layer.weight", "lm_head.weight")
VALUE_HEAD = (OUTPUT[0], "value_head.weight")
"""megatron-core's name, the checkpoint's name."""


@dataclass(frozen=True, slots=True)
class Box:
    """Elements of one parameter that belong to one checkpoint tensor: runs of neighbours, equal in both.

    Positions are flat.  A later element of the parameter is a later element of the tensor.
    """

    name: str
    """Of the checkpoint tensor."""
    elements: int
    """Of the whole checkpoint tensor."""
    count: int
    """Runs."""
    width: int
    """Elements of a run."""
    offset: int
    """Of the first run, in the parameter."""
    stride: int
    """From one run to the next, in the parameter."""
    to_offset: int
    """The same in the checkpoint tensor."""
    to_stride: int

    def of(self, parameter: Tensor) -> Tensor:
        """[count, width], a view of the flat parameter."""
        span = (self.count - 1) * self.stride + self.width
        return parameter[self.offset : self.offset + span].unfold(0, self.width, self.stride)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Those of the parameter's elements from `start` to `stop` that are in here: where each run begins, in the
        parameter and in the tensor, and its elements."""
        first = max((start - self.offset) // self.stride, 0)
        for run in range(first, self.count):
            begin = self.offset + run * self.stride
            if begin >= stop:
                break
            low, high = max(start, begin), min(stop, begin + self.width)
            if low < high:
                yield low, self.to_offset + run * self.to_stride + low - begin, high - low


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What of the model a process holds; all of it by default."""

    tp_rank: int = 0
    tp_size: int = 1
    first_layer: int = 0
    num_layers: int | None = None
    """None: all from the first on."""
    first_stage: bool = True
    """Of the pipeline: it holds the embedding."""
    last_stage: bool = True
    """It holds the final norm and the output layer."""
    padded_vocab: int | None = None
    """Rows of the embedding over all tensor-parallel ranks, if they are more than the vocabulary."""


WHOLE = Place()


def layout(shape: ModelShape, place: Place = WHOLE) -> dict[str, list[Box]]:
    """For each parameter of a process its boxes.  What others export has none: what is replicated over tensor-parallel
    ranks beyond the first of them, and the last stage's copy of tied embeddings.

    Raises ConfigError if `shape` cannot be cut so.
    """
    whole_heads = shape.kv_heads % place.tp_size == 0 and shape.ffn_size % place.tp_size == 0
    vocab_rows = place.padded_vocab or shape.vocab_size
    if not whole_heads or vocab_rows % place.tp_size or vocab_rows < shape.vocab_size:
        raise ConfigError(
            f"{place.tp_size} tensor-parallel ranks must divide {shape.kv_heads} key heads, an MLP of "
            f"{shape.ffn_size} and {vocab_rows} rows of the (padded) vocabulary of {shape.vocab_size}"
        )
    boxes = {}
    if place.first_stage:
        boxes[EMBEDDING[0]] = _vocabulary(EMBEDDING[1], shape, place, vocab_rows)
    num_layers = shape.layers - place.first_layer if place.num_layers is None else place.num_layers
    for index in range(num_layers):
        theirs = f"model.layers.{place.first_layer + index}."
        boxes |= {f"decoder.layers.{index}.{name}": found for name, found in _layer(theirs, shape, place)}
    if place.last_stage:
        boxes[FINAL_NORM[0]] = _replicated(FINAL_NORM[1], shape.hidden_size, place)
        if shape.value_head:
            boxes[VALUE_HEAD[0]] = _replicated(VALUE_HEAD[1], shape.hidden_size, place)
        elif not shape.tied:
            boxes[OUTPUT[0]] = _vocabulary(OUTPUT[1], shape, place, vocab_rows)
        elif not place.first_stage:
            boxes[OUTPUT[0]] = []
    return boxes


def _layer(theirs: str, shape: ModelShape, place: Place) -> Iterator[tuple[str, list[Box]]]:
    rank, size, hidden = place.tp_rank, place.tp_size, shape.hidden_size
    for ours, name in (
        ("input_layernorm.weight", "input_layernorm.weight"),
        ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ):
        yield ours, _replicated(theirs + name, hidden, place)
    for part in "qk" if shape.family.qk_norm else "":
        name = f"{theirs}self_attn.{part}_norm.weight"
        yield f"self_attention.{part}_layernorm.weight", _replicated(name, shape.head_dim, place)
    for ours, name, columns in (
        ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", shape.heads * shape.head_dim),
        ("mlp.linear_fc2.weight", "mlp.down_proj.weight", shape.ffn_size),
    ):
        elements, width = hidden * columns, columns // size
        by_rows = Box(theirs + name, elements, hidden, width, 0, width, rank * width, columns)
        yield ours, [by_rows if size > 1 else _run(theirs + name, elements, elements)]

    for kind in shape.family.qkv_tensors:
        yield f"self_attention.linear_qkv.{kind}", list(_qkv(theirs, kind, shape, place))
    half = shape.ffn_size // size * hidden
    names = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
    gate_up = [_run(name, size * half, half, i * half, rank * half) for i, name in enumerate(names)]
    yield "mlp.linear_fc1.weight", gate_up


def _qkv(theirs: str, kind: str, shape: ModelShape, place: Place) -> Iterator[Box]:
    columns = shape.hidden_size if kind == "weight" else 1
    head, queries, groups = shape.head_dim * columns, shape.heads // shape.kv_heads, shape.kv_heads // place.tp_size
    stride, offset = (queries + 2) * head, 0
    for part, heads in (("q", queries), ("k", 1), ("v", 1)):
        name, width = f"{theirs}self_attn.{part}_proj.{kind}", heads * head
        to_offset = place.tp_rank * groups * width
        yield Box(name, shape.kv_heads * width, groups, width, offset, stride, to_offset, width)
        offset += width


def _run(name: str, elements: int, width: int, offset: int = 0, to_offset: int = 0) -> Box:
    return Box(name, elements, 1, width, offset, width, to_offset, width)


def _replicated(name: str, elements: int, place: Place) -> list[Box]:
    return [_run(name, elements, elements)] if place.tp_rank == 0 else []


def _vocabulary(name: str, shape: ModelShape, place: Place, vocab_rows: int) -> list[Box]:
    """The rows that pad it are in no checkpoint."""
    rows = vocab_rows // place.tp_size
    first = rows * place.tp_rank
    width = max(min(rows, shape.vocab_size - first), 0) * shape.hidden_size
    elements = shape.vocab_size * shape.hidden_size
    return [_run(name, elements, width, 0, first * shape.hidden_size)] if width else []
