"""The layout of AWQ checkpoints (``quant_method: awq``, version ``gemm``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.scheme import Group, Scheme
from qconvert.formats.transposed import Transposed, check_integers, flipped
from qconvert.numerics.packing import pack_int32, unpack_int32

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each nibble of a word, from the lowest bits on."""


@dataclass(frozen=True, slots=True)
class Awq(Transposed):
    """``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8], ``scales`` F16 [G, N].

    Codes and zero points are packed along the outputs; a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 from its lowest
    bits on. Source: AutoAWQ 0.2 (version ``gemm``), vLLM 0.32.
    """

    name: str = "awq"
    quant_method: str = "awq"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is int4 in groups with F16 scales: engines read no other."""
        check_integers(scheme, self.name, (4,))
        if not isinstance(scheme.blocking, Group):
            raise FormatError(f"{self.name} has scales per group, not per {scheme.blocking}")

    def codes_shape(self, bits: int, shape: tuple[int, int]) -> tuple[int, int]:
        """[K, N / 8]."""
        rows, cols = shape
        return cols, rows * bits // 32

    def pack_codes(self, codes_NK: Tensor, bits: int) -> Tensor:
        """Transposed, packed along N."""
        return _pack(flipped(codes_NK), bits)

    def unpack_codes(self, stored: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        """See ``Transposed``."""
        return flipped(_unpack(stored, bits, shape[0]))

    def pack_zeros(self, zeros_GN: Tensor, bits: int) -> Tensor:
        """Packed along N."""
        return _pack(zeros_GN, bits)

    def unpack_zeros(self, stored: Tensor, bits: int, rows: int) -> Tensor:
        """See ``Transposed``."""
        return _unpack(stored, bits, rows)


def _pack(codes: Tensor, bits: int) -> Tensor:
    words = codes.view(codes.shape[0], -1, len(_ORDER))[:, :, torch.tensor(_ORDER)]
    return pack_int32(words.reshape(codes.shape), bits)


def _unpack(stored: Tensor, bits: int, cols: int) -> Tensor:
    words = unpack_int32(stored, bits, cols, signed=False).view(stored.shape[0], -1, len(_ORDER))
    return words[:, :, torch.tensor(_ORDER).argsort()].reshape(stored.shape[0], cols)
