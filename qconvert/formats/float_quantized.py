"""compressed-tensors ``float-quantized``: FP8 e4m3 weights with one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.scheme import Channel, Float, Scheme
from qconvert.formats.scaled_weight import ScaledWeight


@dataclass(frozen=True, slots=True)
class FloatQuantized(ScaledWeight):
    """``weight`` float8_e4m3fn [N, K], ``weight_scale`` [N, 1]. Source: compressed-tensors 0.20."""

    name: str = "float-quantized"
    quant_method: str = "compressed-tensors"
    code: DType = DType.F8_E4M3
    scale: str = "weight_scale"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is FP8 per channel with dynamic FP8 activations per token."""
        if scheme.grid != Float(kind="e4m3fn") or scheme.blocking != Channel():
            raise FormatError(f"{self.name} holds fp8 with one scale per channel, not {scheme}")
        activation = scheme.activation
        if activation.kind != "dynamic" or activation.grid != scheme.grid or activation.group is not None:
            raise FormatError(f"{self.name} needs dynamic fp8 activations per token, not {scheme}")
        if not scheme.scale.dtype.is_weight or scheme.scale.second is not None:
            raise FormatError(f"{self.name} holds one BF16, F16 or F32 scale per row, not {scheme.scale}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme) -> int:
        """1: rows are independent."""
        return 1
