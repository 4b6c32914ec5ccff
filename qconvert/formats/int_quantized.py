"""compressed-tensors ``int-quantized``: int8 weights with one scale per row, activations rounded to int8."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.scheme import Float, Int
from qconvert.formats.row_scaled import RowScaled

_GRID = Int(bits=8)


@dataclass(frozen=True, slots=True)
class IntQuantized(RowScaled):
    """``weight`` int8 [N, K], ``weight_scale`` [N, 1]. Source: compressed-tensors 0.20."""

    name: str = "int-quantized"
    quant_method: str = "compressed-tensors"
    grid: Int | Float = _GRID
    code: DType = DType.I8
    scale: str = "weight_scale"
