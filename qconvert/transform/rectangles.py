"""Rectangles of matrices, plain or quantized: cut out, and laid together over zeros.

A quantized matrix is cut only where its blocks are, so that every code keeps its scale: nothing is rounded, and what is
cut means the same numbers. N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.errors import DataError, FormatError
from qconvert.core.quantized import CODEBOOKS, QuantizedTensor
from qconvert.core.scheme import Block, Channel, Codebook, Flat, Group, PerTensor, Scheme

Span = tuple[int, int]
"""First, and one past the last."""


def cut(matrix: QuantizedTensor, rows: Span, cols: Span) -> QuantizedTensor:
    """Some rows and columns of a quantized matrix: the same codes with the same scales.

    Raises:
        FormatError: the cut goes through a block, blocks run over rows, or inputs are in activation order.
    """
    if (rows, cols) == ((0, matrix.shape[0]), (0, matrix.shape[1])):
        return matrix
    if matrix.column_group is not None:
        raise FormatError("inputs in activation order cannot be cut: their groups are not consecutive")
    down, across = blocks_of(matrix.scheme, matrix.shape, rows, cols)
    zero_point = matrix.zero_point
    return replace(
        matrix,
        codes=matrix.codes[slice(*rows), slice(*cols)],
        scale=matrix.scale[down, across],
        zero_point=None if zero_point is None else zero_point[down, across],
        shape=(rows[1] - rows[0], cols[1] - cols[0]),
    )


def blocks_of(scheme: Scheme, shape: tuple[int, int], rows: Span, cols: Span) -> tuple[slice, slice]:
    """Which scales of a [N, K] matrix are those of a rectangle of it.

    Raises:
        FormatError: the rectangle cuts through a block, or blocks run over rows.
    """
    height, width = _block(scheme)
    return _blocks(scheme, height, shape[0], rows, "rows"), _blocks(scheme, width, shape[1], cols, "columns")


def _block(scheme: Scheme) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale; ``None`` for all of them."""
    match scheme.blocking:
        case PerTensor():
            return None, None
        case Channel():
            return 1, None
        case Group(size=size):
            return 1, size
        case Block(rows=rows, cols=cols):
            return rows, cols
        case Flat(size=size):
            raise FormatError(f"blocks of {size} elements run over the ends of rows: {scheme} cannot be cut")


def _blocks(scheme: Scheme, size: int | None, length: int, span: Span, what: str) -> slice:
    begin, end = span
    if size is None:
        return slice(0, 1)
    if begin % size or (end % size and end != length):
        raise FormatError(
            f"{what} {begin} .. {end} of {length} cut through blocks of {size}, so {scheme} has no scales"
        )
    return slice(begin // size, -(-end // size))


def lay(parts: Iterable[tuple[Tensor, int, int]], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Matrices at a row and a column each, over zeros: [N, K] in ``dtype``."""
    whole = torch.zeros(shape, dtype=dtype)
    for part, row, col in parts:
        whole[row : row + part.shape[0], col : col + part.shape[1]] = part
    return whole


def lay_quantized(
    parts: Iterable[tuple[QuantizedTensor, int, int]],
    shape: tuple[int, int],
    scheme: Scheme,
    second_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantized matrices of one scheme at a row and a column each, over codes that mean zero with scales of 1.

    Where a part shares its block with such codes, they have its scale and mean zero all the same.

    Args:
        parts: they do not overlap.
        shape: (N, K).
        scheme: that of all of them.
        second_scale: that of parts in other runs of the same matrix, and of the result where there is no part.

    Raises:
        FormatError: a part begins or ends inside a block that is not its own.
        DataError: parts that share a scale have different ones.
    """
    blocks = scheme.scale_shape(*shape)
    scale = torch.ones(blocks).to(scheme.scale.dtype.torch_dtype)
    # the middle of the codes: some formats have no room for a zero point of 0
    middle = 1 << (scheme.weight_bits - 1)
    zero_point = None if scheme.symmetric else torch.full(blocks, middle, dtype=torch.uint8)
    taken = torch.zeros(blocks, dtype=torch.bool)
    placed: list[tuple[Tensor, Span, Span]] = []
    for part, row, col in parts:
        rows, cols = (row, row + part.shape[0]), (col, col + part.shape[1])
        where = _filled(scheme, shape, rows, cols)
        _agree(scale, part.scale, taken, where, "scales")
        scale[where] = part.scale
        if zero_point is not None and part.zero_point is not None:
            _agree(zero_point, part.zero_point, taken, where, "zero points")
            zero_point[where] = part.zero_point
        taken[where] = True
        if part.second_scale is not None:
            if second_scale is not None and float(part.second_scale) != float(second_scale):
                raise DataError("parts have different second scales")
            second_scale = part.second_scale.clone()
        placed.append((part.codes.clone(), rows, cols))
    codes = _zero_codes(scheme, shape, zero_point)
    for those, rows, cols in placed:
        codes[slice(*rows), slice(*cols)] = those.view(torch.uint8)
    return QuantizedTensor(
        codes=codes.view(scheme.code_dtype.torch_dtype),
        scale=scale,
        zero_point=zero_point,
        second_scale=second_scale,
        scheme=scheme,
        shape=shape,
    )


def _filled(scheme: Scheme, shape: tuple[int, int], rows: Span, cols: Span) -> tuple[slice, slice]:
    """Which scales of a [N, K] matrix a part brings; zeros may follow it in its last blocks."""
    height, width = _block(scheme)
    ends = [
        span if size is None else (span[0], min(span[0] + -(-(span[1] - span[0]) // size) * size, length))
        for size, length, span in ((height, shape[0], rows), (width, shape[1], cols))
    ]
    return blocks_of(scheme, shape, ends[0], ends[1])


def _agree(mine: Tensor, theirs: Tensor, taken: Tensor, where: tuple[slice, slice], what: str) -> None:
    shared = taken[where]
    if bool((shared & (mine[where].to(torch.float32) != theirs.to(torch.float32))).any()):
        raise DataError(f"parts that share {what} have different ones")


def _zero_codes(scheme: Scheme, shape: tuple[int, int], zero_point: Tensor | None) -> Tensor:
    """Codes that mean zero, as bytes [N, K]."""
    if zero_point is None:
        zero = CODEBOOKS[scheme.grid.kind].index(0.0) if isinstance(scheme.grid, Codebook) else 0
        return torch.full(shape, zero, dtype=torch.uint8)
    nothing = torch.zeros(shape, dtype=torch.uint8)
    blank = QuantizedTensor(codes=nothing, scale=zero_point, zero_point=zero_point, scheme=scheme, shape=shape)
    return blank.spread(zero_point).expand(shape).clone()
