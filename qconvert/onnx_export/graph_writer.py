"""A thin hand on onnx_ir: nodes in the order they are written, names that tell where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

QCONVERT = "qconvert"
"""Domain of functions that a model brings along."""

IR_VERSION = 10
"""Of the file: the lowest that blocks of four-bit codes may stand in, so that old runtimes can say what they lack."""

ALIAS = "::"
"""Between the name of stored bytes and what tells a second initializer of them from the first."""

JOINT = "+"
"""Between the names of tensors whose bytes follow each other, in the name of an initializer of them all."""

Dim = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """An attribute of a node in a function: the function's own of that name."""

    name: str
    type: ir.AttributeType


Attribute = int | float | str | Sequence[int] | ir.Graph | Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """An operator that is defined by others.

    Attributes:
        name: in the domain ``QCONVERT``.
        inputs, outputs: names of the values that it takes and gives.
        parameters: attributes that every node has to give.
        body: writes its nodes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[Parameter, ...] = ()
    body: Callable[..., Sequence[ir.Value]]


@dataclass(slots=True)
class Body:
    """The subgraph of a Loop or Scan while it is written; what stands around it is seen from inside.

    Attributes:
        graph: complete when the block of ``GraphWriter.body`` has ended.
    """

    graph: ir.Graph = field(init=False)
    _path: str
    _inputs: list[ir.Value] = field(default_factory=list)
    _outputs: list[ir.Value] = field(default_factory=list)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim] | None = None) -> ir.Value:
        """What an iteration is given; without ``shape`` nothing is said of it."""
        value = ir.Value(
            name=f"{self._path}/{name}",
            type=ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(shape),
        )
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[Dim] | None = None) -> None:
        """What an iteration gives, in the order of the operator."""
        value.type = ir.TensorType(dtype)
        if shape is not None:
            value.shape = ir.Shape(shape)
        self._outputs.append(value)


class GraphWriter:
    """Collects inputs, outputs, initializers and nodes of one graph, and the functions that they need."""

    def __init__(self, name: str, *, opset: int) -> None:
        self._name = name
        self._opset = opset
        self._domains: set[str] = set()
        self._functions: dict[str, ir.Function] = {}
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._widened: dict[ir.Value, ir.Value] = {}

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
        """An initializer whose bytes stand elsewhere; asking twice gives the same one.

        The same bytes in another type or shape are a second initializer, whose name goes on with ``ALIAS``.
        """
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        known = self._initializers.setdefault(name, value)
        if (known.dtype, known.shape) == (value.dtype, value.shape):
            return known
        value.name = f"{name}{ALIAS}{dtype.name.lower()}.{'x'.join(map(str, shape))}"
        return self._initializers.setdefault(value.name, value)

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
            attributes=[_attribute(key, attribute) for key, attribute in attributes.items()],
            num_outputs=outputs,
            name=name,
        )
        for number, value in enumerate(node.outputs):
            value.name = f"{name}.{number}"
        self._nodes.append(node)
        self._domains.add(domain)
        return tuple(node.outputs)

    def cast(self, value: ir.Value, before: ir.DataType, after: ir.DataType) -> ir.Value:
        """``value``, whose type is ``before``, as ``after``; the same twice is one node.

        What was widened to ``before`` and shall be what it was is not cast twice, which is exact.
        """
        if before is after:
            return value
        narrow = self._widened.get(value)
        if narrow is not None and narrow.dtype is after:
            return narrow
        if (value, after) not in self._casts:
            value.type = ir.TensorType(before)
            made = self.op("Cast", value, to=after.value)
            made.type = ir.TensorType(after)
            self._casts[value, after] = made
            if after.itemsize > before.itemsize:
                self._widened[made] = value
        return self._casts[value, after]

    @contextmanager
    def body(self, name: str) -> Iterator[Body]:
        """Nodes written inside are those of a subgraph."""
        around, self._nodes = self._nodes, []
        casts = dict(self._casts)
        try:
            with self.scope(name):
                path = "/".join(self._scope)
                body = Body(f"{path}.{self._number(f'{path}/')}")
                yield body
                body.graph = ir.Graph(body._inputs, body._outputs, nodes=self._nodes, name=name)
        finally:
            self._nodes, self._casts = around, casts  # what a subgraph has made is not seen from outside

    def call(self, function: Function, *inputs: ir.Value, **attributes: Attribute) -> tuple[ir.Value, ...]:
        """Write a node of a function, and the function where it is not there yet."""
        if function.name not in self._functions:
            self._define(function)
        return self.ops(function.name, len(function.outputs), *inputs, domain=QCONVERT, **attributes)

    def _define(self, function: Function) -> None:
        """Write a function, after those that it calls."""
        inner = GraphWriter(function.name, opset=self._opset)
        inputs = [ir.Value(name=name) for name in function.inputs]
        outputs = function.body(inner, *inputs)
        for name, value in zip(function.outputs, outputs, strict=True):
            value.name = name
        self._functions |= {name: one for name, one in inner._functions.items() if name not in self._functions}
        constants = [_as_node(value) for value in inner._initializers.values()]  # functions have no initializers
        self._functions[function.name] = ir.Function(
            QCONVERT,
            function.name,
            graph=ir.Graph(
                inputs, outputs, nodes=[*constants, *inner._nodes], opset_imports=inner._imports(), name=function.name
            ),
            attributes=[ir.Attr(one.name, one.type, None) for one in function.parameters],
        )

    def model(self, producer_version: str) -> ir.Model:
        """The model as written so far, without what no output needs."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._imports(),
            name=self._name,
        )
        model = ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="qconvert",
            producer_version=producer_version,
            functions=list(self._functions.values()),
        )
        RemoveUnusedNodesPass()(model)
        return model

    def _imports(self) -> dict[str, int]:
        return {"": self._opset, **{domain: 1 for domain in sorted(self._domains) if domain}}

    def _number(self, key: str) -> int:
        self._counts[key] = self._counts.get(key, -1) + 1
        return self._counts[key]


def _attribute(name: str, value: Attribute) -> ir.Attr:
    if isinstance(value, Parameter):
        return ir.RefAttr(name, value.name, value.type)
    return ir.convenience.convert_attribute(name, value)


def _as_node(constant: ir.Value) -> ir.Node:
    """The node that gives a constant its numbers."""
    return ir.Node(
        "",
        "Constant",
        (),
        attributes=[ir.Attr("value", ir.AttributeType.TENSOR, constant.const_value)],
        outputs=(constant,),
    )
