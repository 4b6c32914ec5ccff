"""Rows that are wanted a few at a time, in any order: the inputs of experts, and what becomes of them.

N rows of W numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qconvert.weights.scratch import ScratchFile


class RowStore:
    """A [N, W] matrix in memory, or in a file where it is larger than ``limit``; zeros at first."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, *, limit: int, folder: Path | None = None) -> None:
        """Make a store; close it with ``close`` or ``with``.

        Args:
            rows: N.
            width: W.
            dtype: of the numbers.
            limit: bytes that it may have in memory: all of it or nothing.
            folder: for the file, see ``ScratchFile``.
        """
        self._width, self._dtype = width, dtype
        self._row_bytes = width * dtype.itemsize
        self._memory: Tensor | None = None
        self._file = ScratchFile(folder)
        if rows * self._row_bytes <= limit:
            self._memory = torch.zeros(rows, width, dtype=dtype)
        else:
            for begin in range(0, rows, 4096):
                self.put(begin, torch.zeros(min(4096, rows - begin), width, dtype=dtype))

    def put(self, begin: int, rows: Tensor) -> None:
        """Keep ``rows`` [R, W], of any float type, as rows ``begin`` and on.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        if self._memory is not None:
            self._memory[begin : begin + len(rows)] = rows
        else:
            self._file.write(rows.to(self._dtype), begin * self._row_bytes)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end``, a copy.

        Raises:
            OutputError: the file cannot be read.
        """
        if self._memory is not None:
            return self._memory[begin:end].clone()
        found = torch.empty(end - begin, self._width, dtype=self._dtype)
        self._file.read(found, begin * self._row_bytes)
        return found

    def gather(self, at: Tensor) -> Tensor:
        """The rows ``at``, int64 [R] in ascending order: [R, W], a copy.

        Raises:
            OutputError: the file cannot be read.
        """
        if self._memory is not None:
            return self._memory.index_select(0, at)
        found = torch.empty(len(at), self._width, dtype=self._dtype)
        for first, last, begin in _runs(at):
            self._file.read(found[first:last], begin * self._row_bytes)
        return found

    def add(self, at: Tensor, rows: Tensor) -> None:
        """Add ``rows`` [R, W] to the rows ``at``, int64 [R] in ascending order, each there once.

        Raises:
            OutputError: the disk is full or cannot be read or written.
        """
        if self._memory is not None:
            self._memory.index_add_(0, at, rows.to(self._dtype))
            return
        for first, last, begin in _runs(at):
            self.put(begin, self.rows(begin, begin + last - first) + rows[first:last])

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory = None
        self._file.close()

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _runs(at: Tensor) -> Iterator[tuple[int, int, int]]:
    """First and one past the last index of rows that follow each other, and where the first one is."""
    if not len(at):
        return
    cuts = ((at.diff() != 1).nonzero().flatten() + 1).tolist()
    for first, last in zip([0, *cuts], [*cuts, len(at)], strict=True):
        yield first, last, int(at[first])
