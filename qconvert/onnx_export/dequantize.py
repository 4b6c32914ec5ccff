"""Stored codes as float32 matrices, by the standard's operators: ``(code - zero) * scale``, which rounds once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.weight import Weight


def matrix(graph: GraphWriter, weight: Weight) -> ir.Value:
    """A weight [N, K], dense or in codes."""
    if weight.scheme is None:
        return weight.dense(graph)
    zeros = _zeros(graph, weight, weight.zero_points(graph), _scale_shape(graph, weight))
    if weight.bits == 8:
        return _dequantized(graph, weight, weight.codes(graph, weight.shape), weight.scales(graph), zeros)
    zeros = graph.op("Cast", zeros, to=ir.DataType.UINT4.value)
    return _dequantized(graph, weight, weight.nibbles(graph), weight.scales(graph), zeros)


def matrix_of(graph: GraphWriter, stack: Weight, expert: ir.Value) -> ir.Value:
    """The matrix [N, K] of one expert, an int64 scalar, out of a stack [E, N, K], dense or in codes.

    Four-bit codes are taken out as bytes, since ONNX Runtime gathers nothing smaller.
    """

    def taken(value: ir.Value) -> ir.Value:
        return graph.op("Gather", value, expert, axis=0)

    if stack.scheme is None:
        return graph.cast(taken(stack.stored(graph)), stack.type, ir.DataType.FLOAT)
    experts, rows, cols = stack.shape
    stored = taken(stack.codes(graph, (experts, rows, cols * stack.bits // 8)))
    codes = stored if stack.bits == 8 else _nibbles(graph, stored)
    points = stack.zero_points(graph)
    zeros = _zeros(graph, stack, None if points is None else taken(points), _scale_shape(graph, stack))
    return _dequantized(graph, stack, codes, taken(stack.scales(graph)), zeros)


def rows_of(graph: GraphWriter, table: Weight, rows: ir.Value) -> ir.Value:
    """The rows int64 [T] of a table [N, K] in codes: float32 [T, K]."""

    def taken(value: ir.Value) -> ir.Value:
        return graph.op("Gather", value, rows, axis=0)

    stored = taken(table.codes(graph, (table.shape[0], table.shape[1] * table.bits // 8)))
    codes = stored if table.bits == 8 else _nibbles(graph, stored)
    scales, points = taken(table.scales(graph)), table.zero_points(graph)
    zeros = _zeros(graph, table, None if points is None else taken(points), graph.op("Shape", scales))
    return _dequantized(graph, table, codes, scales, zeros)


def _dequantized(graph: GraphWriter, weight: Weight, codes: ir.Value, scales: ir.Value, zeros: ir.Value) -> ir.Value:
    """Codes [N, K], scales and zeros both [N, G], or [N] where a row has one."""
    if not weight.block_size:
        return graph.op("DequantizeLinear", codes, scales, zeros, axis=0)
    return graph.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=weight.block_size)


def _scale_shape(graph: GraphWriter, weight: Weight) -> ir.Value:
    """That of the scales of one matrix."""
    rows, groups = weight.shape[-2], weight.groups
    return graph.integers(rows, groups) if weight.block_size else graph.integers(rows)


def _zeros(graph: GraphWriter, weight: Weight, stored: ir.Value | None, shape: ir.Value) -> ir.Value:
    """The code that means zero as uint8, in ``shape``, that of the scales: from packed ones [N, ...], or the middle."""
    if stored is None:
        middle = graph.constant(np.asarray(1 << (weight.bits - 1), dtype=np.uint8))
        return graph.op("Expand", middle, shape)
    if weight.bits == 4:
        stored = _nibbles(graph, stored)
        stored = graph.op("Slice", stored, graph.integers(0), graph.integers(weight.groups), graph.integers(1))
    return graph.op("Reshape", stored, shape)


def _nibbles(graph: GraphWriter, stored: ir.Value) -> ir.Value:
    """Bytes [N, n] as uint8 codes [N, 2n], the low half of each first."""
    low = graph.op("BitwiseAnd", stored, graph.constant(np.asarray(15, dtype=np.uint8)))
    high = graph.op("BitShift", stored, graph.constant(np.asarray(4, dtype=np.uint8)), direction="RIGHT")
    last = graph.integers(2)
    pairs = graph.op("Concat", graph.op("Unsqueeze", low, last), graph.op("Unsqueeze", high, last), axis=2)
    return graph.op("Reshape", pairs, graph.integers(0, -1))
