"""Integer codes as ONNX Runtime's MatMulNBits and QMoE read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Channel, Group, Int, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts, check_scales
from qconvert.numerics.packing import pack_int32, unpack_int32

CODES = "qweight"
SCALES = "scales"
ZERO_POINTS = "zero_points"

SCALE_TYPES = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class MatMulNBits:
    """``qweight`` U8 [N, K*bits/8], ``scales`` [N, G]; with zero points ``zero_points`` U8 [N, ceil(G*bits/8)].

    Codes are unsigned, the first input of a byte in its low bits; without zero points the zero is 2^(bits-1). The
    operators' own shapes, [N, K/block, block*bits/8] of MatMulNBits and [E, N, K*bits/8] of QMoE, are the same bytes.
    Source: ONNX Runtime 1.32, contrib operators MatMulNBits and QMoE.
    """

    name: str = "matmul-nbits"
    quant_method: str = "onnxruntime"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is int4 or int8 weights in groups or channels, weights only."""
        if not isinstance(scheme.grid, Int) or scheme.grid.bits not in (4, 8):
            raise FormatError(f"{self.name} holds 4- and 8-bit integers, not {scheme.grid}")
        if scheme.activation.kind != "none":
            raise FormatError(f"{self.name} leaves activations to the operator, not to {scheme}")
        size = scheme.blocking.size if isinstance(scheme.blocking, Group) else 16
        if not isinstance(scheme.blocking, Group | Channel) or size < 16 or size & (size - 1):
            raise FormatError(
                f"{self.name} has scales per channel, or per group of a power of two from 16 on, not {scheme.blocking}"
            )
        if scheme.scale.dtype not in SCALE_TYPES or scheme.scale.second is not None:
            raise FormatError(f"{self.name} holds one F32, F16 or BF16 scale per block, not {scheme.scale}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless groups divide the rows and codes fill whole bytes."""
        self.check_scheme(scheme)
        check_groups(scheme, shape)
        if shape[1] * scheme.weight_bits % 8:
            raise FormatError(f"{self.name} packs two codes in a byte, which does not divide {shape[1]} columns")

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are stored one after the other."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes, scales and, where there are any, zero points."""
        self.check(scheme, shape)
        rows, cols = shape
        bits, scale_shape = scheme.weight_bits, scheme.scale_shape(rows, cols)
        specs = [
            PartSpec(suffix=CODES, dtype=DType.U8, shape=(rows, cols * bits // 8), rows_per_row=1),
            PartSpec(suffix=SCALES, dtype=scheme.scale.dtype, shape=scale_shape, rows_per_row=1),
        ]
        if not scheme.symmetric:
            packed = -(-scale_shape[1] * bits // 8)
            specs.append(PartSpec(suffix=ZERO_POINTS, dtype=DType.U8, shape=(rows, packed), rows_per_row=1))
        return tuple(specs)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        scheme = quantized.scheme
        self.check(scheme, quantized.shape)
        parts = {CODES: _packed(quantized.codes, scheme.weight_bits), SCALES: quantized.scale}
        if quantized.zero_point is not None:
            parts[ZERO_POINTS] = _packed(quantized.zero_point, scheme.weight_bits)
        return parts

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
        check_scales(parts[SCALES], SCALES)
        bits, (rows, cols) = scheme.weight_bits, shape
        zero_point = None
        if not scheme.symmetric:
            zero_point = _unpacked(parts[ZERO_POINTS], bits, scheme.scale_shape(rows, cols)[1], signed=False)
        return QuantizedTensor(
            codes=_unpacked(parts[CODES], bits, cols, signed=scheme.symmetric),
            scale=parts[SCALES],
            zero_point=zero_point,
            scheme=scheme,
            shape=shape,
        )


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] as bytes [N, ceil(K bits / 8)]: those of little-endian words, without what fills the last one."""
    words = pack_int32(codes, bits).view(torch.uint8)
    return words[:, : -(-codes.shape[1] * bits // 8)].contiguous()


def _unpacked(stored: Tensor, bits: int, cols: int, *, signed: bool) -> Tensor:
    """The inverse of ``_packed``."""
    words = torch.nn.functional.pad(stored, (0, -stored.shape[1] % 4)).view(torch.int32)
    return unpack_int32(words, bits, cols, signed=signed)
