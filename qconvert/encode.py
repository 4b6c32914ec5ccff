"""Bytes of some rows of one matrix -> rounding -> the parts that a format stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qconvert.core.plan import Quantize
from qconvert.formats.table import format_named
from qconvert.numerics.rounding import quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a run of rows became.

    Attributes:
        parts: stored tensors by suffix.
        squared_error: sum of squared differences between the rows and what the stored parts mean.
        signal: sum of squares of the rows.
    """

    parts: Mapping[str, Tensor]
    squared_error: float
    signal: float


def encode(rows: Tensor, action: Quantize, shape: tuple[int, int]) -> Encoded:
    """Round some rows of a [N, K] matrix as ``action`` says.

    Args:
        rows: [R, K]; they begin at a multiple of the format's row block.
        action: scheme, search and format.
        shape: (N, K) of the whole matrix.

    Raises:
        DataError: a value is NaN or infinite.
    """
    rounded = quantize(rows, action.scheme, search=action.search)
    parts = format_named(action.format).pack(rounded.quantized, shape=shape)
    return Encoded(parts=parts, squared_error=rounded.squared_error, signal=rounded.signal)
