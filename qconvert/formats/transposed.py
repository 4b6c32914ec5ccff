"""What GPTQ and AWQ layouts have in common: inputs go down, outputs go across, scales in F16, zero points always."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Channel, Group, Int, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts, check_scales

CODES = "qweight"
ZEROS = "qzeros"
SCALES = "scales"


class Transposed(Protocol):
    """``qweight``, ``qzeros`` and ``scales`` [G, N] of a [N, K] matrix. A row of the matrix is a column of each."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """See ``Format.name``."""

    def codes_shape(self, bits: int, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of ``qweight``."""

    def pack_codes(self, codes_NK: Tensor, bits: int) -> Tensor:
        """``qweight`` of uint8 codes."""

    def unpack_codes(self, stored: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        """The inverse of ``pack_codes``."""

    def pack_zeros(self, zeros_GN: Tensor, bits: int) -> Tensor:
        """``qzeros`` of uint8 zero points: int32 [G, N * bits / 32]."""

    def unpack_zeros(self, stored: Tensor, bits: int, rows: int) -> Tensor:
        """The inverse of ``pack_zeros``: uint8 [G, N]."""

    def check_scheme(self, scheme: Scheme) -> None:
        """See ``Format.check_scheme``."""

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless groups divide the rows, and codes and zero points fill whole words."""
        self.check_scheme(scheme)
        rows, cols = shape
        check_groups(scheme, shape)
        per_word = 32 // scheme.weight_bits
        if rows % per_word or cols % per_word:
            raise FormatError(f"{self.name} packs {per_word} codes in a word, which does not divide {rows} x {cols}")

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """All rows: each is spread over everything that is stored."""
        return shape[0]

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes, packed zero points, scales."""
        self.check(scheme, shape)
        rows, _ = shape
        bits, groups = scheme.weight_bits, scheme.scale_shape(*shape)[1]
        stored = (
            (CODES, DType.I32, self.codes_shape(bits, shape)),
            (ZEROS, DType.I32, (groups, rows * bits // 32)),
            (SCALES, DType.F16, (groups, rows)),
        )
        return tuple(PartSpec(suffix=name, dtype=dtype, shape=size, rows_per_row=0) for name, dtype, size in stored)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``. The zero point of symmetric codes is the middle of the range."""
        scheme = quantized.scheme
        self.check(scheme, quantized.shape)
        bits, scales_GN = scheme.weight_bits, flipped(quantized.scale)
        codes = quantized.codes.view(torch.uint8)
        zero = quantized.zero_point
        middle = 1 << (bits - 1)
        zeros_GN = torch.full(scales_GN.shape, middle, dtype=torch.uint8) if zero is None else flipped(zero)
        return {
            CODES: self.pack_codes(codes if zero is not None else codes ^ middle, bits),
            ZEROS: self.pack_zeros(zeros_GN, bits),
            SCALES: scales_GN,
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
        check_scales(parts[SCALES], SCALES, signed=True)
        bits, middle = scheme.weight_bits, 1 << (scheme.weight_bits - 1)
        codes = self.unpack_codes(parts[CODES], bits, shape)
        zeros_GN = self.unpack_zeros(parts[ZEROS], bits, shape[0])
        if scheme.symmetric and bool((zeros_GN != middle).any()):
            raise FormatError(
                f"{ZEROS} holds zero points other than {middle}, but the configuration says symmetric", part=ZEROS
            )
        return QuantizedTensor(
            codes=(codes - middle).view(torch.int8) if scheme.symmetric else codes,
            scale=flipped(parts[SCALES]),
            zero_point=None if scheme.symmetric else flipped(zeros_GN),
            scheme=scheme,
            shape=shape,
        )


def check_integers(scheme: Scheme, name: str, widths: tuple[int, ...]) -> None:
    """Raise ``FormatError`` unless the scheme is integers of one of ``widths`` bits, F16 scales, no activations."""
    if not isinstance(scheme.grid, Int) or scheme.grid.bits not in widths:
        raise FormatError(f"{name} holds integers of {' or '.join(map(str, widths))} bits, not {scheme.grid}")
    if not isinstance(scheme.blocking, Group | Channel):
        raise FormatError(f"{name} has scales per channel or group, not {scheme.blocking}")
    if scheme.activation.kind != "none":
        raise FormatError(f"{name} is for 16-bit activations, not for {scheme}")
    if scheme.scale.dtype is not DType.F16 or scheme.scale.second is not None:
        raise FormatError(f"{name} holds one F16 scale per block, not {scheme.scale}")


def flipped(matrix: Tensor) -> Tensor:
    """A transposed copy whose bytes can be viewed: ``contiguous`` would keep odd strides where a side is 1."""
    return matrix.T.clone(memory_format=torch.contiguous_format)
