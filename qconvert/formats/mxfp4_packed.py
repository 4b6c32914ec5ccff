"""compressed-tensors ``mxfp4-pack-quantized``: pairs of FP4 numbers in bytes, a power of two per 32 inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import MXFP4, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts
from qconvert.numerics.packing import pack_int32, unpack_pairs

PACKED = "weight_packed"
SCALE = "weight_scale"

_NOT_A_NUMBER = 255
"""The E8M0 code that stands for NaN (OCP MX 1.0, 5.4.1)."""


@dataclass(frozen=True, slots=True)
class Mxfp4Packed:
    """``weight_packed`` uint8 [N, K/2], the even input in the low half; ``weight_scale`` uint8 [N, K/32].

    The scale is an exponent of two plus 127 (E8M0). Source: OCP Microscaling Formats (MX) 1.0, compressed-tensors 0.20.
    """

    name: str = "mxfp4-pack-quantized"
    quant_method: str = "compressed-tensors"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is MXFP4, weights only."""
        if scheme != MXFP4:
            raise FormatError(f"{self.name} holds {MXFP4} with {MXFP4.scale.dtype} scales, not {scheme}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless groups divide the rows."""
        self.check_scheme(scheme)
        check_groups(scheme, shape)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes and scales."""
        self.check(scheme, shape)
        rows, cols = shape
        return (
            PartSpec(suffix=PACKED, dtype=DType.U8, shape=(rows, cols // 2), rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=DType.U8, shape=scheme.scale_shape(rows, cols), rows_per_row=1),
        )

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        self.check(quantized.scheme, quantized.shape)
        return {PACKED: pack_int32(quantized.codes, 4).view(torch.uint8), SCALE: quantized.scale.view(torch.uint8)}

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
        broken = int((parts[SCALE] == _NOT_A_NUMBER).sum())
        if broken:
            raise FormatError(f"{SCALE} holds {broken} scales that are NaN", part=SCALE)
        codes = unpack_pairs(parts[PACKED])
        scale = parts[SCALE].view(torch.float8_e8m0fnu)
        return QuantizedTensor(codes=codes, scale=scale, scheme=scheme, shape=shape)
