"""A sink that writes nothing: it compares what is to be written with what stands in files already."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from qconvert.core.errors import OutputError, SourceError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.piece import Piece
from qconvert.io.sink import Extra, Note

_READ_BYTES = 4 << 20


class ComparingSink:
    """A ``Sink`` over tensors that lie in open files; see there for what the methods promise.

    Attributes:
        algorithm: hash of the tensors.
        finished: nothing.
        different: by tensor, how many of its bytes differ; a tensor that is not there does not count.
    """

    algorithm: str
    finished: Mapping[str, Note] = MappingProxyType({})
    different: Counter[str]

    def __init__(
        self,
        planned: Mapping[str, TensorInfo],
        stored: Mapping[str, tuple[int, TensorInfo]],
        folder: Path,
        algorithm: str,
    ) -> None:
        """Compare pieces of ``planned`` tensors with ``stored`` ones: the open file that each is in, and where."""
        self.algorithm = algorithm
        self.different = Counter()
        self._planned = planned
        self._stored = stored
        self._folder = folder
        self._guard = threading.Lock()

    def piece(self, name: str, begin: int = 0, end: int | None = None) -> Piece:
        """Bytes to compare with those of tensor ``name``."""
        info = self._planned.get(name)
        if info is None:
            raise OutputError(f"{self._folder}: {name!r} is not in the plan's layout")
        last = info.nbytes if end is None else end
        return Piece(info, begin, last, self.algorithm, self._compare, self._folder / info.shard)

    def commit(self, key: str, pieces: Iterable[Piece], note: Note) -> None:
        """Check that the step's pieces are whole."""
        for piece in pieces:
            piece.digest()

    def flush(self) -> None:
        """There is nothing to wait for."""

    def finish(self, extra: Extra) -> dict[str, str]:
        """There is nothing to finish: no tensor has a new hash."""
        return {}

    def suspend(self) -> bool:
        """There is nothing to keep."""
        return False

    def abort(self) -> None:
        """There is nothing to remove."""

    def _compare(self, info: TensorInfo, data: memoryview, offset: int) -> None:
        if info.name not in self._stored:
            return
        fd, place = self._stored[info.name]
        wrong = 0
        for begin in range(0, len(data), _READ_BYTES):
            part = data[begin : begin + _READ_BYTES]
            count = min(len(part), max(0, place.nbytes - offset - begin))
            try:
                found = os.pread(fd, count, place.begin + offset + begin)
            except OSError as error:
                raise SourceError(f"cannot read {self._folder / place.shard}: {error.strerror}") from error
            same = np.frombuffer(found, np.uint8) == np.frombuffer(part, np.uint8)[: len(found)]
            wrong += len(part) - int(np.count_nonzero(same))
        if wrong:
            with self._guard:
                self.different[info.name] += wrong
