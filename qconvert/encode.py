"""Bytes of some rows of one matrix -> rounding -> the parts that a format stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError
from qconvert.core.plan import Formula, Quantize, Reencode
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Channel
from qconvert.formats.table import format_named
from qconvert.numerics.finite import all_finite
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import Rounded, quantize, second_scale_for

_LARGEST_F16 = 65280.0
"""That is exact in BF16 too: where scales end, and beyond it weights would be cut off."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Aids:
    """What rounding some rows of a matrix takes from elsewhere.

    Attributes:
        second: what ``second_scale`` gives.
        importance: what each input counts, mean squares as ``InputStatistics`` give them, [K]; ``None`` where all
            count the same.
    """

    second: float = 1.0
    importance: Tensor | None = None


NO_AIDS = Aids()


def encode(rows: Tensor, action: Quantize, shape: tuple[int, int], aids: Aids = NO_AIDS) -> Encoded:
    """Round some rows of a [N, K] matrix as ``action`` says.

    Args:
        rows: [R, K]; they begin at a multiple of the format's row block.
        action: scheme, search and format.
        shape: (N, K) of the whole matrix.
        aids: of the whole matrix.

    Raises:
        DataError: a value is NaN or infinite.
    """
    rounded = round_rows(rows, action, aids)
    parts = format_named(action.format).pack(rounded.quantized, shape=shape)
    return Encoded(parts=parts, squared_error=rounded.squared_error, signal=rounded.signal)


def round_rows(rows: Tensor, action: Quantize, aids: Aids = NO_AIDS) -> Rounded:
    """``encode`` before anything is packed.

    Raises:
        DataError: a value is NaN or infinite, or too large for the scales of the scheme.
    """
    if aids.importance is None:
        rounded = quantize(rows, action.scheme, search=action.search, second=aids.second)
    else:
        mean_squares = aids.importance.to(rows.device)
        rounded = quantize_by_importance(rows, action.scheme, mean_squares, second=aids.second)
    check_scale_range(rounded.quantized)
    return rounded


def check_scale_range(quantized: QuantizedTensor) -> None:
    """Refuse scales at the end of F16.

    Raises:
        DataError: weights are too large for them.
    """
    if quantized.scheme.scale.dtype is DType.F16 and bool((quantized.scale >= _LARGEST_F16).any()):
        raise DataError("has weights too large for F16 scales: store it as compressed-tensors")


def cast(rows: Tensor, dtype: DType, formula: Formula = Formula.SAME) -> Encoded:
    """Store some rows as the part ``WEIGHT`` in ``dtype``; ``formula`` is computed from them in float32 before.

    Raises:
        DataError: a value is NaN or infinite, or becomes so.
    """
    exact = rows.to(torch.float32)
    match formula:
        case Formula.ONE_PLUS:
            exact = exact + 1.0
        case Formula.MINUS_EXP:
            exact = exact.exp().neg_()
        case Formula.SAME:
            pass
    same = formula is Formula.SAME and rows.dtype is dtype.torch_dtype
    stored = rows if same else exact.to(dtype.torch_dtype)
    if not all_finite(stored):
        raise DataError(f"has NaN or infinite values in {dtype}")
    flat, squared_error = exact.reshape(-1), 0.0
    if not same and stored is not exact:
        lost = stored.to(torch.float32).sub_(exact).view(-1)
        squared_error = float(lost.dot(lost))
    return Encoded(parts={WEIGHT: stored}, squared_error=squared_error, signal=float(flat.dot(flat)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What the codes of a run of rows became.

    Attributes:
        parts: stored tensors by suffix.
        scale_error: the largest ``|new / old - 1|`` of a scale; 0 where all are what they were.
    """

    parts: Mapping[str, Tensor]
    scale_error: float


def move(
    quantized: QuantizedTensor,
    action: Reencode,
    shape: tuple[int, int],
    stored: Mapping[str, Tensor] | None = None,
    *,
    kept: Mapping[str, Tensor] | None = None,
) -> Moved:
    """Store some rows of a quantized [N, K] matrix otherwise: the same codes, zero points and scales.

    Args:
        quantized: what the rows mean.
        action: the scheme and format that they get.
        shape: (N, K) of the whole matrix.
        stored: their parts, where the source has them in this very scheme and format.
        kept: those of them that are the same whatever part of the matrix is stored, and stay as they are.

    Raises:
        DataError: codes that are NaN, inputs in activation order, which nothing that is written keeps, or scales that
            the types in which they are stored and held do not hold.
        FormatError: the format has no room for a zero point.
    """
    if not all_finite(quantized.codes):
        raise DataError("has codes that are NaN")
    if quantized.column_group is not None:
        raise DataError("has inputs in activation order")
    if stored is not None:
        return Moved(parts=stored, scale_error=0.0)
    scale, error = stored_scales(quantized.scale, action)
    zero_point, wanted = quantized.zero_point, action.scheme.scale_shape(*quantized.shape)
    if isinstance(quantized.scheme.blocking, Channel) and scale.shape != wanted:
        scale = scale.expand(wanted).contiguous()
        zero_point = None if zero_point is None else zero_point.expand(wanted).contiguous()
    moved = replace(quantized, scale=scale, zero_point=zero_point, scheme=action.scheme)
    form = format_named(action.format)
    parts = {**form.pack(moved, shape=shape), **(kept or {})}
    if quantized.second_scale is not None:
        again = form.unpack(parts, action.scheme, quantized.shape, whole=shape).second_scale
        error = max(error, _second_error(quantized.second_scale, again, action))
    return Moved(parts=parts, scale_error=error)


def _second_error(before: Tensor, after: Tensor | None, action: Reencode) -> float:
    """The relative error of a second scale, which one format multiplies by and another divides by."""
    error = 1.0 if after is None else abs(float(after) / float(before) - 1.0)
    if error and not action.allow_scale_rounding:
        raise DataError(
            f"has a second scale that {action.format} does not hold exactly; its relative error would be {error:.2g}: "
            "--allow-scale-rounding accepts that"
        )
    return error


def stored_scales(scale: Tensor, action: Reencode) -> tuple[Tensor, float]:
    """Scales in the type in which ``action`` stores them, in any shape, and the largest relative error of one.

    Raises:
        DataError: that type, or the one in which engines hold them, does not hold them all.
    """
    spec = action.scheme.scale
    held = scale if spec.exact_in is None else scale.to(spec.exact_in.torch_dtype)
    stored = held.to(spec.dtype.torch_dtype)
    before, after = scale.to(torch.float32), stored.to(torch.float32)
    inexact = int((before != after).sum())
    if not inexact:
        return stored, 0.0
    error = float((after / before - 1.0).abs().max())
    types = " and ".join(str(dtype) for dtype in (spec.dtype, spec.exact_in) if dtype is not None)
    if not bool(((after != 0) & after.isfinite()).all()):
        raise DataError(f"has scales that become zero or infinite in {types}")
    if not action.allow_scale_rounding:
        raise DataError(
            f"{inexact} of {before.numel()} scales are not exact in {types}, in which they are stored and held by "
            f"engines; the largest relative error would be {error:.2g}: --allow-scale-rounding accepts that"
        )
    return stored, error


def second_scale(action: Quantize, largest: float) -> float:
    """The second scale that ``action`` asks for; 1 in a scheme without one.

    Args:
        action: names the scheme.
        largest: largest absolute value of the matrices of ``action.scale_over``.
    """
    return second_scale_for(action.scheme, largest)
