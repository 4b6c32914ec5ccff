"""A thin hand on onnx_ir: nodes in the order they are written, names that tell where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

OPSET = 23
"""Of the standard operators: the first with RMSNormalization, RotaryEmbedding and Attention."""

IR_VERSION = 10
"""Of the file: the lowest that opset 23 may stand in, so that old runtimes can say what they lack."""

Attribute = int | float | str | Sequence[int]
Dim = int | str


class GraphWriter:
    """Collects inputs, outputs, initializers and nodes of one graph."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes written inside have ``name`` in theirs."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """An input of the graph; a dimension is a size or the name of one that varies."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> None:
        """Make ``value`` an output of the graph under ``name``."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An initializer whose bytes stand elsewhere; asking twice gives the same one."""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return self._initializers[name]

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small initializer with its numbers in the graph; equal ones are one."""
        name = f"const.{array.dtype.name}.{'x'.join(map(str, array.shape))}.{array.tobytes().hex()}"
        if len(name) > 96:
            name = f"{name[:24]}.{self._number('const')}"
        if name not in self._initializers:
            tensor = ir.Tensor(array, name=name)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self._initializers[name]

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.asarray(numbers, dtype=np.int64))

    def integer(self, number: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(np.asarray(number, dtype=np.int64))

    def floats(self, numbers: Sequence[float] | np.ndarray) -> ir.Value:
        """A float32 vector."""
        return self.constant(np.asarray(numbers, dtype=np.float32))

    def float(self, number: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.asarray(number, dtype=np.float32))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        """Write a node with one output."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute
    ) -> tuple[ir.Value, ...]:
        """Write a node with several outputs."""
        path = "/".join(self._scope)
        name = f"{path}/{kind}.{self._number(f'{path}/{kind}')}"
        node = ir.Node(
            domain,
            kind,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=name,
        )
        for number, value in enumerate(node.outputs):
            value.name = f"{name}.{number}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def model(self, producer_version: str) -> ir.Model:
        """The model as written so far, without what no output needs."""
        domains = {node.domain for node in self._nodes}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, **{domain: 1 for domain in sorted(domains) if domain}},
            name=self._name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="qconvert", producer_version=producer_version)
        RemoveUnusedNodesPass()(model)
        return model

    def _number(self, key: str) -> int:
        self._counts[key] = self._counts.get(key, -1) + 1
        return self._counts[key]
