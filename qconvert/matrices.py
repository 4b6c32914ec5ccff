"""The matrices of a step, some rows at a time: in the source, or laid together; one, or two whose rows take turns."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import DataError, PlanError
from qconvert.core.plan import Matrix, Mosaic, Quantize, Reading, Tile
from qconvert.core.quantized import QuantizedTensor
from qconvert.encode import Aids, Encoded, encode
from qconvert.formats.table import format_named
from qconvert.matrix_reader import MatrixReader, SourceHash
from qconvert.mosaic import RoundedTiles, laid_codes, laid_rows, stored_part
from qconvert.numerics.finite import all_finite
from qconvert.plan.row_blocks import rows_together
from qconvert.transform.turns import quantized_in_turns, take_turns


def size_of(matrix: Matrix, read: MatrixReader) -> tuple[int, int]:
    """(N, K)."""
    return matrix.shape if isinstance(matrix, Mosaic) else read.shape(matrix)


def rows_at_once(matrix: Matrix, multiple: int) -> int:
    """The multiple at which runs of rows begin that are written at ``multiple``."""
    return multiple if isinstance(matrix, Mosaic) else rows_together(matrix.packed, multiple)


def first_reading(matrices: tuple[Matrix, ...]) -> Reading:
    """What messages name."""
    first = matrices[0]
    return first.tiles[0].reading if isinstance(first, Mosaic) else first


def shape_of(matrices: tuple[Matrix, ...], read: MatrixReader) -> tuple[int, int]:
    """Of the matrix that they are written as."""
    rows, cols = size_of(matrices[0], read)
    return rows * len(matrices), cols


def rows_of(matrices: tuple[Matrix, ...], begin: int, end: int, read: MatrixReader, source_hash: SourceHash) -> Tensor:
    """Rows of one matrix, or of two in turns: plain ones as they are, quantized ones in float32.

    Raises:
        DataError: one of two has NaN or infinite values.
    """
    found = []
    buffer = 0
    for one in matrices:
        if isinstance(one, Mosaic):
            rows = laid_rows(one, read, begin, end, source_hash).clone()
        else:
            rows = read.rows(one, begin, end, source_hash, buffer=buffer)
            buffer += len(one.inputs)
        if len(matrices) > 1 and not all_finite(rows):
            part = first_reading((one,)).inputs[0]
            raise DataError(f"{read.info(part).shard}: {part.tensor} has NaN or infinite values")
        found.append(rows)
    return found[0] if len(found) == 1 else take_turns(*found)


def codes_of(
    matrices: tuple[Matrix, ...], begin: int, end: int, read: MatrixReader, source_hash: SourceHash
) -> tuple[QuantizedTensor, dict[str, Tensor]]:
    """The same of quantized matrices; and what is stored of a single one that is in the source.

    Raises:
        DataError: parts that contradict each other, or two that no kernel reads together.
        FormatError: codes that cannot be cut.
    """
    found = []
    stored: dict[str, Tensor] = {}
    buffer = 0
    for one in matrices:
        if isinstance(one, Mosaic):
            found.append(_laid_codes(one, begin, end, read, source_hash))
            continue
        stored = read.parts(one, begin, end, source_hash, buffer=buffer)
        found.append(read.unpacked(one, begin, end, stored))
        buffer += len(one.inputs)
    if len(found) == 1:
        return found[0], stored
    with read.naming(first_reading(matrices), first_reading(matrices[1:]).inputs[0].tensor):
        return quantized_in_turns(*found), {}


def _laid_codes(mosaic: Mosaic, begin: int, end: int, read: MatrixReader, source_hash: SourceHash) -> QuantizedTensor:
    reading = mosaic.tiles[0].reading
    if reading.packed is None:
        raise PlanError(f"{reading.inputs[0].tensor} is not quantized")

    def part(tile: Tile, first: int, last: int) -> QuantizedTensor:
        return stored_part(tile, first, last, read, source_hash)[0]

    return laid_codes(mosaic, reading.packed.scheme, part, begin, end)


def rounded_of(
    matrices: tuple[Matrix, ...],
    action: Quantize,
    begin: int,
    end: int,
    shape: tuple[int, int],
    read: MatrixReader,
    source_hash: SourceHash,
    device: torch.device,
    aids: Aids,
) -> Encoded:
    """The same of matrices that ``action`` rounds, as stored; ``shape`` is that of the whole.

    What is laid together is rounded before it is cut, so that its codes are those of the matrix that is not.

    Raises:
        DataError: NaN or infinite values.
    """
    if not any(isinstance(one, Mosaic) for one in matrices):
        rows = rows_of(matrices, begin, end, read, source_hash).to(device)
        with read.naming(first_reading(matrices), action.module):
            return encode(rows, action, shape, aids)
    rounded = RoundedTiles(action=action, read=read, into=source_hash, device=device, aids=aids)
    laid = [laid_codes(one, action.scheme, rounded.part, begin, end) for one in matrices if isinstance(one, Mosaic)]
    whole = laid[0] if len(laid) == 1 else quantized_in_turns(*laid)
    return Encoded(
        parts=format_named(action.format).pack(whole, shape=shape),
        squared_error=rounded.squared_error,
        signal=rounded.signal,
    )
