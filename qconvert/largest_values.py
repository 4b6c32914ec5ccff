"""The largest value of the matrices that share a second scale, found once for all of them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

from qconvert.core.errors import DataError
from qconvert.core.plan import Reading
from qconvert.matrix_reader import MatrixReader
from qconvert.numerics.finite import largest_of
from qconvert.plan.row_blocks import row_blocks, rows_together


@dataclass(slots=True)
class _Shared:
    """One stack: how many of its matrices have still to ask, and the answer."""

    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    largest: float | None = None


class LargestValues:
    """Answers to the steps of one run, from any thread; what all matrices of a stack have asked for is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stacks: dict[tuple[Reading, ...], _Shared] = {}

    def of(self, stack: tuple[Reading, ...], read: MatrixReader) -> float:
        """The largest absolute value of all matrices of ``stack``; 0 where there are none. Each of them asks once.

        Raises:
            DataError: a value is NaN or infinite; names file and tensor.
        """
        if len(stack) < 2:  # nobody to share it with
            return _largest(stack, read)
        with self._lock:
            shared = self._stacks.setdefault(stack, _Shared(left=len(stack)))
            shared.left -= 1
            if not shared.left:
                del self._stacks[stack]
        with shared.lock:
            if shared.largest is None:
                shared.largest = _largest(stack, read)
            return shared.largest


def _largest(stack: tuple[Reading, ...], read: MatrixReader) -> float:
    largest = 0.0
    for reading in stack:
        for begin, end in row_blocks(*read.shape(reading), rows_together(reading.packed, 1)):
            found = largest_of(read.rows(reading, begin, end, None))
            if not math.isfinite(found):
                part = reading.inputs[0]
                raise DataError(f"{read.info(part).shard}: {part.tensor} has NaN or infinite values")
            largest = max(largest, found)
    return largest
