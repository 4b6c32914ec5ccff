"""Faults planted in the graph of a package, by edits of its nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

Plant = Callable[["Edited", int], None]


class Edited:
    """The decoder of a package while it is edited."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model

    def node(self, layer: int, kind: str, number: int = 0) -> NodeProto:
        """A node of a layer by its operator."""
        return self.named(f"layers.{layer}/{kind}.{number}")

    def named(self, name: str) -> NodeProto:
        return next(node for node in self.model.graph.node if node.name == name)

    def before(self, node: NodeProto, kind: str, inputs: list[str], **attributes: object) -> str:
        """Write a node in front of another one."""
        output = f"planted.{len(self.model.graph.node)}"
        place = list(self.model.graph.node).index(node)
        self.model.graph.node.insert(place, helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def number(self, value: float) -> str:
        name = f"planted.number.{value}"
        if name not in {one.name for one in self.model.graph.initializer}:
            self.model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
        return name

    def integers(self, *values: int) -> str:
        name = f"planted.integers.{values}"
        if name not in {one.name for one in self.model.graph.initializer}:
            self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def silence(self, node: NodeProto, place: int, value: float = 0.0) -> None:
        """Let a node have ``value`` everywhere instead of its input."""
        nothing = self.before(node, "Mul", [node.input[place], self.number(0.0)])
        node = self.named(node.name)
        node.input[place] = self.before(node, "Add", [nothing, self.number(value)])

    def reorder(self, node: NodeProto, place: int, order: str) -> None:
        """Let a node have the tokens of an input in another order."""
        moved = self.before(node, "GatherND", [node.input[place], order], batch_dims=1)
        self.named(node.name).input[place] = moved


def plant(package: Path, fault: Plant, layer: int) -> None:
    """Rewrite the decoder of ``package`` with a fault."""
    model = onnx.load(package / "model.onnx", load_external_data=False)
    fault(Edited(model), layer)
    onnx.save(model, package / "model.onnx")


def memory_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "LinearAttention"), 3)


def convolution_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "CausalConvWithState"), 3)


def state_lost(graph: Edited, layer: int) -> None:
    memory_lost(graph, layer)
    convolution_lost(graph, layer)


def keys_lost(graph: Edited, layer: int) -> None:
    for place in (4, 5):
        graph.silence(graph.node(layer, "Attention"), place)


ORDER, INVERSE = "placing/Reshape.0.0", "placing/Reshape.1.0"
"""Which token is where when the real ones come first, and where each token is then."""


def memory_unmasked(graph: Edited, layer: int) -> None:
    """It has the tokens in the order of the text, and takes padding for text."""
    for number in (1, 2):
        graph.silence(graph.node(layer, "Mul", number), 1, 1.0)
    for place in (0, 1, 2, 4, 5):
        graph.reorder(graph.node(layer, "LinearAttention"), place, INVERSE)
    graph.reorder(graph.node(layer, "Reshape", 2), 0, ORDER)


def convolution_unmasked(graph: Edited, layer: int) -> None:
    """It has the tokens in the order of the text, padding in between."""
    graph.reorder(graph.node(layer, "Transpose", 0), 0, INVERSE)
    graph.reorder(graph.node(layer, "Split", 0), 0, ORDER)


def window_unmasked(graph: Edited, layer: int) -> None:
    """What is carried ends with the last token, real or not; an output's name must stay."""
    graph.reorder(graph.node(layer, "Concat", 0), 1, INVERSE)
    places = graph.before(
        graph.node(layer, "GatherND"), "Shape", [graph.node(layer, "FusedMatMul").output[0]], start=1, end=2
    )
    taken = graph.before(graph.node(layer, "GatherND"), "Add", [places, graph.integers(0, 1, 2)])
    source = graph.node(layer, "GatherND").input[0]
    gathered = graph.before(graph.node(layer, "GatherND"), "Gather", [source, taken], axis=1)
    graph.node(layer, "Transpose", 3).input[0] = gathered


def unmasked(graph: Edited, layer: int) -> None:
    memory_unmasked(graph, layer)
    convolution_unmasked(graph, layer)
    window_unmasked(graph, layer)


def attention_unmasked(graph: Edited, layer: int) -> None:
    def put(kind: str, *inputs: str) -> str:
        return graph.before(graph.node(layer, "Attention"), kind, list(inputs))

    _, before, end, axis = graph.named("placing/Slice.1").input
    everywhere = put("Add", put("Sub", "attention_mask", "attention_mask"), axis)
    counted = put("CumSum", everywhere, axis)
    asked = put("Unsqueeze", put("Slice", counted, before, end, axis), graph.integers(1, 3))
    earlier = put("LessOrEqual", put("Unsqueeze", counted, graph.integers(1, 2)), asked)
    causal = put("Where", earlier, *graph.named("placing/Where.1").input[1:])
    graph.node(layer, "Attention").input[3] = causal


def shared_expert_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "GatedAdd"), 1)


def shared_gate_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "GatedAdd"), 2, 1.0)


def routed_experts_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "GatedAdd"), 0)


def attention_gate_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "Mul"), 1, 1.0)


def decay_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "LinearAttention"), 4)


def rotation_lost(graph: Edited, layer: int) -> None:
    for number in (0, 1):
        graph.silence(graph.node(layer, "RotaryEmbedding", number), 1, 1.0)
        graph.silence(graph.node(layer, "RotaryEmbedding", number), 2)


def residual_lost(graph: Edited, layer: int) -> None:
    graph.silence(graph.node(layer, "Add", 1), 0)


def mixed_twice(graph: Edited, layer: int) -> None:
    """No fault that anybody has a name for."""
    node = graph.node(layer, "FusedMatMul", 3)
    node.input[0] = graph.before(node, "Mul", [node.input[0], node.input[0]])


def router_halved(graph: Edited, layer: int) -> None:
    node = graph.node(layer, "FusedMatMul", 4)
    node.input[0] = graph.before(node, "Mul", [node.input[0], graph.number(0.5)])
