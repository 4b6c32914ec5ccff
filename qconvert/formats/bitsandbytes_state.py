"""The pre-quantized state of bitsandbytes (``quant_method: bitsandbytes``), in four bits and in eight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import CODEBOOKS, QuantizedTensor
from qconvert.core.scheme import LLM_INT8, Scheme, bnb4
from qconvert.formats.base import PartSpec, check_parts, check_scales
from qconvert.numerics.packing import pack_int32, unpack_pairs

WEIGHT = "weight"
ABSMAX = "weight.absmax"
QUANT_MAP = "weight.quant_map"
SCB = "SCB"
WEIGHT_FORMAT = "weight_format"

_ROW = 0
"""``weight_format`` of codes that lie in rows."""


@dataclass(frozen=True, slots=True)
class Bitsandbytes4:
    """``weight`` uint8 [N*K/2, 1], the first of two codes in the high half; ``weight.absmax`` float32 [N*K/64].

    Beside them ``weight.quant_map`` float32 [16], the codebook, and ``weight.quant_state.bitsandbytes__<codebook>``,
    the bytes of a JSON object. Blocks run on from row to row. Source: bitsandbytes 0.50, ``QuantState.as_dict``; the
    scales are not quantized a second time.
    """

    codebook: str
    quant_method: str = "bitsandbytes"

    @property
    def name(self) -> str:
        """See ``Format.name``."""
        return f"bitsandbytes-{self.codebook}"

    @property
    def state(self) -> str:
        """Suffix of the JSON object."""
        return f"weight.quant_state.bitsandbytes__{self.codebook}"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is this codebook with a float32 scale per 64 elements."""
        if scheme != bnb4("nf4" if self.codebook == "nf4" else "fp4"):
            raise FormatError(f"{self.name} holds {self.codebook} with a float32 scale per 64 elements, not {scheme}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless blocks divide the matrix."""
        self.check_scheme(scheme)
        rows, cols = shape
        if rows * cols % 64:
            raise FormatError(f"blocks of 64 do not divide the elements of a {rows} x {cols} matrix")

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """All rows: what is stored has none."""
        return shape[0]

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Packed codes, scales, codebook, and the object that describes them."""
        self.check(scheme, shape)
        count = shape[0] * shape[1]
        stored = (
            (WEIGHT, DType.U8, (count // 2, 1)),
            (ABSMAX, DType.F32, (count // 64,)),
            (QUANT_MAP, DType.F32, (len(CODEBOOKS[self.codebook]),)),
            (self.state, DType.U8, (len(self._described(shape)),)),
        )
        return tuple(PartSpec(suffix=name, dtype=dtype, shape=size, rows_per_row=0) for name, dtype, size in stored)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        self.check(quantized.scheme, quantized.shape)
        return {
            WEIGHT: pack_int32(_swapped(quantized.codes).view(1, -1), 4).view(torch.uint8).view(-1, 1),
            ABSMAX: quantized.scale,
            QUANT_MAP: torch.tensor(CODEBOOKS[self.codebook], dtype=torch.float32),
            self.state: torch.tensor(list(self._described(shape or quantized.shape)), dtype=torch.uint8),
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
        check_scales(parts[ABSMAX], ABSMAX)
        described = bytes(parts[self.state].tolist())
        if described != self._described(shape):
            raise FormatError(f"{self.state} says {described!r}, expected {self._described(shape)!r}", part=self.state)
        if not torch.equal(parts[QUANT_MAP], torch.tensor(CODEBOOKS[self.codebook], dtype=torch.float32)):
            raise FormatError(f"{QUANT_MAP} is not the codebook {self.codebook}", part=QUANT_MAP)
        codes = _swapped(unpack_pairs(parts[WEIGHT].reshape(1, -1))).view(shape)
        return QuantizedTensor(codes=codes, scale=parts[ABSMAX], scheme=scheme, shape=shape)

    def _described(self, shape: tuple[int, int]) -> bytes:
        described = {"quant_type": self.codebook, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        return json.dumps(described).encode()


@dataclass(frozen=True, slots=True)
class Bitsandbytes8:
    """``weight`` int8 [N, K], ``SCB`` float32 [N], the largest value of each row, ``weight_format`` uint8, a zero.

    Source: bitsandbytes 0.50, ``Linear8bitLt``.
    """

    name: str = "bitsandbytes-int8"
    quant_method: str = "bitsandbytes"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is LLM.int8."""
        if scheme != LLM_INT8:
            raise FormatError(f"{self.name} holds {LLM_INT8} with float32 scales and 1/127, not {scheme}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Codes, scales, and how they lie."""
        self.check(scheme, shape)
        return (
            PartSpec(suffix=WEIGHT, dtype=DType.I8, shape=shape, rows_per_row=1),
            PartSpec(suffix=SCB, dtype=DType.F32, shape=shape[:1], rows_per_row=1),
            PartSpec(suffix=WEIGHT_FORMAT, dtype=DType.U8, shape=(), rows_per_row=0),
        )

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See ``Format.pack``."""
        self.check(quantized.scheme, quantized.shape)
        return {
            WEIGHT: quantized.codes,
            SCB: quantized.scale.reshape(-1),
            WEIGHT_FORMAT: torch.tensor(_ROW, dtype=torch.uint8),
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
        check_scales(parts[SCB], SCB)
        if bool((parts[WEIGHT] == -128).any()):
            raise FormatError(f"{WEIGHT} holds -128, which LLM.int8 has no place for", part=WEIGHT)
        if int(parts[WEIGHT_FORMAT]) != _ROW:
            raise FormatError(
                f"{WEIGHT_FORMAT} is {int(parts[WEIGHT_FORMAT])}; only codes in rows can be read", part=WEIGHT_FORMAT
            )
        return QuantizedTensor(
            codes=parts[WEIGHT],
            scale=parts[SCB].reshape(-1, 1),
            second_scale=torch.tensor(1.0 / 127.0, dtype=torch.float32),
            scheme=scheme,
            shape=shape,
        )


def _swapped(codes: Tensor) -> Tensor:
    """Neighbours exchanged: bitsandbytes has the first of two codes in the high half of a byte."""
    return codes.reshape(-1, 2).flip(1).reshape(codes.shape)
