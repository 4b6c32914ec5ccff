"""The write side that a run needs, whatever the output's format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qconvert.io.piece import Piece

Note = Mapping[str, Any]
"""What a run wants to know of a finished step when it goes on after an interruption: plain JSON."""

Content = bytes | Path | Callable[[Mapping[str, str]], Iterable[bytes]]
"""A file's bytes, the path of a file to copy, or what makes the bytes, part by part, from the hashes of all tensors."""

Extra = Mapping[str, Content]
"""Files beside the weights by name."""


class Sink(Protocol):
    """Takes the bytes of planned tensors from any thread; nothing is visible before ``finish``.

    A step writes its tensors piece by piece and commits them together. Committed steps become durable in groups and
    are ``finished`` in a run that goes on after this one was killed.
    """

    @property
    def algorithm(self) -> str:
        """How tensors are hashed, see ``hashing``."""
        ...

    @property
    def finished(self) -> Mapping[str, Note]:
        """Notes of the steps that need not be done again, by key."""
        ...

    def piece(self, name: str, begin: int = 0, end: int | None = None) -> Piece:
        """Bytes ``begin`` to ``end`` of tensor ``name``, by default all, to be appended to.

        Raises:
            OutputError: unknown tensor, or bytes outside it.
        """
        ...

    def commit(self, key: str, pieces: Iterable[Piece], note: Note) -> None:
        """Say that a step is done: its pieces are whole.

        Raises:
            OutputError: a piece is incomplete, overlaps another, or the disk has refused something meanwhile.
        """
        ...

    def flush(self) -> None:
        """Wait until all that was committed is durable.

        Raises:
            OutputError: the disk refuses.
        """
        ...

    def finish(self, extra: Extra) -> dict[str, str]:
        """Check that everything is there, durable and reads back alike, add ``extra``, make the output visible.

        Returns:
            The hash of every tensor's bytes.

        Raises:
            OutputError: bytes are missing or read back differently, or the disk refuses.
        """
        ...

    def suspend(self) -> bool:
        """Keep what is finished for a run that goes on; whether there is anything to keep."""
        ...

    def abort(self) -> None:
        """Remove what was written; without effect after ``finish``."""
        ...
