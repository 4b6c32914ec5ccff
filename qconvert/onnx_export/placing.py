"""What all layers of a graph share: which tokens are real, which keys they see, and how positions rotate heads.

Shapes as in ``blocks``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qconvert.onnx_export.graph_writer import GraphWriter


def new_tokens(graph: GraphWriter, tokens: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """How many tokens are new (S) and came before (P), int64 [1] both, and which new ones are real int64 [B, S].

    ``mask`` int64 [B, A] is of all tokens, before and new.
    """
    count = graph.op("Shape", tokens, start=1, end=2)
    before = graph.op("Sub", graph.op("Shape", mask, start=1, end=2), count)
    real = graph.op("Slice", mask, before, graph.op("Shape", mask, start=1, end=2), graph.integers(1))
    return count, before, real


def attention_bias(graph: GraphWriter, mask: ir.Value, before: ir.Value, unseen: float) -> ir.Value:
    """0 where a real key is not later than the query, ``unseen`` elsewhere: [B, 1, S, A].

    Tokens are ordered by how many real ones there are up to them; padding comes after all.
    """
    numbers = graph.op("CumSum", mask, graph.integer(1))
    asked = graph.op("Slice", numbers, before, graph.op("Shape", mask, start=1, end=2), graph.integers(1))
    real = graph.op("Cast", mask, to=ir.DataType.BOOL.value)
    keys = graph.op("Where", real, numbers, graph.integer(np.iinfo(np.int64).max))
    earlier = graph.op(
        "LessOrEqual",
        graph.op("Unsqueeze", keys, graph.integers(1, 2)),
        graph.op("Unsqueeze", asked, graph.integers(1, 3)),
    )
    return graph.op("Where", earlier, graph.float(0.0), graph.float(unseen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The new tokens of each row with the real ones first, wherever the padding is.

    Attributes:
        order: int64 [B, S, 1], which token is where.
        inverse: int64 [B, S, 1], where each token is.
        real: which places have a real token [B, S, 1], 1.0 or 0.0.
        last: int64 [B, 1, 1], where the last real one is; -1 where none is.
        window: int64 [B, W - 1, 1], rows of [before | new, in order] that end at the last real token.
    """

    order: ir.Value
    inverse: ir.Value
    real: ir.Value
    last: ir.Value
    window: ir.Value


def packing(graph: GraphWriter, real: ir.Value, count: ir.Value, width: int) -> Packing:
    """The packing of tokens that are ``real`` int64 [B, S], each 0 or 1, for a convolution of ``width`` taps.

    No two tokens are equal to TopK: its CUDA kernel for more than 256 of them keeps no order of equal ones (ONNX
    Runtime's ``topk_impl.cuh``, ``RadixTopK``), whatever the standard says.
    """
    places = graph.op("Range", graph.integer(0), graph.op("Squeeze", count), graph.integer(1))
    ranks = graph.op("Sub", graph.op("Mul", real, count), places)  # above 0 where a token is real
    shape = graph.integers(0, -1, 1)  # what TopK gives is of unknown width to who infers shapes
    ordered, order = graph.ops("TopK", 2, graph.op("Unsqueeze", ranks, graph.integers(2)), count, axis=1)
    order = graph.op("Reshape", order, shape)
    _, inverse = graph.ops("TopK", 2, order, count, axis=1, largest=0)
    filled = graph.op("ReduceSum", graph.op("Unsqueeze", real, graph.integers(2)), graph.integers(1), keepdims=1)
    return Packing(
        order=order,
        inverse=graph.op("Reshape", inverse, shape),
        real=graph.op("Cast", graph.op("Greater", ordered, graph.integer(0)), to=ir.DataType.FLOAT.value),
        last=graph.op("Sub", filled, graph.integer(1)),
        window=graph.op("Add", filled, graph.constant(np.arange(width - 1, dtype=np.int64)[:, None])),
    )


def rotation(
    graph: GraphWriter, positions: ir.Value, frequencies: np.ndarray, factor: float, axes: np.ndarray
) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [B, S, R / 2] of positions int64 [3, B, S]: time, height, width.

    Plane p turns by ``positions[axes[p]] * frequencies[p]``. The angles are computed, not looked up: a context may be
    of any length.
    """
    of_plane = graph.op("Gather", positions, graph.integers(*(int(axis) for axis in axes)), axis=0)
    turned = graph.op("Cast", graph.op("Transpose", of_plane, perm=(1, 2, 0)), to=ir.DataType.FLOAT.value)
    angles = graph.op("Mul", turned, graph.floats(frequencies))
    both = graph.op("Cos", angles), graph.op("Sin", angles)
    if factor == 1.0:
        return both
    cos, sin = (graph.op("Mul", one, graph.float(factor)) for one in both)
    return cos, sin
