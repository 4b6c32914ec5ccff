"""Model-local functions for what is newer than opset 21, for runtimes that do not know it.

The functions take their sizes from the shapes of what they are given. Shapes as in ``blocks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import Function, GraphWriter, Parameter
from qconvert.onnx_export.heads import side_by_side
from qconvert.onnx_export.standard import Standard, silu
from qconvert.onnx_export.weight import Weight

EPSILON = Parameter(name="epsilon", type=ir.AttributeType.FLOAT)
CHANNELS = Parameter(name="channels", type=ir.AttributeType.INT)
HEADS = Parameter(name="heads", type=ir.AttributeType.INT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions(Standard):
    """Opset 21 of ai.onnx, the first with codes in blocks, and a ``qconvert`` domain of functions written in it."""

    name: str = "functions"
    opset: int = 21

    def rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.call(RMS_NORM, x, weight, epsilon=eps)[0]

    def gated_rms_norm(self, graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value, eps: float) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.call(GATED_RMS_NORM, x, weight, gate, epsilon=eps)[0]

    def rotate(
        self, graph: GraphWriter, x: ir.Value, cos: ir.Value, sin: ir.Value, *, heads: int, rotated: int
    ) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.call(ROTARY_EMBEDDING, x, cos, sin)[0]

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
        return graph.call(ATTENTION, query, key, value, bias, past_key, past_value)

    def full_attention(
        self, graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value, *, heads: int
    ) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.call(FULL_ATTENTION, query, key, value, heads=heads)[0]

    def causal_conv(self, graph: GraphWriter, x: ir.Value, weight: Weight, past: ir.Value) -> ir.Value:
        """See ``OperatorSet``."""
        return graph.call(CAUSAL_CONV, x, weight.dense(graph), past, channels=weight.shape[0])[0]

    def delta_gates(
        self, graph: GraphWriter, a: ir.Value, dt_bias: ir.Value, minus_exp_a_log: ir.Value, b: ir.Value
    ) -> tuple[ir.Value, ...]:
        """See ``OperatorSet``."""
        return graph.call(DELTA_GATES, a, dt_bias, minus_exp_a_log, b)

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
        return graph.call(GATED_DELTA_RULE, query, key, value, state, decay, beta)


def _rms_norm(graph: GraphWriter, x: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.integers(-1), keepdims=1)
    length = graph.op("Sqrt", graph.op("Add", mean, graph.op("Constant", value_float=EPSILON)))
    return (graph.op("Mul", graph.op("Div", x, length), weight),)


def _gated_rms_norm(graph: GraphWriter, x: ir.Value, weight: ir.Value, gate: ir.Value) -> Sequence[ir.Value]:
    shape = _sizes(graph, 0, 0, -1, graph.op("Shape", weight))
    (normal,) = graph.call(RMS_NORM, graph.op("Reshape", x, shape), weight, epsilon=EPSILON)
    return (graph.op("Mul", side_by_side(graph, normal), silu(graph, gate)),)


def _rotary_embedding(graph: GraphWriter, x: ir.Value, cos: ir.Value, sin: ir.Value) -> Sequence[ir.Value]:
    half = graph.op("Shape", cos, start=2)
    rest = graph.op("Sub", graph.op("Sub", graph.op("Shape", x, start=3), half), half)
    first, second, still = graph.ops("Split", 3, x, graph.op("Concat", half, half, rest, axis=0), axis=3)
    cos, sin = (graph.op("Unsqueeze", one, graph.integers(2)) for one in (cos, sin))
    turned = (
        graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
        graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
    )
    return (side_by_side(graph, graph.op("Concat", *turned, still, axis=3)),)


def _attention(
    graph: GraphWriter,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    bias: ir.Value,
    past_key: ir.Value,
    past_value: ir.Value,
) -> Sequence[ir.Value]:
    """Scores are [B, M, H / M, S, A]: keys and values are repeated by no copy."""
    heads, width = (graph.op("Shape", past_key, start=axis, end=axis + 1) for axis in (1, 3))
    keys, values = (
        graph.op("Concat", past, graph.op("Transpose", _apart(graph, new, heads, -1), perm=(0, 2, 1, 3)), axis=2)
        for past, new in ((past_key, key), (past_value, value))
    )
    root = graph.op("Sqrt", graph.op("Cast", width, to=ir.DataType.FLOAT.value))
    asked = graph.op("Transpose", _apart(graph, graph.op("Div", query, root), heads, -1, width), perm=(0, 2, 3, 1, 4))
    shared = graph.integers(2)
    across = graph.op("Unsqueeze", graph.op("Transpose", keys, perm=(0, 1, 3, 2)), shared)
    scores = graph.op("Add", graph.op("MatMul", asked, across), graph.op("Unsqueeze", bias, shared))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Unsqueeze", values, shared))
    return side_by_side(graph, graph.op("Transpose", mixed, perm=(0, 3, 1, 2, 4))), keys, values


def _full_attention(graph: GraphWriter, query: ir.Value, key: ir.Value, value: ir.Value) -> Sequence[ir.Value]:
    heads = graph.op("Unsqueeze", graph.op("Constant", value_int=HEADS), graph.integers(0))
    query, key, value = (_apart(graph, one, heads, -1) for one in (query, key, value))
    root = graph.op("Sqrt", graph.op("Cast", graph.op("Shape", query, start=3), to=ir.DataType.FLOAT.value))
    asked = graph.op("Transpose", graph.op("Div", query, root), perm=(0, 2, 1, 3))
    scores = graph.op("MatMul", asked, graph.op("Transpose", key, perm=(0, 2, 3, 1)))
    values = graph.op("Transpose", value, perm=(0, 2, 1, 3))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
    return (side_by_side(graph, graph.op("Transpose", mixed, perm=(0, 2, 1, 3))),)


def _causal_conv(graph: GraphWriter, x: ir.Value, weight: ir.Value, past: ir.Value) -> Sequence[ir.Value]:
    return (silu(graph, graph.op("Conv", graph.op("Concat", past, x, axis=2), weight, group=CHANNELS)),)


def _delta_gates(
    graph: GraphWriter, a: ir.Value, dt_bias: ir.Value, minus_exp_a_log: ir.Value, b: ir.Value
) -> Sequence[ir.Value]:
    return Standard().delta_gates(graph, a, dt_bias, minus_exp_a_log, b)


def _gated_delta_rule(
    graph: GraphWriter,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    state: ir.Value,
    decay: ir.Value,
    beta: ir.Value,
) -> Sequence[ir.Value]:
    """A scan over the tokens; all is [S, B, Hk, Hv / Hk, rows, columns], so that key heads are repeated by no copy."""
    width = graph.op("Shape", state, start=2, end=3)
    value_width = graph.op("Shape", state, start=3)
    query, key = (_apart(graph, one, -1, 1, 1, width) for one in (query, key))
    heads = graph.op("Shape", query, start=2, end=3)
    root = graph.op("Sqrt", graph.op("Cast", width, to=ir.DataType.FLOAT.value))
    memory = graph.op("Reshape", state, _sizes(graph, 0, heads, -1, width, value_width))
    sequences = (
        graph.op("Transpose", one, perm=(1, 0, 2, 3, 4, 5))
        for one in (
            graph.op("Div", query, root),
            key,
            _apart(graph, value, heads, -1, 1, value_width),
            _apart(graph, graph.op("Exp", decay), heads, -1, 1, 1),
            _apart(graph, beta, heads, -1, 1, 1),
        )
    )
    with graph.body("token") as body:
        names = ("memory", "query", "key", "value", "kept", "strength")
        before, asked, k, v, kept, strength = (body.input(name, ir.DataType.FLOAT) for name in names)
        left = graph.op("Mul", before, kept)
        wrong = graph.op("Mul", graph.op("Sub", v, graph.op("MatMul", k, left)), strength)
        after = graph.op("Add", left, graph.op("Mul", graph.op("Transpose", k, perm=(0, 1, 2, 4, 3)), wrong))
        body.output(after, ir.DataType.FLOAT)
        body.output(graph.op("MatMul", asked, after), ir.DataType.FLOAT)
    last, read = graph.ops("Scan", 2, memory, *sequences, body=body.graph, num_scan_inputs=5)
    of_tokens = side_by_side(graph, graph.op("Transpose", read, perm=(1, 0, 2, 3, 4, 5)))
    return of_tokens, graph.op("Reshape", last, graph.op("Shape", state))


def _apart(graph: GraphWriter, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
    """[B, S, ...] with these sizes after the first two."""
    return graph.op("Reshape", x, _sizes(graph, 0, 0, *sizes))


def _sizes(graph: GraphWriter, *sizes: int | ir.Value) -> ir.Value:
    """A shape for Reshape, of numbers and int64 [1]."""
    parts = [graph.integers(size) if isinstance(size, int) else size for size in sizes]
    return graph.op("Concat", *parts, axis=0)


RMS_NORM = Function(
    name="RMSNormalization", inputs=("x", "weight"), outputs=("y",), parameters=(EPSILON,), body=_rms_norm
)
GATED_RMS_NORM = Function(
    name="GatedRMSNormalization",
    inputs=("x", "weight", "gate"),
    outputs=("y",),
    parameters=(EPSILON,),
    body=_gated_rms_norm,
)
ROTARY_EMBEDDING = Function(name="RotaryEmbedding", inputs=("x", "cos", "sin"), outputs=("y",), body=_rotary_embedding)
ATTENTION = Function(
    name="Attention",
    inputs=("query", "key", "value", "bias", "past_key", "past_value"),
    outputs=("y", "present_key", "present_value"),
    body=_attention,
)
FULL_ATTENTION = Function(
    name="FullAttention", inputs=("query", "key", "value"), outputs=("y",), parameters=(HEADS,), body=_full_attention
)
CAUSAL_CONV = Function(
    name="CausalConv", inputs=("x", "weight", "past"), outputs=("y",), parameters=(CHANNELS,), body=_causal_conv
)
DELTA_GATES = Function(
    name="DeltaGates", inputs=("a", "dt_bias", "minus_exp_a_log", "b"), outputs=("decay", "beta"), body=_delta_gates
)
GATED_DELTA_RULE = Function(
    name="GatedDeltaRule",
    inputs=("query", "key", "value", "past_state", "decay", "beta"),
    outputs=("y", "present_state"),
    body=_gated_delta_rule,
)
