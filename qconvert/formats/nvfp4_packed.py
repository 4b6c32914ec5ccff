"""compressed-tensors ``nvfp4-pack-quantized``: FP4 pairs in bytes, FP8 scales per 16 inputs, one for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import NVFP4, Activation, Float, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts, check_scales
from qconvert.numerics.packing import pack_int32, unpack_pairs

PACKED = "weight_packed"
SCALE = "weight_scale"
GLOBAL_SCALE = "weight_global_scale"
INPUT_SCALE = "input_global_scale"

_FOUR_BIT_INPUTS = Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16)


@dataclass(frozen=True, slots=True)
class Nvfp4Packed:
    """``weight_packed`` uint8 [N, K/2], ``weight_scale`` e4m3 [N, K/16], ``weight_global_scale`` float32 [1].

    A byte has the even input in its low half. The global scale divides: ``value * scale / global``. What is read may
    have ``input_global_scale`` float32 [1] beside it (W4A4). Source: compressed-tensors 0.20.
    """

    name: str = "nvfp4-pack-quantized"
    quant_method: str = "compressed-tensors"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is NVFP4, with activations in 16 bits or rounded to four."""
        if scheme.weight_only() != NVFP4:
            raise FormatError(
                f"{self.name} holds {NVFP4} with {NVFP4.scale.dtype} scales and a second one, not {scheme}"
            )
        if scheme.activation not in (Activation(), _FOUR_BIT_INPUTS):
            raise FormatError(f"{self.name} is for activations of 16 bits, or of 4 with a scale per 16, not {scheme}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless groups divide the rows."""
        self.check_scheme(scheme)
        check_groups(scheme, shape)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes, both scales and, for four-bit activations, theirs."""
        self.check(scheme, shape)
        rows, cols = shape
        specs = (
            PartSpec(suffix=PACKED, dtype=DType.U8, shape=(rows, cols // 2), rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=DType.F8_E4M3, shape=scheme.scale_shape(rows, cols), rows_per_row=1),
            PartSpec(suffix=GLOBAL_SCALE, dtype=DType.F32, shape=(1,), rows_per_row=0),
        )
        if scheme.activation.kind == "none":
            return specs
        return (*specs, PartSpec(suffix=INPUT_SCALE, dtype=DType.F32, shape=(1,), rows_per_row=0, inputs="divides"))

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``; activations stay in 16 bits.

        Raises:
            FormatError: activations are to be rounded: their scale comes from calibration.
        """
        self.check(quantized.scheme, quantized.shape)
        if quantized.scheme.activation.kind != "none" or quantized.second_scale is None:
            raise FormatError(f"{self.name} with {quantized.scheme} is read only: no scale of the activations is known")
        return {
            PACKED: pack_int32(quantized.codes, 4).view(torch.uint8),
            SCALE: quantized.scale,
            GLOBAL_SCALE: quantized.second_scale.reshape(1).reciprocal(),
        }

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
        check_scales(parts[GLOBAL_SCALE], GLOBAL_SCALE)
        check_second_level(parts[SCALE], SCALE, parts[PACKED])
        over = parts[GLOBAL_SCALE].reciprocal().reshape(())
        check_scales(over, f"the reciprocal of {GLOBAL_SCALE}")
        if INPUT_SCALE in parts:
            check_scales(parts[INPUT_SCALE], INPUT_SCALE)
        return QuantizedTensor(
            codes=unpack_pairs(parts[PACKED]),
            scale=parts[SCALE],
            second_scale=over,
            scheme=scheme,
            shape=shape,
        )


def check_second_level(scale: Tensor, suffix: str, packed: Tensor) -> None:
    """Refuse scales that no rounding makes; one of zero is that of a group too small for e4m3.

    Raises:
        FormatError: a scale is negative or NaN, or all are zero and the packed codes are not.
    """
    values = scale.to(torch.float32)
    if wrong := int((~(values >= 0.0)).sum()):
        raise FormatError(f"{suffix} holds {wrong} scales that are negative or NaN", part=suffix)
    if not bool(values.any()) and bool((packed & 0x77).any()):
        raise FormatError(f"{suffix} holds nothing but zeros, and the codes are others", part=suffix)
