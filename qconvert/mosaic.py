"""Steps that lay a matrix together from rectangles of others, some rows at a time: how a shared expert is folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError
from qconvert.core.plan import Dequantize, Keep, Mosaic, Quantize, Reencode, Tile
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Block, Scheme
from qconvert.encode import WEIGHT, Aids, cast, move, round_rows
from qconvert.formats.table import format_named
from qconvert.io.piece import Piece
from qconvert.io.sink import Sink
from qconvert.matrix_reader import MatrixReader, SourceHash
from qconvert.numerics.finite import all_finite
from qconvert.plan.row_blocks import mosaic_width, row_blocks, rows_together
from qconvert.transform.rectangles import cut, lay, lay_quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """What a step wrote, and what it cost.

    Attributes:
        squared_error: of rounding what was laid; 0 where nothing was rounded, like ``signal``.
        scale_error: the largest relative error of a scale that was moved.
    """

    pieces: list[Piece]
    squared_error: float = 0.0
    signal: float = 0.0
    scale_error: float = 0.0


def check_left_behind(mosaic: Mosaic, read: MatrixReader, becomes: str) -> None:
    """Refuse to lose what is no zero where zeros are left behind.

    Raises:
        DataError: names the tensor, and what was to become of it.
    """
    for tile in mosaic.nothing:
        for begin, end in row_blocks(tile.rows[1] - tile.rows[0], tile.width, 1):
            first, last = tile.rows[0] + begin, tile.rows[0] + end
            a, b = _run(tile, first, last, read)
            rows = read.rows(tile.reading, a, b, None)[first - a : last - a, slice(*tile.cols)]
            if bool((rows != 0).any()):
                with read.naming(tile.reading, becomes):
                    raise DataError("holds other numbers where zeros fill the shared expert up: they would be lost")


def lay_plain(action: Keep | Dequantize, mosaic: Mosaic, read: MatrixReader, sink: Sink, into: SourceHash) -> Laid:
    """Lay plain rows together as they are, or dequantized ones, which become BF16.

    Raises:
        DataError: NaN or infinite values.
    """
    piece = sink.piece(action.name)
    squared_error = signal = 0.0
    for begin, end in row_blocks(mosaic.shape[0], mosaic_width(mosaic), 1):
        rows = laid_rows(mosaic, read, begin, end, into)
        with read.naming(mosaic.tiles[0].reading, action.name):
            if isinstance(action, Dequantize):
                stored = cast(rows, DType.BF16)
                rows = stored.parts[WEIGHT]
                squared_error += stored.squared_error
                signal += stored.signal
            elif not all_finite(rows):
                raise DataError("has NaN or infinite values")
        piece.append(rows)
    return Laid(pieces=[piece], squared_error=squared_error, signal=signal)


def laid_rows(mosaic: Mosaic, read: MatrixReader, begin: int, end: int, into: SourceHash) -> Tensor:
    """Rows ``begin`` to ``end``: plain ones as they are, dequantized ones in float32; valid until more is read."""
    shape = (end - begin, mosaic.shape[1])
    found = list(mosaic.within(begin, end))

    def parts() -> Iterator[tuple[Tensor, int, int]]:
        for tile, first, last in found:
            a, b = _run(tile, first, last, read)
            rows = read.rows(tile.reading, a, b, into)[first - a : last - a, slice(*tile.cols)]
            yield rows, *_place(tile, first, begin)

    source = mosaic.tiles[0].reading
    dtype = torch.float32 if source.packed is not None else read.info(source.inputs[0]).dtype.torch_dtype
    if len(found) == 1:  # most of a stack of experts: as it is read
        ((rows, row, col),) = parts()
        return rows if tuple(rows.shape) == shape else lay([(rows, row, col)], shape, dtype)
    return lay(parts(), shape, dtype)


def lay_rounded(
    action: Quantize,
    mosaic: Mosaic,
    read: MatrixReader,
    sink: Sink,
    into: SourceHash,
    device: torch.device,
    aids: Aids,
) -> Laid:
    """Round whole rows, then cut their codes: they are those of the matrix that is not cut.

    Raises:
        DataError: NaN or infinite values.
    """
    rounded = RoundedTiles(action=action, read=read, into=into, device=device, aids=aids)
    laid = _lay_codes(action, action.scheme, mosaic, sink, rounded.part)
    return replace(laid, squared_error=rounded.squared_error, signal=rounded.signal)


@dataclass(slots=True, kw_only=True)
class RoundedTiles:
    """Rounds tiles as parts of the whole rows that they are cut from.

    Attributes:
        squared_error: of what was rounded so far, like ``signal``.
    """

    action: Quantize
    read: MatrixReader
    into: SourceHash
    device: torch.device
    aids: Aids
    squared_error: float = 0.0
    signal: float = 0.0

    def part(self, tile: Tile, first: int, last: int) -> QuantizedTensor:
        """Rows ``first`` to ``last`` of the source of ``tile``, rounded and cut, on the CPU.

        Raises:
            DataError: NaN or infinite values.
        """
        blocking = self.action.scheme.blocking
        together = blocking.rows if isinstance(blocking, Block) else 1  # rows that influence each other
        a, b = _run(tile, first, last, self.read, together)
        rows = self.read.rows(tile.reading, a, b, self.into).to(self.device)
        with self.read.naming(tile.reading, self.action.module):
            whole = round_rows(rows, self.action, self.aids).quantized
        part = cut(whole, (first - a, last - a), tile.cols)
        wanted = rows[first - a : last - a, slice(*tile.cols)].to(torch.float32)
        self.squared_error += float((part.dequantize() - wanted).square().sum())
        self.signal += float(wanted.square().sum())
        return _on_cpu(part)


def lay_moved(action: Reencode, mosaic: Mosaic, read: MatrixReader, sink: Sink, into: SourceHash) -> Laid:
    """Lay the codes of quantized matrices together.

    Raises:
        DataError: codes that are NaN, parts that contradict each other, or scales that cannot be held exactly.
    """
    packed = mosaic.tiles[0].reading.packed
    scheme = action.scheme if packed is None else packed.scheme
    alike = packed is not None and (packed.format, packed.scheme) == (action.format, action.scheme)
    of_all = _parts_of_all(action, mosaic) if alike else frozenset()
    kept: dict[str, Tensor] = {}

    def stored(tile: Tile, first: int, last: int) -> QuantizedTensor:
        part, parts = stored_part(tile, first, last, read, into)
        kept.update({suffix: parts[suffix].clone() for suffix in of_all})
        return part

    with read.naming(mosaic.tiles[0].reading, action.module):
        return _lay_codes(action, scheme, mosaic, sink, stored, kept)


def stored_part(
    tile: Tile, first: int, last: int, read: MatrixReader, into: SourceHash
) -> tuple[QuantizedTensor, dict[str, Tensor]]:
    """Rows ``first`` to ``last`` of the quantized source of ``tile``, cut, and what is stored of them, not cut."""
    a, b = _run(tile, first, last, read)
    parts = read.parts(tile.reading, a, b, into)
    return cut(read.unpacked(tile.reading, a, b, parts), (first - a, last - a), tile.cols), parts


def _parts_of_all(action: Reencode, mosaic: Mosaic) -> frozenset[str]:
    """Stored parts that speak of every element alike, such as a second scale: any piece of the matrix has the same."""
    specs = format_named(action.format).parts(action.scheme, mosaic.shape)
    return frozenset(spec.suffix for spec in specs if not spec.rows_per_row and spec.shape == (1,))


def _lay_codes(
    action: Quantize | Reencode,
    scheme: Scheme,
    mosaic: Mosaic,
    sink: Sink,
    part_of: Callable[[Tile, int, int], QuantizedTensor],
    kept: Mapping[str, Tensor] | None = None,
) -> Laid:
    """Write a mosaic of codes in ``scheme``: ``part_of`` gives some rows of a tile, ``kept`` what stays as stored."""
    form = format_named(action.format)
    specs = form.parts(action.scheme, mosaic.shape)
    pieces = {spec.suffix: sink.piece(f"{action.module}.{spec.suffix}") for spec in specs}
    second_scale: Tensor | None = None
    scale_error = 0.0
    for begin, end in row_blocks(mosaic.shape[0], mosaic_width(mosaic), form.row_block(action.scheme, mosaic.shape)):
        laid = laid_codes(mosaic, scheme, part_of, begin, end, second_scale)
        second_scale = laid.second_scale
        if isinstance(action, Reencode):
            moved = move(laid, action, mosaic.shape, kept=kept)
            stored, scale_error = moved.parts, max(scale_error, moved.scale_error)
        else:
            stored = form.pack(laid, shape=mosaic.shape)
        for spec in specs:
            if spec.rows_per_row or begin == 0:
                pieces[spec.suffix].append(stored[spec.suffix])
    return Laid(pieces=list(pieces.values()), scale_error=scale_error)


def laid_codes(
    mosaic: Mosaic,
    scheme: Scheme,
    part_of: Callable[[Tile, int, int], QuantizedTensor],
    begin: int,
    end: int,
    second_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Rows ``begin`` to ``end`` of a mosaic of codes in ``scheme``: ``part_of`` gives some rows of a tile.

    Raises:
        FormatError, DataError: see ``lay_quantized``.
    """
    parts = (
        (part_of(tile, first, last), *_place(tile, first, begin)) for tile, first, last in mosaic.within(begin, end)
    )
    return lay_quantized(parts, (end - begin, mosaic.shape[1]), scheme, second_scale)


def _place(tile: Tile, first: int, begin: int) -> tuple[int, int]:
    """Where row ``first`` of a tile's source stands in a run that begins with row ``begin``."""
    return tile.at[0] + first - tile.rows[0] - begin, tile.at[1]


def _run(tile: Tile, first: int, last: int, read: MatrixReader, multiple: int = 1) -> tuple[int, int]:
    """The rows to read so that ``first`` to ``last`` are among them, and they begin and end where the source allows."""
    rows, _ = read.shape(tile.reading)
    step = lcm(multiple, rows_together(tile.reading.packed, 1))
    return first - first % step, min(last + -last % step, rows)


def _on_cpu(matrix: QuantizedTensor) -> QuantizedTensor:
    zero_point, second_scale = matrix.zero_point, matrix.second_scale
    return replace(
        matrix,
        codes=matrix.codes.cpu(),
        scale=matrix.scale.cpu(),
        zero_point=None if zero_point is None else zero_point.cpu(),
        second_scale=None if second_scale is None else second_scale.cpu(),
    )
