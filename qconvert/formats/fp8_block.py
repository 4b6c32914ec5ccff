"""The layout of the official FP8 checkpoints (``quant_method: fp8``): one scale per 128 x 128 tile."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.scheme import Block, Float, Scheme
from qconvert.formats.scaled_weight import ScaledWeight

TILE = Block(rows=128, cols=128)


def check_tiles(scheme: Scheme, name: str) -> None:
    """Raise ``FormatError`` unless the scheme is FP8 in 128 x 128 tiles, dynamic activations per 128 inputs."""
    if scheme.grid != Float(kind="e4m3fn") or scheme.blocking != TILE:
        raise FormatError(f"{name} holds fp8 in {TILE.rows} x {TILE.cols} tiles, not {scheme}")
    activation = scheme.activation
    if activation.kind != "dynamic" or activation.grid != scheme.grid or activation.group != TILE.cols:
        raise FormatError(f"{name} needs dynamic fp8 activations per {TILE.cols} inputs, not {scheme}")
    if scheme.scale.dtype not in (DType.BF16, DType.F32) or scheme.scale.second is not None:
        raise FormatError(f"{name} holds one BF16 or F32 scale per tile, not {scheme.scale}")


def check_whole_tiles(shape: tuple[int, int]) -> None:
    """Raise ``FormatError`` unless 128 x 128 tiles divide the matrix.

    Transformers takes N / (number of tile rows) for a tile's height: a matrix with partial tiles would load
    with wrong numbers and no error.
    """
    rows, cols = shape
    if rows % TILE.rows or cols % TILE.cols:
        raise FormatError(f"tiles of {TILE.rows} x {TILE.cols} do not divide a {rows} x {cols} matrix")


@dataclass(frozen=True, slots=True)
class Fp8Block(ScaledWeight):
    """``weight`` float8_e4m3fn [N, K], ``weight_scale_inv`` [ceil(N/128), ceil(K/128)], which multiplies the codes.

    Source: the public FP8 checkpoints of this family, and their loaders in transformers 5.23 and vLLM 0.32.
    """

    name: str = "fp8-block"
    quant_method: str = "fp8"
    code: DType = DType.F8_E4M3
    scale: str = "weight_scale_inv"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is FP8 in 128 x 128 tiles, dynamic activations per 128 inputs."""
        check_tiles(scheme, self.name)

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless tiles divide the matrix."""
        self.check_scheme(scheme)
        check_whole_tiles(shape)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """A tile's height."""
        return TILE.rows
