"""What of a model's checkpoint one process holds: the same boxes for loading weights and for training states."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.megatron.layout import EMBEDDING, OUTPUT, WHOLE, Box, Place, layout
from engines.megatron.model_shape import ModelShape, expected_shapes

Boxes = Mapping[str, Sequence[Box]]


@dataclass(frozen=True, slots=True)
class Holdings:
    sizes: Mapping[str, tuple[int, ...]]
    """The checkpoint's tensors and their shapes, in its order."""
    exported: Boxes
    """Of each parameter here, what this process writes of them: over all places each element once."""
    held: Boxes
    """What is in it: also what another process writes, being replicated, or a copy of tied embeddings."""


def holdings(shape: ModelShape, place: Place = WHOLE) -> Holdings:
    """Raises ConfigError if `shape` cannot be cut as `place` says."""
    exported = layout(shape, place)
    first = layout(shape, dataclasses.replace(place, tp_rank=0))
    # the vocabulary is not replicated: rows of nothing but padding are in no checkpoint
    cut = {EMBEDDING[0]} if shape.value_head else {EMBEDDING[0], OUTPUT[0]}
    held = {name: boxes or ([] if name in cut else first[name]) for name, boxes in exported.items()}
    if shape.tied and place.last_stage and not place.first_stage:
        untied = layout(dataclasses.replace(shape, tied=False), place)[OUTPUT[0]]
        held[OUTPUT[0]] = [dataclasses.replace(box, name=EMBEDDING[1]) for box in untied]
    return Holdings(expected_shapes(shape), exported, held)
