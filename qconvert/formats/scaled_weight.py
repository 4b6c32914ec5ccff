"""What formats of 8-bit codes beside one tensor of scales have in common: everything but the blocks and the names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Scheme
from qconvert.formats.base import PartSpec, check_parts, check_scales

WEIGHT = "weight"


class ScaledWeight(Protocol):
    """``weight`` [N, K] of type ``code`` and scales of ``scheme.scale_shape(N, K)`` under the suffix ``scale``."""

    __slots__ = ()

    @property
    def code(self) -> DType:
        """Element type of the codes."""

    @property
    def scale(self) -> str:
        """Suffix of the scales."""

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """See ``Format.check``."""

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """See ``Format.row_block``."""

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Codes and scales; a row of scales covers as many rows of codes as must stay together."""
        self.check(scheme, shape)
        return (
            PartSpec(suffix=WEIGHT, dtype=self.code, shape=shape, rows_per_row=1),
            PartSpec(
                suffix=self.scale,
                dtype=scheme.scale.dtype,
                shape=scheme.scale_shape(*shape),
                rows_per_row=self.row_block(scheme, shape),
            ),
        )

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        self.check(quantized.scheme, quantized.shape)
        return {WEIGHT: quantized.codes, self.scale: quantized.scale}

    def unpack(
        self,
        parts: Mapping[str, Tensor],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        whole: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """See ``Format.unpack``."""
        check_parts(parts, self.parts(scheme, shape))
        check_scales(parts[self.scale], self.scale)
        return QuantizedTensor(codes=parts[WEIGHT], scale=parts[self.scale], scheme=scheme, shape=shape)
