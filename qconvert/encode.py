"""Bytes of some rows of one matrix -> rounding -> the parts that a format stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.core.plan import Quantize
from qconvert.formats.table import format_named
from qconvert.numerics.finite import all_finite
from qconvert.numerics.rounding import quantize, second_scale_for

WEIGHT = "weight"
"""The one part of a matrix that is not quantized."""


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


def encode(rows: Tensor, action: Quantize, shape: tuple[int, int], second: float = 1.0) -> Encoded:
    """Round some rows of a [N, K] matrix as ``action`` says.

    Args:
        rows: [R, K]; they begin at a multiple of the format's row block.
        action: scheme, search and format.
        shape: (N, K) of the whole matrix.
        second: what ``second_scale`` gives.

    Raises:
        DataError: a value is NaN or infinite.
    """
    rounded = quantize(rows, action.scheme, search=action.search, second=second)
    parts = format_named(action.format).pack(rounded.quantized, shape=shape)
    return Encoded(parts=parts, squared_error=rounded.squared_error, signal=rounded.signal)


def to_bf16(rows: Tensor) -> Encoded:
    """Cast some float32 rows to the part ``WEIGHT`` in BF16.

    Raises:
        DataError: a value is NaN or infinite, or becomes so.
    """
    cast = rows.to(torch.bfloat16)
    if not all_finite(cast):
        raise DataError("has NaN or infinite values in BF16")
    lost = cast.to(torch.float32).sub_(rows).view(-1)
    flat = rows.reshape(-1)
    return Encoded(parts={WEIGHT: cast}, squared_error=float(lost.dot(lost)), signal=float(flat.dot(flat)))


def second_scale(action: Quantize, largest: float) -> float:
    """The second scale that ``action`` asks for; 1 in a scheme without one.

    Args:
        action: names the scheme.
        largest: largest absolute value of the matrices of ``action.scale_over``.
    """
    return second_scale_for(action.scheme, largest)
