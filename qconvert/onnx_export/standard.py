"""The standard's operators alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qconvert.onnx_export import dequantize
from qconvert.onnx_export.expert_loop import loop_over_experts
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.heads import side_by_side
from qconvert.onnx_export.routing import Routing, visits
from qconvert.onnx_export.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """Opset 27 of ai.onnx: the first with LinearAttention and CausalConvWithState. Codes are multiplied in float32."""

    name: str = "standard"
    opset: int = 27
    unseen: float = -1e30

    def look_up(self, graph: GraphWriter, table: Weight, ids: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        if table.scheme is None:
            found = graph.op("Gather", table.stored(graph), ids, axis=0)
            return graph.cast(found, table.type, ir.DataType.FLOAT)
        flat = dequantize.rows_of(graph, table, graph.op("Reshape", ids, graph.integers(-1)))
        shape = graph.op("Concat", graph.op("Shape", ids), graph.integers(-1), axis=0)
        return graph.op("Reshape", flat, shape)

    def linear(self, graph: GraphWriter, x: ir.Value, weight: Weight, accuracy_level: int) -> ir.Value:
        """See ``OperatorSet``. Gemm, because it takes the matrix as it is stored: MatMul would have it transposed."""
        return gemm(graph, x, dequantize.matrix(graph, weight), weight.shape)

    def rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)

    def added_rms_norm(
        self, graph: GraphWriter, x: ir.Value, more: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """See ``OperatorSet``."""
        total = graph.op("Add", x, more)
        return total, self.rms_norm(graph, total, weight, eps)

    def gated_rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``."""
        shape = graph.op("Concat", graph.integers(0, 0, -1), graph.op("Shape", weight), axis=0)
        normal = self.rms_norm(graph, graph.op("Reshape", x, shape), weight, eps)
        return graph.op("Mul", side_by_side(graph, normal), silu(graph, gate))

    def rotate(
        self, graph: GraphWriter, x: ir.Value, cos: ir.Value, sin: ir.Value, *, heads: int, rotated: int
    ) -> ir.Value:
        """See ``OperatorSet``."""
        flat = side_by_side(graph, x)
        return graph.op("RotaryEmbedding", flat, cos, sin, num_heads=heads, rotary_embedding_dim=rotated)

    def attention(
        self,
        graph: GraphWriter,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        *,
        heads: int,
        key_heads: int,
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``."""
        inputs = query, key, value, bias, past_key, past_value
        return graph.ops("Attention", 3, *inputs, q_num_heads=heads, kv_num_heads=key_heads)

    def full_attention(
        self, graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value, *, heads: int
    ) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.op("Attention", query, key, value, q_num_heads=heads, kv_num_heads=heads)

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.ops("CausalConvWithState", 2, x, weight.dense(graph), None, past, activation="silu")[0]

    def delta_gates(
        self, graph: GraphWriter, a: ir.Value, dt_bias: ir.Value, minus_exp_a_log: ir.Value, b: ir.Value
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``."""
        step = graph.op("Softplus", graph.op("Add", a, dt_bias))
        return graph.op("Mul", step, minus_exp_a_log), graph.op("Sigmoid", b)

    def delta_rule(
        self,
        graph: GraphWriter,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        state: ir.Value,
        decay: ir.Value,
        beta: ir.Value,
        *,
        key_heads: int,
        value_heads: int,
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``. The operator wants a key head for each value head."""
        if key_heads != value_heads:
            served = np.arange(value_heads) // (value_heads // key_heads)
            query, key = (_repeated(graph, one, key_heads, served) for one in (query, key))
        return graph.ops(
            "LinearAttention", 2, query, key, value, state, decay, beta,
            q_num_heads=value_heads, kv_num_heads=value_heads, update_rule="gated_delta",
        )  # fmt: skip

    def experts(
        self,
        graph: GraphWriter,
        x: ir.Value,
        routing: Routing,
        gate_up: Weight,
        down: Weight,
        accuracy_level: int,
    ) -> ir.Value:
        """See ``OperatorSet``."""
        rows = graph.op("Reshape", x, graph.integers(-1, gate_up.shape[-1]))
        sent = visits(graph, routing, gate_up.shape[0])
        return graph.op("Reshape", loop_over_experts(graph, rows, sent, gate_up, down), graph.op("Shape", x))

    def gated_add(self, graph: GraphWriter, x: ir.Value, y: ir.Value, gate: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.op("Add", x, graph.op("Mul", y, gate))


def gemm(graph: GraphWriter, x: ir.Value, matrix: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """``x matrix^T``: x [B, S, K], matrix of ``shape`` [N, K]; [B, S, N]."""
    rows, cols = shape
    flat = graph.op("Reshape", x, graph.integers(-1, cols))
    product = graph.op("Gemm", flat, matrix, transB=1)
    after = graph.op("Concat", graph.op("Shape", x, start=0, end=2), graph.integers(rows), axis=0)
    return graph.op("Reshape", product, after)


def silu(graph: GraphWriter, x: ir.Value) -> ir.Value:
    """``x sigmoid(x)``."""
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _repeated(graph: GraphWriter, x: ir.Value, heads: int, served: np.ndarray) -> ir.Value:
    """The heads ``served`` of x [B, S, heads width], side by side."""
    apart = graph.op("Reshape", x, graph.integers(0, 0, heads, -1))
    return side_by_side(graph, graph.op("Gather", apart, graph.integers(*served.tolist()), axis=2))
