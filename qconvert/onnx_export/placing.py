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


def attention_bias(graph: GraphWriter, mask: ir.Value, count: ir.Value, before: ir.Value, unseen: float) -> ir.Value:
    """0 where a real key is not later than the query, ``unseen`` elsewhere: [B, 1, S, A]."""
    zero, one = graph.integer(0), graph.integer(1)
    first = graph.op("Squeeze", before)
    total = graph.op("Add", first, graph.op("Squeeze", count))
    queries = graph.op("Unsqueeze", graph.op("Range", first, total, one), graph.integers(1))
    earlier = graph.op("LessOrEqual", graph.op("Range", zero, total, one), queries)
    real = graph.op("Unsqueeze", graph.op("Cast", mask, to=ir.DataType.BOOL.value), graph.integers(1, 2))
    return graph.op("Where", graph.op("And", real, earlier), graph.float(0.0), graph.float(unseen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a convolution finds the real tokens side by side, wherever the padding is.

    Attributes:
        order: int64 [B, S, 1], the new tokens of each row, the real ones first.
        inverse: int64 [B, S, 1], where each is in that order.
        window: int64 [B, W - 1, 1], rows of [before | new, in order] that end at the last real token.
    """

    order: ir.Value
    inverse: ir.Value
    window: ir.Value


def packing(graph: GraphWriter, real: ir.Value, count: ir.Value, width: int) -> Packing:
    """The packing of tokens that are ``real`` int64 [B, S], for a convolution of ``width`` taps."""
    zero, one = graph.integer(0), graph.integer(1)
    places = graph.op("Range", zero, graph.op("Squeeze", count), one)
    behind = graph.op("Mul", graph.op("Sub", one, real), count)
    _, order = graph.ops("TopK", 2, graph.op("Add", behind, places), count, axis=1, largest=0)
    _, inverse = graph.ops("TopK", 2, order, count, axis=1, largest=0)
    first = graph.op("ReduceSum", real, graph.integers(1), keepdims=1)
    window = graph.op("Add", first, graph.integers(*range(width - 1)))
    order, inverse, window = (graph.op("Unsqueeze", one, graph.integers(2)) for one in (order, inverse, window))
    return Packing(order=order, inverse=inverse, window=window)


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


def last_real(graph: GraphWriter, x: ir.Value, real: ir.Value) -> ir.Value:
    """X [B, S, D] of the last real token of each row, the first where none is: [B, 1, D]; ``real`` [B, S, 1]."""
    counted = graph.op("CumSum", real, graph.integer(1))
    index = graph.op("ArgMax", graph.op("Mul", counted, real), axis=1, keepdims=1)
    return graph.op("GatherND", x, index, batch_dims=1)


def spread_real(graph: GraphWriter, real: ir.Value) -> ir.Value:
    """``real`` int64 [B, S] as float32 [B, S, 1]."""
    return graph.op("Cast", graph.op("Unsqueeze", real, graph.integers(2)), to=ir.DataType.FLOAT.value)
