"""Rows of one matrix of the source, plain or quantized, read into memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qconvert.core.errors import DataError, FormatError, PlanError
from qconvert.core.plan import Packed, Reading, Slice
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.base import PartSpec
from qconvert.formats.table import format_named
from qconvert.io.checkpoint import Checkpoint, byte_view
from qconvert.io.hashing import Hash, new_hash


class StoppedError(Exception):
    """Another step has failed, or the run is interrupted."""


class SourceHash:
    """Hash of everything that a step reads: of its one tensor, or over the hashes of its parts in their order.

    So it does not depend on the runs of rows that are read, although parts are read by turns.
    """

    def __init__(self, algorithm: str, inputs: Sequence[Slice]) -> None:
        self._algorithm = algorithm
        self._of: dict[Slice, Hash] = {part: new_hash(algorithm) for part in inputs}

    def update(self, part: Slice, view: memoryview) -> None:
        """Take the next bytes of ``part``."""
        self._of[part].update(view)

    def hexdigest(self) -> str:
        """The hash of what was read so far."""
        digests = [one.hexdigest() for one in self._of.values()]
        if len(digests) == 1:
            return digests[0]
        together = new_hash(self._algorithm)
        together.update(memoryview("".join(digests).encode()))
        return together.hexdigest()


class MatrixReader:
    """Reads for one thread at a time."""

    def __init__(self, source: Checkpoint, stop: threading.Event) -> None:
        self._source = source
        self._stop = stop
        self._buffers: list[Tensor] = []

    def release(self) -> None:
        """Give memory back; what was read into it is gone."""
        self._buffers.clear()

    def info(self, part: Slice) -> TensorInfo:
        """The place of the tensor that ``part`` is rows of."""
        return self._source.tensors[part.tensor]

    def shape(self, reading: Reading) -> tuple[int, int]:
        """(N, K) of a matrix."""
        if reading.packed is not None:
            return reading.packed.shape
        part = reading.inputs[0]
        return part.end - part.begin, self.info(part).row_width

    @contextmanager
    def naming(self, reading: Reading, becomes: str) -> Iterator[None]:
        """Say which tensor a ``DataError`` speaks of, and what was to become of it."""
        try:
            yield
        except DataError as error:
            part = reading.inputs[0]
            raise DataError(f"{self.info(part).shard}: {part.tensor}, for {becomes}: {error}") from None

    def stored(self, part: Slice, begin: int, end: int, into: SourceHash | None, *, buffer: int = 0) -> Tensor:
        """Rows ``begin`` to ``end`` of a part as they are, valid until memory number ``buffer`` is read into again.

        Their bytes go into the hash, if any.

        Raises:
            StoppedError: the run has ended.
            SourceError: they cannot be read.
        """
        if self._stop.is_set():
            raise StoppedError
        needed = (end - begin) * self.info(part).row_bytes
        while len(self._buffers) <= buffer:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[buffer].numel() < needed:
            self._buffers[buffer] = torch.empty(needed, dtype=torch.uint8)
        memory = self._buffers[buffer]
        rows = self._source.read(part.tensor, part.begin + begin, part.begin + end, buffer=memory)
        if into is not None:
            into.update(part, byte_view(memory[:needed]))
        return rows

    def rows(self, reading: Reading, begin: int, end: int, into: SourceHash | None, *, buffer: int = 0) -> Tensor:
        """Rows of a matrix: those of a plain tensor as they are, those of a quantized one in float32.

        They are valid until memory number ``buffer``, or a later one, is read into again.

        Raises:
            StoppedError, SourceError: see ``stored``.
            DataError: see ``unpacked``.
        """
        if reading.packed is None:
            return self.stored(reading.inputs[0], begin, end, into, buffer=buffer)
        return self.unpacked(reading, begin, end, self.parts(reading, begin, end, into, buffer=buffer)).dequantize()

    def parts(
        self, reading: Reading, begin: int, end: int, into: SourceHash | None, *, buffer: int = 0
    ) -> dict[str, Tensor]:
        """What is stored of some rows of a quantized matrix, by suffix; they begin at a multiple of its row block.

        They are read into memory number ``buffer`` and those that follow.

        Raises:
            StoppedError, SourceError: see ``stored``.
        """
        found = {}
        for number, (spec, part) in enumerate(zip(_specs(reading), reading.inputs, strict=True), start=buffer):
            if spec.rows_per_row:
                found[spec.suffix] = self.stored(part, *spec.rows_of(begin, end), into, buffer=number)
            else:
                # read again for every run, but one time in the hash
                whole = self.stored(part, 0, part.end - part.begin, None if begin else into, buffer=number)
                found[spec.suffix] = whole.view(self.info(part).shape)
        return found

    def unpacked(self, reading: Reading, begin: int, end: int, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """Codes and scales of the rows that ``parts`` hold.

        Raises:
            DataError: parts that contradict each other, or scales that no rounding makes; names file and tensor.
        """
        packed = _packed(reading)
        try:
            form = format_named(packed.format)
            return form.unpack(parts, packed.scheme, (end - begin, packed.shape[1]), whole=packed.shape)
        except FormatError as error:
            at_fault = [part for part in reading.inputs if part.tensor.endswith(f".{error.part}")]
            part = (*at_fault, reading.inputs[0])[0]
            place = self._source.path / self.info(part).shard
            raise DataError(f"{place}: {part.tensor} cannot be read: {error}; get the file again") from None


def _packed(reading: Reading) -> Packed:
    if reading.packed is None:
        raise PlanError(f"{reading.inputs[0].tensor} is not quantized")
    return reading.packed


def _specs(reading: Reading) -> tuple[PartSpec, ...]:
    packed = _packed(reading)
    return format_named(packed.format).parts(packed.scheme, packed.shape)
