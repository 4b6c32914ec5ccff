"""Rounding that spares the inputs that are large: scales searched under what each input counts for. K inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.core.scheme import Scheme
from qconvert.numerics.rounding import Rounded, quantize

LEAST_IMPORTANCE = 1e-4
"""Of the mean: what an input counts at least. Inputs that were never seen still choose among scales."""


def importance_of(mean_squares: Tensor) -> Tensor:
    """What squared errors count per input: ``mean x**2`` over its mean, at least ``LEAST_IMPORTANCE``, float32 [K].

    ``sum over k of mean(x[k]**2) * error[k]**2`` is the mean squared error of a row's output, if inputs do not go
    together: the diagonal of its Hessian alone. All zeros become ones.

    Args:
        mean_squares: [K], not negative, any float type: ``Moments.mean_squares``.

    Raises:
        DataError: NaN, infinity or a negative number.
    """
    if not bool((torch.isfinite(mean_squares) & (mean_squares >= 0)).all()):
        raise DataError("mean squares of inputs hold NaN, infinite or negative values")
    wide = mean_squares.to(torch.float64)
    mean = wide.mean()
    if not bool(mean > 0):
        return torch.ones_like(mean_squares, dtype=torch.float32)
    return (wide / mean).clamp_(min=LEAST_IMPORTANCE).to(torch.float32)


def quantize_by_importance(w: Tensor, scheme: Scheme, mean_squares: Tensor, *, second: float = 1.0) -> Rounded:
    """Round to nearest with the searched scales whose errors, weighted by ``importance_of``, are least in each block.

    The diagonal of the inputs' second moments are the weights, as in llama.cpp's importance matrix (ggml-org/llama.cpp,
    tools/imatrix) and in LeCun et al. 1989 (optimal brain damage). Codes are those of ``quantize`` for these scales;
    the errors that are returned are not weighted.

    Args:
        w: [N, K], as ``quantize`` takes it.
        scheme: one whose scales ``quantize`` searches.
        mean_squares: [K], see ``importance_of``.
        second: as ``quantize`` takes it.

    Raises:
        DataError: ``w`` or ``mean_squares`` holds NaN or infinity.
        FormatError: a scheme that ``quantize`` does not round to.
        ValueError: sizes that do not belong together.
    """
    if mean_squares.shape != (w.shape[1],):
        raise ValueError(f"{tuple(mean_squares.shape)} mean squares for {w.shape[1]} inputs")
    return quantize(w, scheme, search=True, importance=importance_of(mean_squares), second=second)
