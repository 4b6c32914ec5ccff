"""ONNX Runtime's own operators, where the standard has none or slower ones."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import MICROSOFT, Attribute, GraphWriter
from qconvert.onnx_export.routing import Routing, scores
from qconvert.onnx_export.standard import Standard
from qconvert.onnx_export.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrib(Standard):
    """``com.microsoft``, and opset 23 of ai.onnx: the first with Attention, RMSNormalization and RotaryEmbedding."""

    name: str = "contrib"
    opset: int = 23

    def linear(self, graph: GraphWriter, x: ir.Value, weight: Weight, accuracy_level: int) -> ir.Value:
        """See ``OperatorSet``."""
        rows, cols = weight.shape
        if weight.scheme is None:
            return graph.op("FusedMatMul", x, weight.dense(graph), domain=MICROSOFT, transB=1)
        block = weight.block_size
        return graph.op(
            "MatMulNBits",
            x,
            weight.codes(graph, (rows, cols // block, block * weight.bits // 8)),
            weight.scales(graph),
            weight.zero_points(graph),
            domain=MICROSOFT,
            K=cols,
            N=rows,
            bits=weight.bits,
            block_size=block,
            accuracy_level=accuracy_level,
        )

    def gated_rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.op("GatedRMSNorm", x, weight, gate, domain=MICROSOFT, epsilon=eps, activation="silu")

    def full_attention(
        self, graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value, *, heads: int
    ) -> ir.Value:
        """See ``OperatorSet``. The kernel keeps no scores of all pairs of tokens, of which an image has many."""
        return graph.op("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads)

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.ops(
            "CausalConvWithState", 2, x, weight.dense(graph), None, past, domain=MICROSOFT, activation="silu"
        )[0]

    def delta_gates(
        self, graph: GraphWriter, a: ir.Value, dt_bias: ir.Value, minus_exp_a_log: ir.Value, b: ir.Value
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``."""
        return graph.ops("LinearAttentionGate", 2, a, dt_bias, minus_exp_a_log, b, domain=MICROSOFT)

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
        """See ``OperatorSet``."""
        return graph.ops(
            "LinearAttention", 2, query, key, value, state, decay, beta, domain=MICROSOFT,
            q_num_heads=key_heads, kv_num_heads=value_heads, update_rule="gated_delta",
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
        scored = scores(graph, routing)
        both: dict[str, Attribute] = {
            "k": scored.chosen,
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        if gate_up.scheme is None:
            weights = gate_up.dense(graph), None, down.dense(graph)
            return _times(graph, graph.op("MoE", x, scored.logits, *weights, domain=MICROSOFT, **both), scored.total)
        blocks: dict[str, Attribute] = {"block_size": gate_up.block_size} if gate_up.block_size else {}
        made = graph.op(
            "QMoE",
            x,
            scored.logits,
            _packed(graph, gate_up),
            gate_up.scales(graph),
            None,
            _packed(graph, down),
            down.scales(graph),
            None,
            None,
            None,
            None,
            gate_up.zero_points(graph),
            down.zero_points(graph),
            domain=MICROSOFT,
            expert_weight_bits=gate_up.bits,
            accuracy_level=accuracy_level,
            **both,
            **blocks,
        )
        return _times(graph, made, scored.total)

    def gated_add(self, graph: GraphWriter, x: ir.Value, y: ir.Value, gate: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.op("GatedAdd", x, y, gate, domain=MICROSOFT)


def _times(graph: GraphWriter, made: ir.Value, total: ir.Value | None) -> ir.Value:
    """Made [B, S, D] times total [B S, 1]."""
    if total is None:
        return made
    shape = graph.op("Concat", graph.op("Shape", made, start=0, end=2), graph.integers(1), axis=0)
    return graph.op("Mul", made, graph.op("Reshape", total, shape))


def _packed(graph: GraphWriter, weight: Weight) -> ir.Value:
    """Codes of stacked experts: [E, N, K bits / 8]."""
    experts, rows, cols = weight.shape
    return weight.codes(graph, (experts, rows, cols * weight.bits // 8))
