"""compressed-tensors ``float-quantized``: FP8 e4m3 weights with one scale per row, or per 128 x 128 tile."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.scheme import Block, Float, Int, Scheme
from qconvert.formats.fp8_block import check_tiles, check_whole_tiles
from qconvert.formats.row_scaled import RowScaled

_GRID = Float(kind="e4m3fn")


@dataclass(frozen=True, slots=True)
class FloatQuantized(RowScaled):
    """``weight`` float8_e4m3fn [N, K], ``weight_scale`` [N, 1] or [N/128, K/128]. Source: compressed-tensors 0.20."""

    name: str = "float-quantized"
    quant_method: str = "compressed-tensors"
    grid: Int | Float = _GRID
    code: DType = DType.F8_E4M3
    scale: str = "weight_scale"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless activations are dynamic, per token for rows and per 128 inputs for tiles."""
        if isinstance(scheme.blocking, Block):
            check_tiles(scheme, self.name)
        else:
            self.check_rows(scheme)

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless tiles divide the matrix; rows fit any."""
        self.check_scheme(scheme)
        if isinstance(scheme.blocking, Block):
            check_whole_tiles(shape)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """A tile's height, or 1."""
        return scheme.blocking.rows if isinstance(scheme.blocking, Block) else 1
