"""Heads apart and beside each other."""

from __future__ import annotations

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import GraphWriter


def per_head(graph: GraphWriter, x: ir.Value, width: int) -> ir.Value:
    """[B, S, heads width] -> [B, S, heads, width]."""
    return graph.op("Reshape", x, graph.integers(0, 0, -1, width))


def side_by_side(graph: GraphWriter, x: ir.Value) -> ir.Value:
    """[B, S, heads, width] -> [B, S, heads width]."""
    return graph.op("Reshape", x, graph.integers(0, 0, -1))
