"""Two matrices of two checkpoints side by side, some rows at a time: a head is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm, prod
from typing import Protocol

from torch import Tensor

from qconvert.core.role import TensorRole
from qconvert.core.scheme import Block, Flat, PerTensor, Scheme
from qconvert.numerics.error import ErrorSums, error_sums
from qconvert.quantized_view import Stored
from reference_model.config import ModelConfig

RUN_ELEMENTS = 1 << 23
"""Elements of each that are in memory at once: 32 MiB in float32."""


class Matrices(Protocol):
    """Whose matrices are looked at: ``CheckpointWeights``, or a view of some."""

    @property
    def config(self) -> ModelConfig:
        """Sizes and layer pattern."""
        ...

    @property
    def stored(self) -> Mapping[TensorRole, Stored]:
        """Every readable tensor by role."""
        ...

    def scheme(self, role: TensorRole) -> Scheme | None:
        """How a matrix is rounded; ``None`` for a plain tensor."""
        ...

    def row_block(self, role: TensorRole) -> int:
        """Runs of rows begin at multiples of this number."""
        ...

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        """The float32 values of one tensor, or of a run of its rows."""
        ...


Place = tuple[Matrices, TensorRole]


def pairs(first: Place, second: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 values of two tensors of one shape, in runs of rows that begin where the blocks of both begin.

    Raises:
        FormatError: one of them cannot be read.
    """
    (a, role_a), (b, role_b) = first, second
    for begin, end in runs(first, second):
        yield a.matrix(role_a, begin, end), b.matrix(role_b, begin, end)


def runs(first: Place, second: Place) -> Iterator[tuple[int | None, int | None]]:
    """Row bounds for ``pairs``; ``None`` twice for tensors that are taken as a whole."""
    shape = first[0].stored[first[1]].shape
    schemes = [source.scheme(role) for source, role in (first, second)]
    whole = any(scheme is not None and isinstance(scheme.blocking, (PerTensor, Flat)) for scheme in schemes)
    if prod(shape) <= RUN_ELEMENTS or len(shape) != 2 or whole:
        yield None, None
        return
    blocks = [source.row_block(role) for source, role in (first, second)]
    blocks += [s.blocking.rows for s in schemes if s is not None and isinstance(s.blocking, Block)]
    multiple = lcm(*blocks)
    step = max(1, RUN_ELEMENTS // shape[1] // multiple) * multiple
    for begin in range(0, shape[0], step):
        yield begin, min(begin + step, shape[0])


def pair_sums(first: Place, second: Place) -> ErrorSums:
    """The error of ``second`` against ``first``."""
    return sum((error_sums(w, v) for w, v in pairs(first, second)), ErrorSums())
