"""What a decoder asks of the operators that it is written in.

Shapes as in ``blocks``; everything is float32 unless said otherwise.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import GraphWriter
from qconvert.onnx_export.routing import Routing
from qconvert.onnx_export.weight import Weight


class OperatorSet(Protocol):
    """One way to write the same decoder.

    ``accuracy_level`` is of products with integer codes: 4 lets those operators round activations to 8 bits that can.

    Attributes:
        name: as in ``--ops``.
        opset: version of the standard operators.
        unseen: see below.
    """

    @property
    def name(self) -> str:
        """What `--ops` calls it."""

    @property
    def opset(self) -> int:
        """Version of the standard's operators that it is written in."""

    @property
    def unseen(self) -> float:
        """What is added to scores of keys that are not seen: far below any score, and finite.

        Where a padding token sees no key at all, infinities would make NaN of it.
        """

    def look_up(self, graph: GraphWriter, table: Weight, ids: ir.Value) -> ir.Value:
        """Rows of a table [V, D], dense or in integer codes: ids int64 [B, S]; [B, S, D]."""

    def linear(self, graph: GraphWriter, x: ir.Value, weight: Weight, accuracy_level: int) -> ir.Value:
        """``x weight^T``: x [B, S, K], weight [N, K] dense or in integer codes; [B, S, N]."""

    def rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension."""

    def added_rms_norm(
        self, graph: GraphWriter, x: ir.Value, more: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """``x + more``, and its ``rms_norm``: [B, S, D] all."""

    def gated_rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value, eps: float) -> ir.Value:
        """``rms_norm(x) * silu(gate)``, the norm over each head: x and gate [B, S, Hv dv], weight [dv]."""

    def rotate(
        self, graph: GraphWriter, x: ir.Value, cos: ir.Value, sin: ir.Value, *, heads: int, rotated: int
    ) -> ir.Value:
        """Rotate the first R dimensions of each head, i with i + R / 2: [B, S, heads, K] -> [B, S, heads K]."""

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
        """``softmax(q k^T / sqrt(K) + bias) v``, each key head for H / M consecutive query heads.

        query [B, S, H K], key and value [B, S, M K], bias [B, 1, S, A], past [B, M, P, K]; gives [B, S, H K], and keys
        and values of all tokens [B, M, A, K].
        """

    def full_attention(
        self, graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value, *, heads: int
    ) -> ir.Value:
        """``softmax(q k^T / sqrt(K)) v``, every token sees every other: all [B, S, H K], the same."""

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """``silu(conv(x))`` of each channel behind its past: x [B, C, S], weight [C, 1, W], past [B, C, W - 1]."""

    def delta_gates(
        self, graph: GraphWriter, a: ir.Value, dt_bias: ir.Value, minus_exp_a_log: ir.Value, b: ir.Value
    ) -> tuple[ir.Value, ...]:
        """``minus_exp_a_log * softplus(a + dt_bias)`` and ``sigmoid(b)``: a and b [B, S, Hv], the others [Hv]."""

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
        """The gated delta rule, each key head for Hv / Hk consecutive value heads.

        Of each token: ``S <- exp(decay) S; S <- S + beta k (v - S^T k)^T; out = S^T q / sqrt(dk)``. query and key
        [B, S, Hk dk], value [B, S, Hv dv], state [B, Hv, dk, dv], decay and beta [B, S, Hv]; gives [B, S, Hv dv] and
        the state. Source: reference_model/delta_rule.py.
        """

    def experts(
        self,
        graph: GraphWriter,
        x: ir.Value,
        routing: Routing,
        gate_up: Weight,
        down: Weight,
        accuracy_level: int,
    ) -> ir.Value:
        """``sum_e share_e down_e (silu(gate_e x) * up_e x)`` over the experts that ``routing`` sends each token to.

        x [B, S, D], gate_up [E + n, 2F, D] whose rows take turns, down [E + n, D, F], T = B S tokens.
        """

    def gated_add(self, graph: GraphWriter, x: ir.Value, y: ir.Value, gate: ir.Value) -> ir.Value:
        """``x + gate * y``: x and y [B, S, D], gate [B, S, 1]."""
