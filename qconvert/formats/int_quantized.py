"""compressed-tensors ``int-quantized``: int8 weights with one scale per row, activations rounded to int8."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.scheme import Channel, Int, Scheme
from qconvert.formats.scaled_weight import ScaledWeight


@dataclass(frozen=True, slots=True)
class IntQuantized(ScaledWeight):
    """``weight`` int8 [N, K], ``weight_scale`` [N, 1] (W8A8). Source: compressed-tensors 0.20."""

    name: str = "int-quantized"
    quant_method: str = "compressed-tensors"
    code: DType = DType.I8
    scale: str = "weight_scale"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is int8 per channel with dynamic int8 activations per token."""
        if scheme.grid != Int(bits=8) or not scheme.symmetric or scheme.blocking != Channel():
            raise FormatError(f"{self.name} holds symmetric int8 with one scale per channel, not {scheme}")
        activation = scheme.activation
        if activation.kind != "dynamic" or activation.grid != scheme.grid or activation.group is not None:
            raise FormatError(f"{self.name} needs dynamic int8 activations per token, not {scheme}")
        if not scheme.scale.dtype.is_weight or scheme.scale.second is not None:
            raise FormatError(f"{self.name} holds one BF16, F16 or F32 scale per row, not {scheme.scale}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme) -> int:
        """1: rows are independent."""
        return 1
