"""The order of tokens does not rest on how a runtime orders equal ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.placing import packing

WIDTH = 4


def _placed(real: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Order, inverse, real places, last and window of tokens [B, S], and what each TopK is given."""
    graph = GraphWriter("placing", opset=21)
    mask = graph.input("real", ir.DataType.INT64, ("batch", "sequence"))
    made = packing(graph, mask, graph.op("Shape", mask, start=1, end=2), WIDTH)
    names = ("order", "inverse", "places", "last", "window")
    kinds = (ir.DataType.INT64,) * 2 + (ir.DataType.FLOAT,) + (ir.DataType.INT64,) * 2
    values = (made.order, made.inverse, made.real, made.last, made.window)
    for value, name, kind in zip(values, names, kinds, strict=True):
        graph.output(value, name, kind, ("batch", "rows", 1))
    model = graph.model("0")
    sorted_by = [str(node.inputs[0].name) for node in model.graph if node.op_type == "TopK" and node.inputs[0]]
    found = ReferenceEvaluator(ir.to_proto(model)).run([*names, *sorted_by], {"real": real})
    return found[: len(names)], found[len(names) :]


def test_real_tokens_come_first_and_no_two_are_equal_where_they_are_sorted() -> None:
    real = (np.random.default_rng(0).random((5, 300)) < 0.7).astype(np.int64)
    real[0], real[1], real[2, :7], real[3, -9:] = 1, 0, 0, 0
    (order, inverse, places, last, window), sorted_by = _placed(real)
    assert len(sorted_by) == 2
    for given in sorted_by:
        assert all(len(np.unique(row)) == real.shape[1] for row in given)
    for row, mask in enumerate(real):
        assert np.array_equal(order[row, :, 0], np.argsort(-mask, kind="stable"))
        assert np.array_equal(inverse[row, order[row, :, 0], 0], np.arange(len(mask)))
        assert np.array_equal(places[row, :, 0], np.sort(mask)[::-1])
        assert last[row] == mask.sum() - 1
        assert np.array_equal(window[row, :, 0], mask.sum() + np.arange(WIDTH - 1))
