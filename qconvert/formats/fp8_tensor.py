"""FP8 with one scale for the matrix and one for its inputs, as llm-compressor and ModelOpt write it; read only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Float, PerTensor, Scheme
from qconvert.formats.base import PartSpec, check_parts, check_scales

WEIGHT = "weight"
SCALE = "weight_scale"
INPUT_SCALE = "input_scale"


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """``weight`` e4m3 [N, K] and ``weight_scale``, of ``scale_shape``; ``input_scale`` like it for static activations.

    Source: compressed-tensors 0.20 (``float-quantized`` with the strategy ``tensor``: scales [1]), ModelOpt 0.47
    (``quant_algo: FP8``: scales without a dimension).
    """

    name: str
    quant_method: str
    scale_shape: tuple[int, ...]

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise ``FormatError`` unless the scheme is FP8 with one scale for the matrix."""
        if scheme.grid != Float(kind="e4m3fn") or scheme.blocking != PerTensor() or scheme.scale.second is not None:
            raise FormatError(f"{self.name} is read with fp8 and one scale for the matrix here, not {scheme}")

    def check(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        """As ``check_scheme``: every shape fits."""
        self.check_scheme(scheme)

    def row_block(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """1: rows are independent."""
        return 1

    def parts(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
        """Codes, their scale and that of static activations."""
        self.check(scheme, shape)
        scale = PartSpec(suffix=SCALE, dtype=scheme.scale.dtype, shape=self.scale_shape, rows_per_row=0)
        specs = (PartSpec(suffix=WEIGHT, dtype=DType.F8_E4M3, shape=shape, rows_per_row=1), scale)
        if scheme.activation.kind != "static":
            return specs
        return (*specs, replace(scale, suffix=INPUT_SCALE, inputs="multiplies"))

    def pack(self, quantized: QuantizedTensor, *, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Not available.

        Raises:
            FormatError: always; scales per row lose less and engines read them as fast.
        """
        raise FormatError(f"{self.name} with one scale for the matrix is read only: use --scheme fp8")

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
        if INPUT_SCALE in parts:
            check_scales(parts[INPUT_SCALE], INPUT_SCALE)
        return QuantizedTensor(codes=parts[WEIGHT], scale=parts[SCALE].reshape(1, 1), scheme=scheme, shape=shape)


TENSOR_SCALED = Fp8Tensor(name="float-quantized-tensor", quant_method="compressed-tensors", scale_shape=(1,))
"""Its name in plans; a configuration calls it like the one with a scale per row."""

MODELOPT_FP8 = Fp8Tensor(name="modelopt-fp8", quant_method="modelopt", scale_shape=())
