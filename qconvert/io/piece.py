"""A run of bytes of one planned tensor, appended in order and hashed on the way to the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qconvert.core.errors import OutputError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import byte_view
from qconvert.io.hashing import new_hash

Bytes = bytes | bytearray | memoryview
Put = Callable[[TensorInfo, memoryview, int], None]
"""Writes bytes at an offset of a tensor."""


class Piece:
    """Bytes ``begin`` to ``end`` of a tensor; one thread appends them.

    Attributes:
        info: the planned tensor.
        begin: first byte, counted from the tensor's own.
        end: one past the last byte.
    """

    __slots__ = ("_hash", "_put", "_where", "begin", "end", "info", "position")

    def __init__(self, info: TensorInfo, begin: int, end: int, algorithm: str, put: Put, where: Path) -> None:
        """Begin with nothing; ``where`` is the file for messages."""
        self.info = info
        self.begin = begin
        self.end = end
        self.position = begin
        self._put = put
        self._where = where
        self._hash = new_hash(algorithm)

    def append(self, data: Tensor | Bytes) -> None:
        """Write ``data`` behind what is there; a tensor is taken as it lies in row-major order.

        Raises:
            OutputError: another element type than planned, bytes past the end, or the disk refuses.
        """
        view = _bytes_of(data, self.info, self._where)
        if self.position + len(view) > self.end:
            raise OutputError(
                f"{self._where}: {self.info.name!r} has {self.end - self.position} bytes left, not {len(view)}"
            )
        self._hash.update(view)
        self._put(self.info, view, self.position)
        self.position += len(view)

    def digest(self) -> str:
        """Hash of all bytes.

        Raises:
            OutputError: bytes are missing.
        """
        if self.position != self.end:
            raise OutputError(
                f"{self._where}: {self.info.name!r} is incomplete, it was written up to byte {self.position} of "
                f"{self.end}"
            )
        return self._hash.hexdigest()


def _bytes_of(data: Tensor | Bytes, info: TensorInfo, where: Path) -> memoryview:
    if not isinstance(data, Tensor):
        return memoryview(data).cast("B")
    if data.dtype != info.dtype.torch_dtype:
        raise OutputError(f"{where}: {info.name!r} is planned as {info.dtype}, but {data.dtype} was to be written")
    flat = data.detach().contiguous().view(-1)
    return byte_view(flat.view(torch.uint8))
