"""What every format can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Group, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """One stored tensor of a quantized matrix; its size never depends on data.

    Attributes:
        suffix: what follows ``<module>.`` in the tensor's name.
        rows_per_row: rows of the matrix that one row of this part covers; 0 for a part that is written once: it is
            the same whatever rows are written, or all rows are one block.
        inputs: of a scale of what enters the matrix, and not of the matrix: what it does to what codes of inputs say.
    """

    suffix: str
    dtype: DType
    shape: tuple[int, ...]
    rows_per_row: int
    inputs: Literal["multiplies", "divides"] | None = None

    def rows_of(self, begin: int, end: int) -> tuple[int, int]:
        """Rows of this part that rows ``begin:end`` of the matrix fill; ``begin`` is a multiple of the row block."""
        return begin // self.rows_per_row, -(-end // self.rows_per_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScale:
    """A scale that is stored for what enters a matrix.

    Attributes:
        number: what is stored, exact in float32.
        divides: whether codes of inputs are divided by it, or multiplied.
    """

    number: float
    divides: bool

    @property
    def multiplier(self) -> float:
        """What multiplies, in float32."""
        return self._reciprocal() if self.divides else self.number

    @property
    def divisor(self) -> float:
        """What divides, in float32."""
        return self.number if self.divides else self._reciprocal()

    def _reciprocal(self) -> float:
        return torch.tensor(self.number, dtype=torch.float32).reciprocal().item()


class Format(Protocol):
    """A way to store quantized matrices; stateless."""

    @property
    def name(self) -> str:
        """What plans and the command line call it."""

    @property
    def quant_method(self) -> str:
        """The loader that reads it, as ``quantization_config`` names it."""

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` with the reason when this format cannot hold the scheme, whatever the shape."""

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` with the reason when this format cannot hold a [N, K] matrix in this scheme."""

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """Rows of a [N, K] matrix may be written in separate runs that begin at multiples of this number.

        N for a layout in which the rows of the matrix are no rows of what is stored.
        """

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """The tensors that a [N, K] matrix is stored as."""

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Stored tensors by suffix; ``shape`` is that of the whole matrix where ``quantized`` is a run of its rows."""

    def unpack(
        self,
        parts: Mapping[str, Tensor],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        whole: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """The exact inverse of ``pack``; ``FormatError`` for missing parts, types or shapes that do not fit.

        ``whole`` is the shape of the whole matrix where ``parts`` hold a run of its rows.
        """


def check_parts(parts: Mapping[str, Tensor], specs: tuple[PartSpec, ...]) -> None:
    """Compare stored tensors with what the format expects.

    Raises:
        FormatError: the first part that is missing or has another type or shape.
    """
    for spec in specs:
        if spec.suffix not in parts:
            raise FormatError(
                f"{spec.suffix} is missing beside {', '.join(sorted(parts)) or 'nothing'}", part=spec.suffix
            )
        found = parts[spec.suffix]
        if tuple(found.shape) != spec.shape or found.dtype != spec.dtype.torch_dtype:
            raise FormatError(
                f"{spec.suffix} is {found.dtype} {tuple(found.shape)}, expected {spec.dtype} {spec.shape}",
                part=spec.suffix,
            )


def check_groups(scheme: Scheme, shape: tuple[int, int]) -> None:
    """Refuse a matrix whose rows are no whole number of groups.

    Raises:
        FormatError: the group does not divide K.
    """
    rows, cols = shape
    if isinstance(scheme.blocking, Group) and cols % scheme.blocking.size:
        size = scheme.blocking.size
        raise FormatError(f"groups of {size} do not divide the {cols} columns of a {rows} x {cols} matrix")


def check_scales(scale: Tensor, suffix: str, *, signed: bool = False) -> None:
    """Refuse scales that no rounding makes.

    AutoRound's scales of integers are ``signed``: the range is -8 .. 7 and the largest value of a group gets the -8.

    Raises:
        FormatError: a scale is zero, negative where it has no sign, infinite or NaN.
    """
    values = scale.to(torch.float32)
    wrong = ~(((values != 0) if signed else (values > 0)) & values.isfinite())
    if bool(wrong.any()):
        kinds = "zero, infinite or NaN" if signed else "zero, negative, infinite or NaN"
        raise FormatError(f"{suffix} holds {int(wrong.sum())} scales that are {kinds}", part=suffix)
