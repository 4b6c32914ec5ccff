"""ONNX Runtime's own operators, where the standard has none or slower ones."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import MICROSOFT, Attribute, GraphWriter
from qconvert.onnx_export.routing import Routing, scores
from qconvert.onnx_export.standard import Standard, silu
from qconvert.onnx_export.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrib(Standard):
    """``com.microsoft``, and opset 23 of ai.onnx: the first with Attention, RMSNormalization and RotaryEmbedding."""

    name: str = "contrib"
    opset: int = 23

    def look_up(self, graph: GraphWriter, table: Weight, ids: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        if table.scheme is None:
            return Standard.look_up(self, graph, table, ids)
        rows, cols = table.shape
        found = graph.op(
            "GatherBlockQuantized",
            table.codes(graph, (rows, cols * table.bits // 8)),
            ids,
            table.scales(graph),
            table.zero_points(graph),
            domain=MICROSOFT,
            bits=table.bits,
            block_size=table.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return graph.cast(found, table.type, ir.DataType.FLOAT)

    def linear(self, graph: GraphWriter, x: ir.Value, weight: Weight, accuracy_level: int) -> ir.Value:
        """See ``OperatorSet``."""
        if weight.scheme is None:
            return self.product(graph, x, weight)
        rows, cols = weight.shape
        block, kind = weight.block_size, self.computes_in(weight)
        made = graph.op(
            "MatMulNBits",
            graph.cast(x, ir.DataType.FLOAT, kind),
            weight.codes(graph, (rows, cols // block, block * weight.bits // 8)),
            weight.scales(graph),
            weight.zero_points(graph),
            domain=MICROSOFT,
            K=cols,
            N=rows,
            bits=weight.bits,
            block_size=block,
            **self.rounding(accuracy_level),
        )
        return graph.cast(made, kind, ir.DataType.FLOAT)

    def product(self, graph: GraphWriter, x: ir.Value, weight: Weight) -> ir.Value:
        """``x weight^T`` with a dense matrix, see ``linear``."""
        return graph.op("FusedMatMul", x, weight.dense(graph), domain=MICROSOFT, transB=1)

    def computes_in(self, weight: Weight) -> ir.DataType:
        """The type in which operators multiply with ``weight``; they are given it, and it is cast to that type."""
        return ir.DataType.FLOAT

    def rounding(self, accuracy_level: int) -> dict[str, Attribute]:
        """What tells an operator how to round activations."""
        return {"accuracy_level": accuracy_level}

    @property
    def stored_codes(self) -> dict[str, Attribute]:
        """What tells QMoE that codes lie as ``packed`` has them."""
        return {}

    def full_attention(
        self, graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value, *, heads: int
    ) -> ir.Value:
        """See ``OperatorSet``. The kernel keeps no scores of all pairs of tokens, of which an image has many."""
        return graph.op("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads)

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """See ``OperatorSet``. The CPU's kernel takes longer for its own activation than for everything else."""
        made = graph.ops("CausalConvWithState", 2, x, weight.dense(graph), None, past, domain=MICROSOFT)[0]
        return silu(graph, made)

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
        kind = self.computes_in(gate_up)
        given = [graph.cast(one, ir.DataType.FLOAT, kind) for one in (x, scored.logits)]
        if gate_up.scheme is None:
            first, second = (graph.cast(one.stored(graph), one.type, kind) for one in (gate_up, down))
            made = graph.op("MoE", *given, first, None, second, domain=MICROSOFT, **both)
            return _times(graph, graph.cast(made, kind, ir.DataType.FLOAT), scored.total)
        blocks: dict[str, Attribute] = {"block_size": gate_up.block_size} if gate_up.block_size else {}
        made = graph.op(
            "QMoE",
            *given,
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
            **self.rounding(accuracy_level),
            **self.stored_codes,
            **both,
            **blocks,
        )
        return _times(graph, graph.cast(made, kind, ir.DataType.FLOAT), scored.total)

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
