"""How a matrix is cut into runs of rows, and the memory that working on one run takes."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 22
"""Elements worked on at once: enough for the kernels to be busy, little enough for any memory limit."""

ROUND_BYTES = 12
"""Memory of rounding beside the source bytes, per element: a float32 copy, codes twice, packed codes, scales."""

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


def _rows_at_once(cols: int, multiple: int) -> int:
    return max(multiple, BLOCK_ELEMENTS // max(cols, 1) // multiple * multiple)
