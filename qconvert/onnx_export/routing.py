"""Which experts run for which tokens, and what their outputs count: the router's choices, and a folded shared expert.

Shapes: T tokens, E experts that the router scores, k of them for each token, n folded experts behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qconvert.onnx_export.graph_writer import GraphWriter

NEVER = -1e30
"""Score of an expert that is not chosen. Finite, for differences of infinities are NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the router says.

    Attributes:
        logits: [T, E].
        chosen: k, the experts with the largest logits; their softmax is what they count.
        gate: [T, 1]; each folded expert counts sigmoid(gate), whatever is chosen. ``None`` where there is none.
        folded: n, experts of the stacks that ``logits`` does not score: the last ones.
    """

    logits: ir.Value
    chosen: int
    gate: ir.Value | None = None
    folded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """The experts that run for each token, int64 [T, k + n], and what their outputs count, [T, k + n]."""

    experts: ir.Value
    shares: ir.Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The same for an operator that chooses by itself.

    Attributes:
        logits: [T, E + n].
        chosen: how many of them run: k + n.
        total: [T, 1], what the result is to be multiplied with; ``None`` for 1.
    """

    logits: ir.Value
    chosen: int
    total: ir.Value | None


def visits(graph: GraphWriter, routing: Routing, stored: int) -> Visits:
    """Of E + n = ``stored`` experts. A softmax of the largest logits is a softmax of all, normalised again."""
    largest, experts = graph.ops("TopK", 2, routing.logits, graph.integers(routing.chosen), axis=-1)
    shares = graph.op("Softmax", largest, axis=-1)
    if routing.gate is None:
        return Visits(experts=experts, shares=shares)
    tokens = graph.op("Shape", routing.gate, start=0, end=1)
    spread = graph.op("Concat", tokens, graph.integers(routing.folded), axis=0)
    always = graph.op("Expand", graph.integers(*range(stored - routing.folded, stored)), spread)
    weights = graph.op("Expand", graph.op("Sigmoid", routing.gate), spread)
    return Visits(
        experts=graph.op("Concat", experts, always, axis=1), shares=graph.op("Concat", shares, weights, axis=1)
    )


def scores(graph: GraphWriter, routing: Routing) -> Scores:
    """For an operator that takes the softmax of the largest logits, which sums to 1.

    With a folded shared expert weights sum to ``1 + n sigmoid(gate)``. So it gets the logarithms of the weights, far
    lower ones for experts that the router does not choose, and its result is multiplied with that sum.
    """
    if routing.gate is None:
        return Scores(logits=routing.logits, chosen=routing.chosen, total=None)
    largest, experts = graph.ops("TopK", 2, routing.logits, graph.integers(routing.chosen), axis=-1)
    never = graph.op("Expand", graph.float(NEVER), graph.op("Shape", routing.logits))
    routed = graph.op("ScatterElements", never, experts, graph.op("LogSoftmax", largest, axis=-1), axis=1)
    # log(sigmoid(x)) = -softplus(-x)
    always = graph.op("Neg", graph.op("Softplus", graph.op("Neg", routing.gate)))
    weights = graph.op("Sigmoid", routing.gate)
    return Scores(
        logits=graph.op("Concat", routed, *[always] * routing.folded, axis=1),
        chosen=routing.chosen + routing.folded,
        total=graph.op("Add", graph.float(1.0), graph.op("Mul", graph.float(float(routing.folded)), weights)),
    )
