"""The blocks of a vision tower as ONNX subgraphs; the formulas are those of ``reference_model.vision``.

All of them are of one frame. Shapes: P patches of a frame, W width of the tower, N heads, K their width, I width of a
block's product, m merge size, O width of the decoder. Everything is float32 unless said otherwise.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qconvert.core.role import Kind, Part
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.heads import per_head
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.weight import Weights
from reference_model.config import VisionConfig
from reference_model.vision import NORM_EPS, axial_frequencies

Pair = tuple[ir.Value, ir.Value]
"""Of rows and of columns."""


class Tower:
    """Writes the tower's blocks, which share the rotation of a frame."""

    def __init__(self, graph: GraphWriter, operators: OperatorSet, config: VisionConfig, weights: Weights) -> None:
        self.graph = graph
        self.operators = operators
        self.config = config
        self.weights = weights

    def _parts(self, kind: Kind, layer: int | None) -> tuple[ir.Value, ir.Value]:
        """Weight, as a matrix where it is a kernel over pixels, and bias."""
        weight, bias = (self.weights(kind, layer, part) for part in (Part.WEIGHT, Part.BIAS))
        rows, rest = weight.shape[0], weight.shape[1:]
        shape = (rows, math.prod(rest)) if rest else (rows,)
        return self.graph.weight(weight.initializer(), ir.DataType.FLOAT, shape), bias.dense(self.graph)

    def linear(self, x: ir.Value, kind: Kind, layer: int | None = None) -> ir.Value:
        """``weight x + bias`` of each patch: [P, inputs] -> [P, outputs]."""
        return self.graph.op("Gemm", x, *self._parts(kind, layer), transB=1)

    def norm(self, x: ir.Value, kind: Kind, layer: int | None = None) -> ir.Value:
        """Layer norm of each patch: [P, W], the same."""
        return self.graph.op("LayerNormalization", x, *self._parts(kind, layer), axis=-1, epsilon=NORM_EPS)

    def places(self, sizes: Pair) -> Pair:
        """Row and column of each patch in the merger's order, int64 [P] both, of rows and columns int64 [1].

        What the merger does not divide, Reshape refuses.
        """
        graph, (rows, columns) = self.graph, sizes
        merge = graph.integers(self.config.spatial_merge_size)
        count = graph.op("Squeeze", graph.op("Mul", rows, columns))
        patches = graph.op("Range", graph.integer(0), count, graph.integer(1))
        apart = graph.op("Concat", *(one for size in sizes for one in (graph.op("Div", size, merge), merge)), axis=0)
        turned = graph.op("Transpose", graph.op("Reshape", patches, apart), perm=(0, 2, 1, 3))
        place = graph.op("Reshape", turned, graph.integers(-1))
        return graph.op("Div", place, columns), graph.op("Mod", place, columns)

    def learned(self, places: Pair, sizes: Pair) -> ir.Value:
        """Learned positions of a square grid, stretched to the frame by bilinear interpolation: [P, W]."""
        graph = self.graph
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.weights(Kind.POSITION_EMBEDDING).dense(graph)
        row, column = (self._neighbours(place, size, side) for place, size in zip(places, sizes, strict=True))
        parts = []
        for at_row, row_share in row:
            first = graph.op("Mul", at_row, graph.integer(side))
            for at_column, column_share in column:
                points = graph.op("Gather", table, graph.op("Add", first, at_column), axis=0)
                share = graph.op("Unsqueeze", graph.op("Mul", row_share, column_share), graph.integers(1))
                parts.append(graph.op("Mul", points, share))
        return graph.op("Sum", *parts)

    def _neighbours(self, place: ir.Value, size: ir.Value, side: int) -> tuple[Pair, Pair]:
        """The points int64 [P] before and after each patch on one axis of the table, and its share in both [P]."""
        graph, real = self.graph, ir.DataType.FLOAT.value
        last = graph.op("Max", graph.op("Sub", size, graph.integer(1)), graph.integer(1))
        ahead = graph.op("Mul", graph.op("Cast", place, to=real), graph.float(side - 1))
        at = graph.op("Div", ahead, graph.op("Cast", last, to=real))
        low = graph.op("Floor", at)
        share = graph.op("Sub", at, low)
        before = graph.op("Cast", low, to=ir.DataType.INT64.value)
        after = graph.op("Min", graph.op("Add", before, graph.integer(1)), graph.integer(side - 1))
        return (before, graph.op("Sub", graph.float(1.0), share)), (after, share)

    def rotation(self, places: Pair) -> Pair:
        """Cosines and sines [1, P, K / 2]: the first half of them turns by the row, the other by the column."""
        graph = self.graph
        columns = (graph.op("Unsqueeze", place, graph.integers(1, 2)) for place in places)
        both = graph.op("Cast", graph.op("Concat", *columns, axis=1), to=ir.DataType.FLOAT.value)
        angles = graph.op("Mul", both, graph.floats(axial_frequencies(self.config).numpy()))
        flat = graph.op("Reshape", angles, graph.integers(1, -1, self.config.head_dim // 2))
        return graph.op("Cos", flat), graph.op("Sin", flat)

    def block(self, x: ir.Value, by: Pair, layer: int) -> ir.Value:
        """``h = x + attention(norm1(x))``, then ``h + mlp(norm2(h))``: [P, W], the same."""
        graph = self.graph
        x = graph.op("Add", x, self.attention(self.norm(x, Kind.BLOCK_NORM1, layer), by, layer))
        inner = self.linear(self.norm(x, Kind.BLOCK_NORM2, layer), Kind.BLOCK_FC1, layer)
        return graph.op("Add", x, self.linear(graph.op("Gelu", inner, approximate="tanh"), Kind.BLOCK_FC2, layer))

    def attention(self, x: ir.Value, by: Pair, layer: int) -> ir.Value:
        """``proj(softmax(q k^T / sqrt(K)) v)``, q and k rotated: [P, W], the same."""
        graph, heads, width = self.graph, self.config.num_heads, self.config.head_dim
        qkv = graph.op("Unsqueeze", self.linear(x, Kind.BLOCK_QKV, layer), graph.integers(0))
        query, key, value = graph.ops("Split", 3, qkv, axis=-1, num_outputs=3)
        query, key = (
            self.operators.rotate(graph, per_head(graph, one, width), *by, heads=heads, rotated=width)
            for one in (query, key)
        )
        mixed = self.operators.full_attention(graph, query, key, value, heads=heads)
        return self.linear(graph.op("Squeeze", mixed, graph.integers(0)), Kind.BLOCK_PROJ, layer)

    def merger(self, x: ir.Value) -> ir.Value:
        """``fc2(gelu(fc1(m x m normed neighbours side by side)))``: [P, W] -> [P / m^2, O]."""
        graph = self.graph
        wide = graph.op("Reshape", self.norm(x, Kind.MERGER_NORM), graph.integers(-1, self.config.merged_size))
        return self.linear(graph.op("Gelu", self.linear(wide, Kind.MERGER_FC1)), Kind.MERGER_FC2)
