"""What compressed-tensors formats of 8-bit codes with one scale per row have in common: all but the grid."""

from __future__ import annotations

from typing import Protocol

from qconvert.core.errors import FormatError
from qconvert.core.scheme import Channel, Float, Int, Scheme
from qconvert.formats.scaled_weight import ScaledWeight


class RowScaled(ScaledWeight, Protocol):
    """Codes on ``grid``, one scale per row, and engines that round activations to the same grid per token."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """See ``Format.name``."""

    @property
    def grid(self) -> Int | Float:
        """What weights and activations are rounded to."""

    def check_scheme(self, scheme: Scheme) -> None:
        """See ``Format.check_scheme``."""
        self.check_rows(scheme)

    def check_rows(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless weights are per channel and activations dynamic per token, on the same grid."""
        if scheme.grid != self.grid or not scheme.symmetric or scheme.blocking != Channel():
            raise FormatError(f"{self.name} holds symmetric {self.grid} with one scale per channel, not {scheme}")
        activation = scheme.activation
        if activation.kind != "dynamic" or activation.grid != self.grid or activation.group is not None:
            raise FormatError(f"{self.name} needs dynamic {self.grid} activations per token, not {scheme}")
        if not scheme.scale.dtype.is_weight or scheme.scale.second is not None:
            raise FormatError(f"{self.name} holds one BF16, F16 or F32 scale per row, not {scheme.scale}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1
