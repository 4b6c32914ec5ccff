"""NVFP4 as ModelOpt names it (``quant_algo: NVFP4``); read only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import NVFP4, Scheme
from qconvert.formats.base import PartSpec, check_groups, check_parts, check_scales
from qconvert.formats.nvfp4_packed import check_second_level
from qconvert.numerics.packing import unpack_pairs

WEIGHT = "weight"
SCALE = "weight_scale"
SECOND_SCALE = "weight_scale_2"
INPUT_SCALE = "input_scale"


@dataclass(frozen=True, slots=True)
class Nvfp4ModelOpt:
    """``weight`` uint8 [N, K/2], ``weight_scale`` e4m3 [N, K/16], ``weight_scale_2`` float32, which multiplies.

    For four-bit activations also ``input_scale`` float32. Source: ModelOpt 0.47, vLLM 0.32 ``modelopt.py``.
    """

    name: str = "modelopt-nvfp4"
    quant_method: str = "modelopt"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless weights are NVFP4."""
        if scheme.weight_only() != NVFP4:
            raise FormatError(f"{self.name} holds {NVFP4}, not {scheme}")

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
        specs = [
            PartSpec(suffix=WEIGHT, dtype=DType.U8, shape=(rows, cols // 2), rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=DType.F8_E4M3, shape=scheme.scale_shape(rows, cols), rows_per_row=1),
            PartSpec(suffix=SECOND_SCALE, dtype=DType.F32, shape=(), rows_per_row=0),
        ]
        if scheme.activation.kind != "none":
            specs.append(PartSpec(suffix=INPUT_SCALE, dtype=DType.F32, shape=(), rows_per_row=0, inputs="multiplies"))
        return tuple(specs)

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Not available.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"{self.name} is read only: --scheme nvfp4 writes compressed-tensors")

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
        check_scales(parts[SECOND_SCALE], SECOND_SCALE)
        check_second_level(parts[SCALE], SCALE, parts[WEIGHT])
        if INPUT_SCALE in parts:
            check_scales(parts[INPUT_SCALE], INPUT_SCALE)
        return QuantizedTensor(
            codes=unpack_pairs(parts[WEIGHT]),
            scale=parts[SCALE],
            second_scale=parts[SECOND_SCALE],
            scheme=scheme,
            shape=shape,
        )
