"""How a matrix is cut into runs of rows, and the memory that working on one run takes."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from qconvert.core.plan import Mosaic, Packed, dtype_bytes
from qconvert.formats.base import PartSpec
from qconvert.formats.table import format_named

BLOCK_ELEMENTS = 1 << 22
"""Elements worked on at once: enough for the kernels to be busy, little enough for any memory limit."""

ROUND_BYTES = 12
"""Memory of rounding beside the source bytes, per element: a float32 copy, codes twice, packed codes, scales."""

UNPACK_BYTES = 16
"""Memory of dequantizing, per element: codes, their values, scales and zero points spread. Rounding takes no more."""

SCRATCH_BYTES = 32 << 20
"""Float32 temporaries of one chunk, and what the allocator keeps."""


def row_blocks(rows: int, cols: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into runs of about ``BLOCK_ELEMENTS`` elements that begin at multiples of ``multiple``."""
    size = _rows_at_once(cols, multiple)
    for begin in range(0, rows, size):
        yield begin, min(begin + size, rows)


def peak_bytes(rows: int, cols: int, multiple: int, itemsize: int, *, rounding: bool) -> int:
    """Bytes that a step on a [rows, cols] matrix holds at most; an upper bound, see ``docs/design.md``."""
    elements = min(rows, _rows_at_once(cols, multiple)) * cols
    return elements * (itemsize + (ROUND_BYTES if rounding else 0)) + SCRATCH_BYTES


def packed_peak_bytes(packed: Packed, multiple: int) -> int:
    """The same for a matrix that is quantized in the source, whatever becomes of it."""
    rows, cols = packed.shape
    at_once = min(rows, _rows_at_once(cols, rows_together(packed, multiple)))
    stored = sum(
        dtype_bytes(spec.dtype, _shape_of_run(spec, at_once))
        for spec in format_named(packed.format).parts(packed.scheme, packed.shape)
    )
    return stored + at_once * cols * UNPACK_BYTES + SCRATCH_BYTES


def mosaic_peak_bytes(mosaic: Mosaic, multiple: int) -> int:
    """The same for a matrix that is laid together, and written in runs that begin at multiples of ``multiple``.

    A run is there twice, as it is read and as it is laid, and what is read may begin before it.
    """
    cols = mosaic_width(mosaic)
    at_once = min(mosaic.shape[0], _rows_at_once(cols, multiple))
    before = max(rows_together(tile.reading.packed, 1) for tile in mosaic.tiles)
    return (2 * at_once + before) * cols * UNPACK_BYTES + SCRATCH_BYTES


def mosaic_width(mosaic: Mosaic) -> int:
    """Columns of the widest matrix that is read or written: whole rows are read."""
    return max(mosaic.shape[1], *(tile.width for tile in mosaic.tiles))


def _shape_of_run(spec: PartSpec, rows: int) -> tuple[int, ...]:
    """What the first ``rows`` of a matrix take of a part."""
    if not spec.rows_per_row:
        return spec.shape
    begin, end = spec.rows_of(0, rows)
    return (end - begin, *spec.shape[1:])


def rows_together(packed: Packed | None, multiple: int) -> int:
    """The multiple at which runs of rows begin that are read as the source has them and written at ``multiple``."""
    if packed is None:
        return multiple
    return lcm(multiple, format_named(packed.format).row_block(packed.scheme, packed.shape))


def _rows_at_once(cols: int, multiple: int) -> int:
    return max(multiple, BLOCK_ELEMENTS // max(cols, 1) // multiple * multiple)
