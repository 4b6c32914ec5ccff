"""A file without a name, for what does not fit into memory: it goes with the process, however that ends."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from qconvert.core.errors import OutputError
from qconvert.io.checkpoint import byte_view


class ScratchFile:
    """Bytes at offsets; made when the first are written. Any thread may read and write places of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where it is, by default the system's for temporary files, which ``TMPDIR`` names.

        In a folder that is memory itself (tmpfs) nothing is gained.
        """
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: IO[bytes] | None = None

    def write(self, value: Tensor, offset: int) -> None:
        """Put the bytes of a tensor, in row-major order, at ``offset``.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        self._transfer("write", byte_view(value.detach().contiguous().flatten().view(torch.uint8)), offset)

    def read(self, into: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes at ``offset``.

        Raises:
            OutputError: the file cannot be read, or ends before.
        """
        self._transfer("read", byte_view(into.flatten().view(torch.uint8)), offset)

    def close(self) -> None:
        """Remove the file; writing makes another one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _transfer(self, what: str, data: memoryview, offset: int) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="qconvert-", dir=self._folder)  # noqa: SIM115, see close
            done = 0
            while done < len(data):
                left = data[done:]
                fd, at = self._file.fileno(), offset + done
                count = os.pwrite(fd, left, at) if what == "write" else os.preadv(fd, [left], at)
                if not count:
                    raise OSError(0, f"the file ends at {at}")
                done += count
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot {what} {len(data)} bytes of hidden states at offset {offset}: "
                f"{error.strerror}. Make room there, set TMPDIR to another folder, or run fewer tokens"
            ) from error
