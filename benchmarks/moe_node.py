"""A mixture-of-experts block as one ONNX graph around QMoE, its shared expert folded in or beside it.

Shapes: T tokens, D hidden, E experts, k experts a token, F width of an expert, S width of the shared one, b inputs that
share a scale. Layouts and inputs as ONNX Runtime 1.32 has them, contrib operators QMoE and MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconvert.core.quantized import QuantizedTensor

MICROSOFT = "com.microsoft"
ALWAYS = 2.0
"""Selects a folded expert before any other: probabilities are at most 1."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Four-bit matrices: ``codes`` + 8 [..., N, K/2], the first of a byte in its low half; ``scales`` [..., N, K/b]."""

    codes: Bytes
    scales: Floats

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return 2 * int(self.codes.shape[-1]) // int(self.scales.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer's experts.

    Attributes:
        router: [E, D], the rows of routed experts only.
        shared_gate: [1, D].
        gate_up: [E + n, 2F, D], a gate row before its up row; n of a folded shared expert.
        down: [E + n, D, F].
        shared: gate, up [S, D] and down [D, S] of a shared expert beside them; none where it is folded.
    """

    router: Floats
    shared_gate: Floats
    gate_up: Packed
    down: Packed
    top_k: int
    shared: tuple[Packed, Packed, Packed] | None = None

    @property
    def folded(self) -> int:
        """Experts that hold the shared one."""
        return len(self.down.codes) - len(self.router)


def pack(matrix: QuantizedTensor) -> Packed:
    """A symmetric int4 matrix with groups."""
    codes = (matrix.codes.to(torch.int16) + 8).to(torch.uint8)
    low, high = codes[:, ::2], codes[:, 1::2]
    return Packed(codes=(low | high << 4).numpy(), scales=matrix.scale.to(torch.float32).numpy())


def in_turns(gate: Packed, up: Packed) -> Packed:
    """Rows of gate and up, g0, u0, g1, u1 and so on."""
    *experts, rows, _ = gate.codes.shape
    codes, scales = np.stack((gate.codes, up.codes), axis=-2), np.stack((gate.scales, up.scales), axis=-2)
    return Packed(codes=codes.reshape(*experts, 2 * rows, -1), scales=scales.reshape(*experts, 2 * rows, -1))


def stacked(matrices: Sequence[Packed]) -> Packed:
    """Matrices of experts as one."""
    return Packed(codes=np.stack([one.codes for one in matrices]), scales=np.stack([one.scales for one in matrices]))


def block_model(block: Block, *, accuracy_level: int = 0) -> onnx.ModelProto:
    """The graph: ``x`` float32 [T, D] -> ``y`` [T, D].

    A folded shared expert is selected by a probability that nothing exceeds, and weighed apart from it: QMoE takes
    ``router_weights`` for what outputs count, as they are where they are not normalised. ``accuracy_level`` 0 computes
    in float32, 4 rounds activations to eight bits.
    """
    graph = _Graph()
    hidden = block.router.shape[1]
    logits = graph.op("MatMul", "x", graph.constant(np.ascontiguousarray(block.router.T)))
    share = graph.op("Sigmoid", graph.op("MatMul", "x", graph.constant(np.ascontiguousarray(block.shared_gate.T))))
    if block.folded:
        chances = graph.op("Softmax", logits, axis=-1)
        best, _ = graph.ops("TopK", 2, chances, graph.constant(np.array([block.top_k], np.int64)), axis=-1)
        total = graph.op("ReduceSum", best, graph.constant(np.array([1], np.int64)), keepdims=1)
        always = graph.op(
            "Add", graph.op("Mul", share, graph.constant(np.float32(0))), graph.constant(np.float32(ALWAYS))
        )
        chosen = graph.op("Concat", chances, *[always] * block.folded, axis=1)
        weights = graph.op("Concat", graph.op("Div", chances, total), *[share] * block.folded, axis=1)
        out = _qmoe(graph, block, chosen, weights, accuracy_level)
    else:
        out = _qmoe(graph, block, logits, "", accuracy_level)
    if block.shared is not None:
        gate, up, down = block.shared
        opened = _linear(graph, "x", gate, accuracy_level)
        opened = graph.op("Mul", opened, graph.op("Sigmoid", opened))
        inner = graph.op("Mul", opened, _linear(graph, "x", up, accuracy_level))
        out = graph.op("Add", out, graph.op("Mul", share, _linear(graph, inner, down, accuracy_level)))
    graph.nodes.append(helper.make_node("Identity", [out], ["y"]))
    described = helper.make_graph(
        graph.nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", hidden])],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(described, opset_imports=opsets, ir_version=10)


def _qmoe(graph: _Graph, block: Block, chosen: str, weights: str, accuracy_level: int) -> str:
    inputs = ["x", chosen, *_constants(graph, block.gate_up), "", *_constants(graph, block.down)]
    if weights:
        inputs += [""] * (14 - len(inputs)) + [weights]
    return graph.op(
        "QMoE",
        *inputs,
        domain=MICROSOFT,
        k=block.top_k + block.folded,
        normalize_routing_weights=0 if weights else 1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        expert_weight_bits=4,
        block_size=block.down.block,
        accuracy_level=accuracy_level,
    )


def _linear(graph: _Graph, x: str, weight: Packed, accuracy_level: int) -> str:
    rows, half = weight.codes.shape
    blocked = Packed(codes=weight.codes.reshape(rows, -1, weight.block // 2), scales=weight.scales)
    return graph.op(
        "MatMulNBits",
        x,
        *_constants(graph, blocked),
        domain=MICROSOFT,
        K=2 * half,
        N=rows,
        bits=4,
        block_size=weight.block,
        accuracy_level=accuracy_level,
    )


def _constants(graph: _Graph, matrix: Packed) -> tuple[str, str]:
    return graph.constant(matrix.codes), graph.constant(matrix.scales)


@dataclass(slots=True)
class _Graph:
    """Nodes in order, every value named by a number."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: NDArray[np.generic] | np.generic) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: int | float | str) -> str:
        (name,) = self.ops(kind, 1, *inputs, domain=domain, **attributes)
        return name

    def ops(
        self, kind: str, outputs: int, *inputs: str, domain: str = "", **attributes: int | float | str
    ) -> list[str]:
        names = [f"v{len(self.nodes)}.{number}" for number in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names
