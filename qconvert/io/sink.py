"""The write side that a run needs, whatever the output's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

Bytes = bytes | bytearray | memoryview
Content = bytes | Path | Callable[[Mapping[str, str]], bytes]
"""A file's bytes, the path of a file to copy, or what makes the bytes from the hashes of all tensors."""

Extra = Mapping[str, Content]
"""Files beside the weights by name."""


class Sink(Protocol):
    """Takes the bytes of planned tensors in any order, from any thread; nothing is visible before ``finish``."""

    def write(self, name: str, data: Tensor | Bytes, offset: int = 0) -> None:
        """Put ``data`` at byte ``offset`` of tensor ``name``.

        Raises:
            OutputError: unknown tensor, outside it, or the disk refuses.
        """
        ...

    def finish(self, extra: Extra) -> dict[str, str]:
        """Check that everything is written and reads back alike, add ``extra``, make the output visible.

        Returns:
            xxh3-128 of every tensor's bytes.

        Raises:
            OutputError: bytes are missing or read back differently, or the disk refuses.
        """
        ...

    def abort(self) -> None:
        """Remove what was written; without effect after ``finish``."""
        ...
