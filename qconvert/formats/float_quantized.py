"""compressed-tensors ``float-quantized``: FP8 e4m3 weights with one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.scheme import Float, Int
from qconvert.formats.row_scaled import RowScaled

_GRID = Float(kind="e4m3fn")


@dataclass(frozen=True, slots=True)
class FloatQuantized(RowScaled):
    """``weight`` float8_e4m3fn [N, K], ``weight_scale`` [N, 1]. Source: compressed-tensors 0.20."""

    name: str = "float-quantized"
    quant_method: str = "compressed-tensors"
    grid: Int | Float = _GRID
    code: DType = DType.F8_E4M3
    scale: str = "weight_scale"
