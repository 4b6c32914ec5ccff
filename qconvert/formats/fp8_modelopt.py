"""ModelOpt's FP8 with one scale per row or per 128 x 128 tile, which it stores in shapes of its own; read only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import FP8, Scheme
from qconvert.formats.base import PartSpec, check_parts, check_scales
from qconvert.formats.fp8_block import TILE, check_tiles, check_whole_tiles

WEIGHT = "weight"
SCALE = "weight_scale"


def _check_type_of_scales(scheme: Scheme, name: str) -> None:
    if scheme.scale.dtype is not DType.F32:
        raise FormatError(f"{name} has F32 scales, not {scheme.scale}")


@dataclass(frozen=True, slots=True)
class Fp8ModelOptRows:
    """``weight`` e4m3 [N, K], ``weight_scale`` F32 [N] (``quant_algo: FP8_PER_CHANNEL_PER_TOKEN``).

    Source: ModelOpt 0.47 ``export/quant_utils.py``, vLLM 0.32 ``modelopt.py``.
    """

    name: str = "modelopt-fp8-rows"
    quant_method: str = "modelopt"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is FP8 per channel, dynamic activations per token, F32 scales."""
        if (scheme.grid, scheme.blocking, scheme.activation) != (FP8.grid, FP8.blocking, FP8.activation):
            raise FormatError(f"{self.name} holds {FP8}, not {scheme}")
        _check_type_of_scales(scheme, self.name)

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Codes and a vector of scales."""
        self.check(scheme, shape)
        return (
            PartSpec(suffix=WEIGHT, dtype=DType.F8_E4M3, shape=shape, rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=DType.F32, shape=shape[:1], rows_per_row=1),
        )

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Not available.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"{self.name} is read only: --scheme fp8 writes compressed-tensors")

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
        check_scales(parts[SCALE], SCALE)
        return QuantizedTensor(codes=parts[WEIGHT], scale=parts[SCALE].unsqueeze(1), scheme=scheme, shape=shape)


@dataclass(frozen=True, slots=True)
class Fp8ModelOptTiles:
    """``weight`` e4m3 [N, K], ``weight_scale`` F32 [N/128, 1, K/128, 1] (``quant_algo: FP8_PB_WO``).

    Without ``spread`` the scales are [N/128, K/128], as ModelOpt's ``FP8_PB_REAL`` has them and vLLM takes them too.
    Weights alone are rounded; vLLM rounds activations per 128 inputs as well, and so schemes say. Source: ModelOpt
    0.47 ``export/quant_utils.py`` and ``qtensor/fp8_tensor.py``, vLLM 0.32 ``modelopt.py``.
    """

    name: str
    spread: bool
    quant_method: str = "modelopt"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is FP8 in 128 x 128 tiles with F32 scales."""
        check_tiles(scheme, self.name)
        _check_type_of_scales(scheme, self.name)

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """Raise ``FormatError`` unless tiles divide the matrix."""
        self.check_scheme(scheme)
        check_whole_tiles(shape)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """A tile's height; all rows where scales are ``spread``, for no row of these belongs to rows of codes."""
        return shape[0] if self.spread else TILE.rows

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Codes and scales."""
        self.check(scheme, shape)
        tall, wide = scheme.scale_shape(*shape)
        scales = (tall, 1, wide, 1) if self.spread else (tall, wide)
        return (
            PartSpec(suffix=WEIGHT, dtype=DType.F8_E4M3, shape=shape, rows_per_row=1),
            PartSpec(suffix=SCALE, dtype=DType.F32, shape=scales, rows_per_row=0 if self.spread else TILE.rows),
        )

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Not available.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"{self.name} is read only: --scheme fp8-block writes what more engines read")

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
        check_scales(parts[SCALE], SCALE)
        scale = parts[SCALE].reshape(scheme.scale_shape(*shape))
        return QuantizedTensor(codes=parts[WEIGHT], scale=scale, scheme=scheme, shape=shape)


MODELOPT_ROWS = Fp8ModelOptRows()
MODELOPT_TILES = Fp8ModelOptTiles(name="modelopt-fp8-tiles", spread=True)
MODELOPT_FLAT_TILES = Fp8ModelOptTiles(name="modelopt-fp8-flat-tiles", spread=False)
