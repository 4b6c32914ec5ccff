"""In which element types a package stores its numbers and computes with them, for the provider that shall run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from qconvert.core.dtypes import DType
from qconvert.core.errors import UsageError

CPU = "cpu"
CUDA = "cuda"

DTYPES: Mapping[str, DType] = MappingProxyType({"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16})
"""Those of `--dtype`."""

IR_TYPES: Mapping[DType, ir.DataType] = MappingProxyType(
    {DType.F32: ir.DataType.FLOAT, DType.F16: ir.DataType.FLOAT16, DType.BF16: ir.DataType.BFLOAT16}
)
"""What ONNX calls them."""

DEFAULTS: Mapping[str, str] = MappingProxyType({CPU: "float32", CUDA: "bfloat16"})
"""The type of each provider where none is named. BF16 is what the public checkpoints are stored in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A provider and a type: what is stored in it, and where it is computed in.

    Norms, rotation, linear attention with its convolution and memory, router, shared-expert gate and vision tower are
    float32 whatever the type is, and so are logits, embeddings and the hidden states between layers.

    Attributes:
        ep: execution provider that shall run the package, ``CPU`` or ``CUDA``.
        dtype: of dense matrices, the embedding among them.
    """

    ep: str = CPU
    dtype: DType = DType.F32

    @property
    def scales(self) -> DType:
        """Of integer codes: on a GPU operators multiply in the type of the scales, on a CPU in float32."""
        return self.dtype if self.ep == CUDA else DType.F32

    @property
    def products(self) -> ir.DataType:
        """In which attention multiplies. The CPU's operators compute in float32."""
        return IR_TYPES[self.dtype] if self.ep == CUDA else ir.DataType.FLOAT

    @property
    def cache(self) -> ir.DataType:
        """Of keys and values between calls. On a CPU they pass through numpy, which knows no bfloat16."""
        return ir.DataType.FLOAT if (self.ep, self.dtype) == (CPU, DType.BF16) else IR_TYPES[self.dtype]


def precision_named(ep: str, dtype: str | None) -> Precision:
    """What ``--ep`` and ``--dtype`` say; without a type that of ``DEFAULTS``.

    Raises:
        UsageError: a provider or type that there is not, or one that the provider has no operators for.
    """
    if ep not in DEFAULTS:
        raise UsageError(f"execution provider {ep!r} is unknown; expected {' or '.join(DEFAULTS)}")
    name = dtype or DEFAULTS[ep]
    if name not in DTYPES:
        raise UsageError(f"element type {name!r} is unknown; expected {', '.join(DTYPES)}")
    if ep == CUDA and name == "float32":
        raise UsageError("ONNX Runtime's CUDA provider has no float32 kernel for experts in codes: bfloat16 or float16")
    return Precision(ep=ep, dtype=DTYPES[name])
