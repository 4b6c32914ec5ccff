"""compressed-tensors ``pack-quantized``: integer codes in 32-bit words, weights only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Channel, Group, Int, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts, check_scales
from qconvert.formats.column_groups import check_groups_of_inputs
from qconvert.formats.transposed import flipped
from qconvert.numerics.packing import pack_int32, unpack_int32

PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"
GROUP_OF_INPUT = "weight_g_idx"


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """``weight_packed`` int32 [N, K*bits/32], ``weight_scale`` [N, G], ``weight_shape`` int64 [2] = (N, K).

    With zero points also ``weight_zero_point`` int32 [N*bits/32, G], packed along N. Source: compressed-tensors 0.20.
    """

    name: str = "pack-quantized"
    quant_method: str = "compressed-tensors"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is int4 or int8 weights, 16-bit activations, per channel or group."""
        if not isinstance(scheme.grid, Int) or scheme.grid.bits not in (4, 8):
            raise FormatError(f"{self.name} holds 4- and 8-bit integers, not {scheme.grid}")
        if not isinstance(scheme.blocking, Group | Channel):
            raise FormatError(f"{self.name} has scales per channel or group, not {scheme.blocking}")
        if scheme.activation.kind != "none":
            raise FormatError(f"{self.name} is for 16-bit activations, not for {scheme}")
        if not scheme.scale.dtype.is_weight or scheme.scale.second is not None:
            raise FormatError(f"{self.name} holds one BF16, F16 or F32 scale per block, not {scheme.scale}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless groups divide the rows and codes and zero points fill whole words."""
        self.check_scheme(scheme)
        rows, cols = shape
        check_groups(scheme, shape)
        per_word = 32 // scheme.weight_bits
        if cols % per_word:
            raise FormatError(f"{self.name} packs {per_word} codes in a word, which does not divide {cols} columns")
        if not scheme.symmetric and rows % per_word:
            raise FormatError(f"{self.name} packs {per_word} zero points in a word, which does not divide {rows} rows")

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1, or the zero points that fill a word."""
        return 1 if scheme.symmetric else 32 // scheme.weight_bits

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes, scales, the shape and, where there are any, zero points."""
        self.check(scheme, shape)
        rows, cols = shape
        bits = scheme.weight_bits
        scale_shape = scheme.scale_shape(rows, cols)
        specs = [
            PartSpec(suffix=PACKED, dtype=DType.I32, shape=(rows, cols * bits // 32), rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=scheme.scale.dtype, shape=scale_shape, rows_per_row=1),
            PartSpec(suffix=SHAPE, dtype=DType.I64, shape=(2,), rows_per_row=0),
        ]
        if not scheme.symmetric:
            zero_shape = (rows * bits // 32, scale_shape[1])
            specs.append(PartSpec(suffix=ZERO_POINT, dtype=DType.I32, shape=zero_shape, rows_per_row=32 // bits))
        return tuple(specs)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        scheme = quantized.scheme
        self.check(scheme, quantized.shape)
        parts = {
            PACKED: pack_int32(quantized.codes, scheme.weight_bits),
            SCALE: quantized.scale,
            SHAPE: torch.tensor(shape or quantized.shape, dtype=torch.int64),
        }
        if quantized.zero_point is not None:
            parts[ZERO_POINT] = flipped(pack_int32(flipped(quantized.zero_point), scheme.weight_bits))
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
        check_scales(parts[SCALE], SCALE, signed=True)
        if tuple(parts[SHAPE].tolist()) != (whole or shape):
            raise FormatError(
                f"{SHAPE} says {parts[SHAPE].tolist()}, the architecture says {list(whole or shape)}", part=SHAPE
            )
        rows, cols = shape
        zero_point = None
        if not scheme.symmetric:
            packed = flipped(parts[ZERO_POINT])
            zero_point = flipped(unpack_int32(packed, scheme.weight_bits, rows, signed=False))
        return QuantizedTensor(
            codes=unpack_int32(parts[PACKED], scheme.weight_bits, cols, signed=scheme.symmetric),
            scale=parts[SCALE],
            zero_point=zero_point,
            scheme=scheme,
            shape=shape,
        )


@dataclass(frozen=True, slots=True)
class PackReordered(PackQuantized):
    """The same with ``weight_g_idx`` int32 [K], the group of every input: activation order. Read only."""

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Those of ``PackQuantized``, and the groups."""
        index = PartSpec(suffix=GROUP_OF_INPUT, dtype=DType.I32, shape=(shape[1],), rows_per_row=0)
        return (*PackQuantized.parts(self, scheme, shape), index)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Not available.

        Raises:
            FormatError: always: vLLM's experts refuse it.
        """
        raise FormatError(f"{self.name} with groups that are not consecutive is read only")

    def unpack(
        self,
        parts: Mapping[str, Tensor],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        whole: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """See ``Format.unpack``; also ``FormatError`` where the index is no permutation of the groups."""
        quantized = PackQuantized.unpack(self, parts, scheme, shape, whole=whole)
        index = check_groups_of_inputs(parts[GROUP_OF_INPUT], scheme, shape, GROUP_OF_INPUT)
        return replace(quantized, column_group=index)


REORDERED = PackReordered(name="pack-quantized-reordered")
"""Its name in plans; a configuration calls it like the other."""
