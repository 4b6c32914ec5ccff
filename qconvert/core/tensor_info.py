"""What a safetensors header says of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from qconvert.core.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor's place: no bytes.

    Attributes:
        name: full name in the checkpoint.
        shard: file name inside the checkpoint folder.
        begin: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    @property
    def row_width(self) -> int:
        """Elements of one row, rows being counted over all leading dimensions; 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_width * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)
