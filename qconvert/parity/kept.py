"""Tensors that are not quantized and yet have other values: what rounding to another float type cannot explain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from qconvert.core.role import TensorRole
from qconvert.numerics.error import ErrorSums
from qconvert.parity.blocks import BlockSums
from qconvert.parity.causes import Cause, CauseKind, Severity, cause
from qconvert.parity.faults import NO_SIGNAL, counted, factor_cause

KEPT_DB = 40.0
"""SQNR below which a kept tensor, or a row of it, holds other numbers.

BF16 errs by half a step of at most 1/256 of a value: every row keeps 48 dB, and 53 dB where errors spread evenly; FP16
keeps more. 40 dB is a change of one percent.
"""

FACTOR_STEP = 0.05
"""Smallest |r - 1| that is told as a factor, from cosines of ``SAME_NUMBERS``."""

SAME_NUMBERS = 0.999
"""Cosine of a row with its copy times a factor, rounded to any 16-bit type, with room to spare."""


def row_sums(runs: Iterable[tuple[int, BlockSums]], rows: int) -> BlockSums:
    """The sums of all rows from those of the runs that differ, each with its first row; no error elsewhere."""
    sums = torch.zeros(4, rows, 1, dtype=torch.float64)
    worst, elements = 0.0, 0
    for begin, run in runs:
        parts = (run.signal, run.approximated, run.product, run.squared_error)
        first = min(begin, rows - 1)  # a vector is one row, whatever its runs
        sums[:, first : first + len(run.signal)] += torch.stack(parts)
        worst, elements = max(worst, run.max_error), elements + run.elements
    signal, approximated, product, squared_error = sums
    return BlockSums(
        signal=signal,
        approximated=approximated,
        product=product,
        squared_error=squared_error,
        max_error=worst,
        elements=elements,
    )


def changed_faults(
    role: TensorRole, name: str, sums: ErrorSums, rows: BlockSums, shape: tuple[int, ...]
) -> Iterator[Cause]:
    """What became of a kept tensor whose values are neither the original's nor a cast of them.

    An error where rows are the original's times a factor or further from it than any 16-bit type is; else a warning.
    """
    factors = (rows.cosine >= SAME_NUMBERS) & ((rows.ratio - 1).abs() >= FACTOR_STEP) & (rows.signal > NO_SIGNAL)
    scaled = bool(factors.any())
    if scaled:
        yield factor_cause(role, name, rows, factors, None, shape)
    bound = rows.signal * 10 ** (-KEPT_DB / 10)
    other = ~factors & (rows.squared_error > bound) & (rows.squared_error > NO_SIGNAL)
    whole = f"SQNR {sums.sqnr_db:.1f} dB, cosine {sums.cosine:.4f}"
    if bool(other.any()):
        where = counted(other, None, shape)
        at = "" if where == "the whole tensor" else f"{where.replace('blocks', 'rows')}: "
        text = f"{at}is not quantized, but holds other numbers: {whole} of the tensor"
        yield cause(CauseKind.CHANGED, role, text, (name,), severity=Severity.ERROR)
    elif not scaled:
        yield cause(CauseKind.CHANGED, role, f"is not quantized, but its values changed: {whole}", (name,))
