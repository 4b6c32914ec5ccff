"""Experts by the standard's operators: a loop over those that any token visits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qconvert.onnx_export import dequantize
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.routing import Visits
from qconvert.onnx_export.weight import Weight


def loop_over_experts(graph: GraphWriter, rows: ir.Value, visits: Visits, gate_up: Weight, down: Weight) -> ir.Value:
    """What the experts make of rows [T, D], see ``OperatorSet.experts``.

    A turn of the loop takes one expert out of the stacks, gathers the rows that visit it, and adds what it makes of
    them to the result.
    """
    which, shares = visits.experts, visits.shares
    visited = graph.op("Unique", which)
    turns = graph.op("Squeeze", graph.op("Shape", visited))
    nothing = graph.op("ConstantOfShape", graph.op("Shape", rows))
    width = down.shape[-2]
    with graph.body("expert") as body:
        turn = body.input("turn", ir.DataType.INT64, ())
        going_on = body.input("going_on", ir.DataType.BOOL, ())
        total = body.input("total", ir.DataType.FLOAT, ("rows", width))
        expert = graph.op("Gather", visited, turn, axis=0)
        place = graph.op("Transpose", graph.op("NonZero", graph.op("Equal", which, expert)), perm=(1, 0))
        row, _ = graph.ops("Split", 2, place, axis=1, num_outputs=2)
        made = _expert(graph, graph.op("GatherND", rows, row), gate_up, down, expert)
        share = graph.op("Unsqueeze", graph.op("GatherND", shares, place), graph.integers(1))
        more = graph.op("ScatterND", total, row, graph.op("Mul", made, share), reduction="add")
        body.output(graph.op("Identity", going_on), ir.DataType.BOOL, ())
        body.output(more, ir.DataType.FLOAT, ("rows", width))
    # a condition that is left out means true, but to onnx's reference evaluator false
    return graph.op("Loop", turns, graph.constant(np.asarray(True)), nothing, body=body.graph)


def _expert(graph: GraphWriter, x: ir.Value, gate_up: Weight, down: Weight, expert: ir.Value) -> ir.Value:
    """``down (silu(gate x) * up x)`` of one expert for x [n, D]."""
    both = graph.op("Gemm", x, dequantize.matrix_of(graph, gate_up, expert), transB=1)
    pairs = graph.op("Reshape", both, graph.integers(0, gate_up.shape[-2] // 2, 2))
    gate, up = (graph.op("Gather", pairs, graph.integer(half), axis=2) for half in (0, 1))
    inner = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    return graph.op("Gemm", inner, dequantize.matrix_of(graph, down, expert), transB=1)
