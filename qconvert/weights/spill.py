"""Hidden states that wait on disk: an ``ActivationStore`` whose memory has a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qconvert.core.errors import OutputError
from qconvert.weights.scratch import ScratchFile


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the bytes of a tensor are in the file, and what they mean."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


class SpillStore:
    """Keeps up to ``limit`` bytes of tensors in memory and the rest in one file.

    Tensors are used in turns, layer after layer: whatever is in memory stays there, since the one that was used last is
    the one that will be needed last. Keys are never names on disk.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Make an empty store; close it with ``close`` or ``with``.

        Args:
            limit: bytes of tensors in memory.
            folder: for the file, see ``ScratchFile``.
        """
        self._limit = limit
        self._memory: dict[str, Tensor] = {}
        self._held = 0
        self._places: dict[str, _Place] = {}
        self._free: dict[int, list[int]] = {}
        self._file = ScratchFile(folder)
        self._end = 0

    def put(self, key: str, value: Tensor) -> None:
        """Keep ``value`` under ``key``, in place of what was there.

        Raises:
            OutputError: the disk is full or cannot be written. The key is then unknown.
        """
        if key in self._memory or key in self._places:
            self.drop(key)
        if self._held + value.nbytes <= self._limit:
            # a view would keep all of the memory that it looks into
            own = value.untyped_storage().nbytes() == value.nbytes
            self._memory[key] = value.detach() if own else value.detach().clone()
            self._held += value.nbytes
        else:
            offset = self._room(value.nbytes)
            self._write(value, offset)
            self._places[key] = _Place(offset=offset, nbytes=value.nbytes, dtype=value.dtype, shape=value.shape)

    def get(self, key: str) -> Tensor:
        """The tensor under ``key``, bit for bit.

        Raises:
            KeyError: there is none.
            OutputError: the file cannot be read.
        """
        if key in self._memory:
            return self._memory[key]
        place = self._places[key]
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        self._file.read(data, place.offset)
        return data.view(place.dtype).view(place.shape)

    def drop(self, key: str) -> None:
        """Forget ``key``; its place in the file is used again.

        Raises:
            KeyError: there is none.
        """
        if key in self._memory:
            self._held -= self._memory.pop(key).nbytes
        else:
            place = self._places.pop(key)
            self._free.setdefault(place.nbytes, []).append(place.offset)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory.clear()
        self._places.clear()
        self._free.clear()
        self._held = self._end = 0
        self._file.close()

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _room(self, nbytes: int) -> int:
        """A place of just that size that is free, or a new one at the end: batches come back in their own sizes."""
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        self._end += nbytes
        return self._end - nbytes

    def _write(self, value: Tensor, offset: int) -> None:
        try:
            self._file.write(value, offset)
        except OutputError:
            self._free.setdefault(value.nbytes, []).append(offset)
            raise
