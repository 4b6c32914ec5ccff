"""The layout of GPTQ checkpoints (``quant_method: gptq``), version 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Scheme
from qconvert.formats.base import PartSpec
from qconvert.formats.column_groups import check_groups_of_inputs, consecutive_groups
from qconvert.formats.transposed import ZEROS, Transposed, check_integers, flipped
from qconvert.numerics.packing import pack_int32, unpack_int32

GROUP_OF_INPUT = "g_idx"


@dataclass(frozen=True, slots=True)
class Gptq(Transposed):
    """``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [G, N*bits/32], ``scales`` F16 [G, N], ``g_idx`` int32 [K].

    Codes are packed along the inputs, zero points along the outputs, the first in a word's lowest bits. ``g_idx`` is
    the group of every input: consecutive in what is written here, any in what is read (activation order), absent where
    not ``indexed``. Version 1 stores ``zero - zero_offset`` with an offset of 1, version 2 (``checkpoint_format:
    gptq_v2``) the zero point. Source: GPTQModel 7.7, AutoRound 0.15, vLLM 0.32.
    """

    name: str = "gptq"
    quant_method: str = "gptq"
    zero_offset: int = 1
    indexed: bool = True

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is int4 or int8 with F16 scales, and symmetric in version 1."""
        check_integers(scheme, self.name, (4, 8))

    def codes_shape(self, bits: int, shape: tuple[int, int]) -> tuple[int, int]:
        """[K * bits / 32, N]."""
        rows, cols = shape
        return cols * bits // 32, rows

    def pack_codes(self, codes_NK: Tensor, bits: int) -> Tensor:
        """Packed along K, transposed."""
        return flipped(pack_int32(codes_NK, bits))

    def unpack_codes(self, stored: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        """See ``Transposed``."""
        return unpack_int32(flipped(stored), bits, shape[1], signed=False)

    def pack_zeros(self, zeros_GN: Tensor, bits: int) -> Tensor:
        """Packed along N, after the offset is taken off.

        Raises:
            FormatError: version 1 cannot hold a zero point of 0: its readers do not agree on what they get.
        """
        if self.zero_offset and bool((zeros_GN < self.zero_offset).any()):
            raise FormatError("gptq stores zero points less one and has no room for 0: use compressed-tensors or awq")
        return pack_int32(zeros_GN - self.zero_offset, bits)

    def unpack_zeros(self, stored: Tensor, bits: int, rows: int) -> Tensor:
        """See ``Transposed``.

        Raises:
            FormatError: the largest number in version 1, which some readers take for 0 and some for one more.
        """
        zeros_GN = unpack_int32(stored, bits, rows, signed=False)
        if self.zero_offset and bool((zeros_GN == (1 << bits) - 1).any()):
            raise FormatError(
                f"{ZEROS} holds {(1 << bits) - 1} for a zero point less one: engines do not agree on it", part=ZEROS
            )
        return zeros_GN + self.zero_offset

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Those of all transposed layouts, and the group of every input."""
        if not self.indexed:
            return Transposed.parts(self, scheme, shape)
        index = PartSpec(suffix=GROUP_OF_INPUT, dtype=DType.I32, shape=(shape[1],), rows_per_row=0)
        return (*Transposed.parts(self, scheme, shape), index)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        parts, index = Transposed.pack(self, quantized, shape=shape), quantized.column_group
        if not self.indexed:
            return parts
        if index is None:
            index = consecutive_groups(quantized.scheme, quantized.shape)
        return {**parts, GROUP_OF_INPUT: index.to(torch.int32)}

    def unpack(
        self,
        parts: Mapping[str, Tensor],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        whole: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """See ``Format.unpack``; also ``FormatError`` where ``g_idx`` is no permutation of the groups."""
        quantized = Transposed.unpack(self, parts, scheme, shape, whole=whole)
        if not self.indexed:
            return quantized
        index = check_groups_of_inputs(parts[GROUP_OF_INPUT], scheme, shape, GROUP_OF_INPUT)
        return replace(quantized, column_group=index)


GPTQ_V2 = Gptq(name="gptq_v2", zero_offset=0)
"""Read only: engines take version 1 for granted where a configuration says nothing."""

AUTO_ROUND_GPTQ = Gptq(name="auto-round-gptq", indexed=False)
"""Read only: version 1 as AutoRound packs it."""

AUTO_ROUND = Gptq(name="auto-round", zero_offset=0, indexed=False)
"""Read only: AutoRound's own packing, for zero points."""
