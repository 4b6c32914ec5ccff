"""Matrices that are multiplied with the same activations, as one: their rows stand below each other in the file.

One product takes less than two: activations are read, and at accuracy level 4 rounded, once. Nothing is stored twice or
in another way, for an initializer is a stretch of bytes, which may go over several tensors of a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from qconvert.core.role import Kind, TensorRole
from qconvert.core.tensor_info import TensorInfo
from qconvert.onnx_export.graph_writer import ALIAS, JOINT
from qconvert.onnx_export.weight import Weight

ATTENTION_INPUTS = (Kind.ATTENTION_QUERY, Kind.ATTENTION_KEY, Kind.ATTENTION_VALUE)
DELTA_GATES = (Kind.LINEAR_B, Kind.LINEAR_A)
SHARED_INPUTS = (Kind.SHARED_GATE, Kind.SHARED_UP)

FAMILY: Mapping[Kind, int] = {
    kind: number for number, kinds in enumerate((ATTENTION_INPUTS, DELTA_GATES, SHARED_INPUTS)) for kind in kinds
}
"""Which matrices of a layer are multiplied with the same; those of a family follow each other in the forward pass.

The inputs of linear attention, as wide as twice the hidden states, are not taken apart again for less than they gain.
"""


def runs(weights: Iterable[tuple[TensorRole, Weight]]) -> Iterator[tuple[Weight, ...]]:
    """Weights in the order of the forward pass; neighbours that are read as one stand together."""

    def sort(entry: tuple[TensorRole, Weight]) -> tuple[object, ...]:
        role, weight = entry
        of = FAMILY.get(role.kind, role), role.section, role.layer
        return *of, weight.scheme, weight.dtype, weight.shape[1:]

    for _, together in groupby(weights, key=sort):
        yield tuple(weight for _, weight in together)


def joined(weights: Sequence[Weight]) -> Weight:
    """The rows of weights that are stored alike, one after the other."""
    first = weights[0]
    names = tuple(name for weight in weights for name in weight.names)
    rows = sum(weight.shape[0] for weight in weights)
    return Weight(names=names, shape=(rows, *first.shape[1:]), scheme=first.scheme, dtype=first.dtype)


def stretch(initializer: str, infos: Mapping[str, TensorInfo]) -> tuple[str, int, int] | None:
    """File, first byte and bytes of what an initializer stands for; ``None`` where that is no stretch of one file."""
    names = initializer.partition(ALIAS)[0].split(JOINT)
    parts = [infos[name] for name in names if name in infos]
    if len(parts) < len(names) or any(
        (one.shard, one.end) != (after.shard, after.begin) for one, after in pairwise(parts)
    ):
        return None
    return parts[0].shard, parts[0].begin, parts[-1].end - parts[0].begin
