"""The shared expert as further routed experts, and back: nothing is computed, units move.

Legend: S width of the shared expert, F width of a routed one, D hidden, n = ceil(S / F) pieces.

SwiGLU is a sum over intermediate units, ``S(x) = sum_s down[:, s] silu(gate[s] x) (up[s] x)``, so S units are n experts
of F units each; the last one is filled up with units of zero. With the weight sigmoid(x . gate) on every one of them
their sum is what the shared expert gives: E + n experts, of which every token visits the last n beside its own k.

Gate and up are cut along their rows, down along its columns. Of a quantized matrix the codes are cut with their scales:
what was rounded once is not rounded again, and the units that fill up have codes that mean zero and scales of 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import Kind
from qconvert.transform.rectangles import Span, cut, lay, lay_quantized

FOLDED = {
    Kind.SHARED_GATE: Kind.EXPERT_GATE,
    Kind.SHARED_UP: Kind.EXPERT_UP,
    Kind.SHARED_DOWN: Kind.EXPERT_DOWN,
}
"""What each matrix of the shared expert becomes."""

Matrix = TypeVar("Matrix", Tensor, QuantizedTensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Units ``begin`` to ``end`` of the shared expert, which one expert of ``width`` units holds, its first ones."""

    begin: int
    end: int
    width: int

    def source(self, kind: Kind, hidden: int) -> tuple[Span, Span]:
        """Rows and columns of the shared expert's matrix that they are."""
        units, all_of_hidden = (self.begin, self.end), (0, hidden)
        return (all_of_hidden, units) if kind is Kind.SHARED_DOWN else (units, all_of_hidden)

    def target(self, kind: Kind, hidden: int) -> tuple[Span, Span]:
        """Rows and columns of the expert's matrix that they become."""
        units, all_of_hidden = (0, self.end - self.begin), (0, hidden)
        return (all_of_hidden, units) if kind is Kind.SHARED_DOWN else (units, all_of_hidden)

    def rest(self, kind: Kind, hidden: int) -> tuple[Span, Span]:
        """Rows and columns of the expert's matrix that are filled up with zeros."""
        units, all_of_hidden = (self.end - self.begin, self.width), (0, hidden)
        return (all_of_hidden, units) if kind is Kind.SHARED_DOWN else (units, all_of_hidden)


def shares(shared: int, width: int) -> Iterator[Share]:
    """The n experts of ``width`` units that a shared expert of ``shared`` units becomes."""
    for begin in range(0, shared, width):
        yield Share(begin=begin, end=min(begin + width, shared), width=width)


def matrix_shape(kind: Kind, width: int, hidden: int) -> tuple[int, int]:
    """(N, K) of a matrix of an expert of ``width`` units: [width, D], of down [D, width]."""
    return (hidden, width) if kind is Kind.SHARED_DOWN else (width, hidden)


def fold(matrix: Matrix, kind: Kind, width: int) -> list[Matrix]:
    """One matrix of the shared expert, gate or up [S, D] or down [D, S], as that of n experts of ``width`` units.

    Raises:
        FormatError: codes that cannot be cut there: a block that goes on, blocks over the ends of rows, or inputs in
            activation order.
    """
    shared, hidden = _sizes(matrix, kind)
    shape = matrix_shape(kind, width, hidden)
    return [_laid([(_cut(matrix, *one.source(kind, hidden)), 0, 0)], shape) for one in shares(shared, width)]


def unfold(pieces: Sequence[Matrix], kind: Kind, shared: int) -> Matrix:
    """The inverse of ``fold``: the matrix of a shared expert of ``shared`` units, bit for bit and code for code.

    Raises:
        FormatError: codes that cannot be laid together.
        DataError: pieces that have to share a scale have different ones.
    """
    width, hidden = _sizes(pieces[0], kind)
    parts = []
    for one, piece in zip(shares(shared, width), pieces, strict=True):
        rows, cols = one.source(kind, hidden)
        parts.append((_cut(piece, *one.target(kind, hidden)), rows[0], cols[0]))
    return _laid(parts, matrix_shape(kind, shared, hidden))


def _sizes(matrix: Tensor | QuantizedTensor, kind: Kind) -> tuple[int, int]:
    """(units, D)."""
    rows, cols = matrix.shape
    return (cols, rows) if kind is Kind.SHARED_DOWN else (rows, cols)


def _cut(matrix: Matrix, rows: Span, cols: Span) -> Matrix:
    return matrix[slice(*rows), slice(*cols)] if isinstance(matrix, Tensor) else cut(matrix, rows, cols)


def _laid(parts: Sequence[tuple[Matrix, int, int]], shape: tuple[int, int]) -> Matrix:
    first = parts[0][0]
    if isinstance(first, Tensor):
        return lay(parts, shape, first.dtype)
    return lay_quantized(parts, shape, first.scheme)
