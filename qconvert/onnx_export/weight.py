"""What a graph must know of a weight: its name, shape, and how its numbers are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qconvert.core.dtypes import DType
from qconvert.core.role import Kind, Part, Section, TensorRole
from qconvert.core.scheme import Group, Scheme
from qconvert.formats.matmul_nbits import CODES, SCALES, ZERO_POINTS
from qconvert.onnx_export.graph_writer import JOINT, GraphWriter
from qconvert.onnx_export.precision import IR_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A matrix, a vector, or the stacked matrices of all experts.

    Attributes:
        names: of its initializer, or what the names of its parts begin with; several where rows of one tensor follow
            those of another.
        shape: what it means, not how it is stored.
        scheme: of integer codes; ``None`` for dense numbers.
        dtype: in which dense numbers, or the scales of codes, are stored.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    dtype: DType = DType.F32

    @property
    def block_size(self) -> int:
        """Inputs that share a scale; 0 where all of a row do."""
        return self.scheme.blocking.size if self.scheme and isinstance(self.scheme.blocking, Group) else 0

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.shape[-1] // self.block_size if self.block_size else 1

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.scheme.weight_bits if self.scheme else 32

    @property
    def type(self) -> ir.DataType:
        """What ONNX calls ``dtype``."""
        return IR_TYPES[self.dtype]

    def initializer(self, part: str = "") -> str:
        """What the graph calls its bytes, or those of one of its parts."""
        return JOINT.join(f"{name}.{part}" if part else name for name in self.names)

    def stored(self, graph: GraphWriter) -> ir.Value:
        """The initializer of dense numbers."""
        return graph.weight(self.initializer(), self.type, self.shape)

    def dense(self, graph: GraphWriter) -> ir.Value:
        """Dense numbers as float32, which a runtime computes from others when it loads the graph."""
        return graph.cast(self.stored(graph), self.type, ir.DataType.FLOAT)

    def codes(self, graph: GraphWriter, shape: tuple[int, ...]) -> ir.Value:
        """Packed codes in the shape that the operator asks for."""
        return graph.weight(self.initializer(CODES), ir.DataType.UINT8, shape)

    def nibbles(self, graph: GraphWriter) -> ir.Value:
        """The same bytes as four-bit codes [N, K]."""
        return graph.weight(self.initializer(CODES), ir.DataType.UINT4, self.shape)

    def scales(self, graph: GraphWriter) -> ir.Value:
        """[..., N, G], or [..., N] where a row has one."""
        groups = (self.groups,) if self.block_size else ()
        return graph.weight(self.initializer(SCALES), self.type, (*self.shape[:-1], *groups))

    def zero_points(self, graph: GraphWriter) -> ir.Value | None:
        """Packed along the groups of a row [..., N, ceil(G bits / 8)]; ``None`` where all are the middle."""
        if self.scheme is None or self.scheme.symmetric:
            return None
        packed = -(-self.groups * self.bits // 8)
        return graph.weight(self.initializer(ZERO_POINTS), ir.DataType.UINT8, (*self.shape[:-1], packed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights of a graph by role; a layer's experts under the roles of their stacks."""

    of: Mapping[TensorRole, Weight]
    section: Section = Section.TEXT

    def role(self, kind: Kind, layer: int | None = None, part: Part = Part.WEIGHT) -> TensorRole:
        """Of a kind in a layer."""
        return TensorRole(section=self.section, kind=kind, layer=layer, part=part)

    def __call__(self, kind: Kind, layer: int | None = None, part: Part = Part.WEIGHT) -> Weight:
        """The weight of a kind in a layer."""
        return self.of[self.role(kind, layer, part)]
