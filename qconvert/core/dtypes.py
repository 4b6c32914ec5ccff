"""Element types as safetensors names them, their width and their torch counterpart."""

from __future__ import annotations

import enum

import torch


class DType(enum.Enum):
    """An element type; the value is its safetensors name."""

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    F8_E8M0 = "F8_E8M0"
    U16 = "U16"
    I16 = "I16"
    F16 = "F16"
    BF16 = "BF16"
    U32 = "U32"
    I32 = "I32"
    F32 = "F32"
    U64 = "U64"
    I64 = "I64"
    F64 = "F64"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch element type with the same bytes."""
        return _TORCH[self]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _TORCH[self].itemsize

    @property
    def is_weight(self) -> bool:
        """Whether unquantized weights are stored in this type: BF16, F16 or F32."""
        return self in (DType.BF16, DType.F16, DType.F32)

    @classmethod
    def from_torch(cls, dtype: torch.dtype) -> DType:
        """The element type of a torch tensor.

        Raises:
            KeyError: safetensors has no such type.
        """
        return _FROM_TORCH[dtype]

    def __str__(self) -> str:
        return self.value


_TORCH = {
    DType.BOOL: torch.bool,
    DType.U8: torch.uint8,
    DType.I8: torch.int8,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E8M0: torch.float8_e8m0fnu,
    DType.U16: torch.uint16,
    DType.I16: torch.int16,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.U32: torch.uint32,
    DType.I32: torch.int32,
    DType.F32: torch.float32,
    DType.U64: torch.uint64,
    DType.I64: torch.int64,
    DType.F64: torch.float64,
}
_FROM_TORCH = {dtype: name for name, dtype in _TORCH.items()}
