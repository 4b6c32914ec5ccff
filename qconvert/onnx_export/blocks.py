"""The blocks of a decoder as ONNX subgraphs; the formulas are those of ``reference_model``.

Shapes: B batch, S new tokens, P tokens before, A = P + S all tokens, D hidden, H / M query and key-value heads, K their
width, R rotated dimensions of a head, Hk / Hv key and value heads of linear attention, dk / dv their widths, C channels
of the convolution, W its width, E experts, F their width. Everything is float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qconvert.core.role import Kind
from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.heads import per_head, side_by_side
from qconvert.onnx_export.joining import ATTENTION_INPUTS, DELTA_GATES, SHARED_INPUTS, joined, runs
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.placing import Packing
from qconvert.onnx_export.routing import Routing
from qconvert.onnx_export.weight import Weights
from reference_model.config import TextConfig

L2_EPSILON = 1e-6
"""Added to the sum of squares of queries and keys of linear attention."""


class Decoder:
    """Writes the layers of one decoder; what all of them share is written once.

    Attributes:
        bias: what attention adds to scores [B, 1, S, A]: 0, or a very negative number where a key is not seen.
        packing: how linear attention finds the real tokens side by side.
        cos, sin: of the rotation [B, S, R / 2].
    """

    def __init__(
        self,
        graph: GraphWriter,
        operators: OperatorSet,
        config: TextConfig,
        weights: Weights,
        *,
        bias: ir.Value,
        packing: Packing,
        rotation: tuple[ir.Value, ir.Value],
        accuracy_level: int,
    ) -> None:
        self.graph = graph
        self.operators = operators
        self.config = config
        self.weights = weights
        self.bias = bias
        self.packing = packing
        self.cos, self.sin = rotation
        self.accuracy_level = accuracy_level

    def linear(self, x: ir.Value, kind: Kind, layer: int) -> ir.Value:
        """Multiply with a matrix of a layer."""
        return self.operators.linear(self.graph, x, self.weights(kind, layer), self.accuracy_level)

    def products(self, x: ir.Value, kinds: Sequence[Kind], layer: int) -> list[ir.Value]:
        """Multiply with several matrices of a layer, of which those that are stored alike are one."""
        found: list[ir.Value] = []
        for run in runs((self.weights.role(kind, layer), self.weights(kind, layer)) for kind in kinds):
            made = self.operators.linear(self.graph, x, joined(run), self.accuracy_level)
            if len(run) > 1:
                sizes = self.graph.integers(*(one.shape[0] for one in run))
                found += self.graph.ops("Split", len(run), made, sizes, axis=-1)
            else:
                found.append(made)
        return found

    def norm(self, x: ir.Value, kind: Kind, layer: int | None = None) -> ir.Value:
        """One of the RMS norms whose weights are offsets from 1."""
        weight = self.weights(kind, layer).dense(self.graph)
        return self.operators.rms_norm(self.graph, x, weight, self.config.rms_norm_eps)

    def added_norm(
        self, x: ir.Value, more: ir.Value, kind: Kind, layer: int | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """``x + more`` and its ``norm``."""
        weight = self.weights(kind, layer).dense(self.graph)
        return self.operators.added_rms_norm(self.graph, x, more, weight, self.config.rms_norm_eps)

    def packed(self, x: ir.Value) -> ir.Value:
        """X [B, S, D] with the real tokens first, as linear attention takes them."""
        return self.graph.op("GatherND", x, self.packing.order, batch_dims=1)

    def unpacked(self, x: ir.Value) -> ir.Value:
        """The inverse of ``packed``."""
        return self.graph.op("GatherND", x, self.packing.inverse, batch_dims=1)

    def last_real(self, x: ir.Value) -> ir.Value:
        """X [B, S, D] of the last real token of each row, padding where none is: [B, 1, D]; x is packed."""
        return self.graph.op("GatherND", x, self.packing.last, batch_dims=1)

    def attention(
        self, x: ir.Value, layer: int, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gated attention: x [B, S, D], past [B, M, P, K]; gives [B, S, D], and keys and values of all [B, M, A, K]."""
        graph, config = self.graph, self.config
        both, key, value = self.products(x, ATTENTION_INPUTS, layer)
        query, gate = graph.ops("Split", 2, per_head(graph, both, 2 * config.head_dim), axis=-1, num_outputs=2)
        key = per_head(graph, key, config.head_dim)
        query = self._rotate(self.norm(query, Kind.ATTENTION_QUERY_NORM, layer), config.num_attention_heads)
        key = self._rotate(self.norm(key, Kind.ATTENTION_KEY_NORM, layer), config.num_key_value_heads)
        mixed, all_keys, all_values = self.operators.attention(
            graph, query, key, value, self.bias, past_key, past_value,
            heads=config.num_attention_heads, key_heads=config.num_key_value_heads,
        )  # fmt: skip
        gated = graph.op("Mul", mixed, graph.op("Sigmoid", side_by_side(graph, gate)))
        return self.linear(gated, Kind.ATTENTION_OUTPUT, layer), all_keys, all_values

    def _rotate(self, x: ir.Value, heads: int) -> ir.Value:
        """Rotate the first R dimensions of each head: [B, S, heads, K] -> [B, S, heads K]."""
        rotated = self.config.rotary_dim
        return self.operators.rotate(self.graph, x, self.cos, self.sin, heads=heads, rotated=rotated)

    def linear_attention(
        self, x: ir.Value, layer: int, past_conv: ir.Value, past_state: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gated DeltaNet: x [B, S, D], past_conv [B, C, W - 1], past_state [B, Hv, dk, dv]; gives [B, S, D] and both.

        Tokens are packed. Padding changes no state: it is behind the real tokens, its decay and strength are zero.
        """
        graph, config = self.graph, self.config
        qkv, recent = self._convolution(self.linear(x, Kind.LINEAR_QKV, layer), layer, past_conv)
        keys, value = graph.ops("Split", 2, qkv, graph.integers(2 * config.key_dim, config.value_dim), axis=-1)
        query, key = graph.ops("Split", 2, self._unit(keys), axis=-1, num_outputs=2)
        b, a = self.products(x, DELTA_GATES, layer)
        decay, beta = self.operators.delta_gates(
            graph,
            a,
            self.weights(Kind.LINEAR_DT_BIAS, layer).dense(graph),
            self.weights(Kind.LINEAR_A_LOG, layer).dense(graph),
            b,
        )
        read, state = self.operators.delta_rule(
            graph,
            query,
            key,
            value,
            past_state,
            graph.op("Mul", decay, self.packing.real),
            graph.op("Mul", beta, self.packing.real),
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
        )
        gated = self.operators.gated_rms_norm(
            graph,
            read,
            self.weights(Kind.LINEAR_NORM, layer).dense(graph),
            self.linear(x, Kind.LINEAR_Z, layer),
            config.rms_norm_eps,
        )
        return self.linear(gated, Kind.LINEAR_OUTPUT, layer), recent, state

    def _convolution(self, raw: ir.Value, layer: int, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``silu(conv(raw))`` [B, S, C] of raw [B, S, C] behind past [B, C, W - 1], and the past of the next call."""
        graph = self.graph
        kernel = self.weights(Kind.LINEAR_CONV, layer)
        mixed = self.operators.causal_conv(graph, graph.op("Transpose", raw, perm=(0, 2, 1)), kernel, past)
        inputs = graph.op("Concat", graph.op("Transpose", past, perm=(0, 2, 1)), raw, axis=1)
        recent = graph.op("GatherND", inputs, self.packing.window, batch_dims=1)
        return graph.op("Transpose", mixed, perm=(0, 2, 1)), graph.op("Transpose", recent, perm=(0, 2, 1))

    def _unit(self, x: ir.Value) -> ir.Value:
        """``x / sqrt(sum(x ** 2) + L2_EPSILON)`` of each key head: an RMS norm of that many dimensions.

        ``rsqrt(sum + e) = rsqrt(mean + e / dk) / sqrt(dk)``; [B, S, 2 Hk dk], queries and keys, the same.
        """
        graph, width = self.graph, self.config.linear_key_head_dim
        scale = graph.floats(np.full(width, width**-0.5))
        return side_by_side(graph, self.operators.rms_norm(graph, per_head(graph, x, width), scale, L2_EPSILON / width))

    def moe(self, x: ir.Value, layer: int) -> tuple[ir.Value, ir.Value]:
        """``experts(x) + sigmoid(shared_expert_gate x) * shared_expert(x)`` for x [B, S, D].

        A folded shared expert is among the experts: the last of them, always on. Also gives the router's logits
        [B, S, E].
        """
        graph, config = self.graph, self.config
        scored = self.linear(x, Kind.ROUTER, layer)
        logits = graph.op("Reshape", scored, graph.integers(-1, config.num_experts))
        routing = Routing(logits=logits, chosen=config.num_experts_per_tok)
        gate = self.linear(x, Kind.SHARED_EXPERT_GATE, layer)
        if config.folded_experts:
            always = graph.op("Reshape", gate, graph.integers(-1, 1))
            routing = replace(routing, gate=always, folded=config.folded_experts)
        made = self.operators.experts(
            graph,
            x,
            routing,
            self.weights(Kind.EXPERT_GATE_UP, layer),
            self.weights(Kind.EXPERT_DOWN, layer),
            self.accuracy_level,
        )
        if config.folded_experts:
            return made, scored
        opened, up = self.products(x, SHARED_INPUTS, layer)
        opened = graph.op("Mul", opened, graph.op("Sigmoid", opened))
        inner = graph.op("Mul", opened, up)
        shared = self.linear(inner, Kind.SHARED_DOWN, layer)
        return self.operators.gated_add(graph, made, shared, graph.op("Sigmoid", gate)), scored
