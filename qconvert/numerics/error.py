"""How far one matrix is from another, summed block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSums:
    """Sums over the elements of an original and of its approximation, in float64; add them over row blocks.

    Attributes:
        signal: sum of ``original**2``.
        approximated: sum of ``approximation**2``.
        product: sum of ``original * approximation``.
        squared_error: sum of ``(original - approximation)**2``.
        max_error: largest ``|original - approximation|``; NaN as soon as one element is NaN.
    """

    elements: int = 0
    signal: float = 0.0
    approximated: float = 0.0
    product: float = 0.0
    squared_error: float = 0.0
    max_error: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        if math.isnan(self.max_error) or math.isnan(other.max_error):
            max_error = math.nan
        else:
            max_error = max(self.max_error, other.max_error)
        return ErrorSums(
            elements=self.elements + other.elements,
            signal=self.signal + other.signal,
            approximated=self.approximated + other.approximated,
            product=self.product + other.product,
            squared_error=self.squared_error + other.squared_error,
            max_error=max_error,
        )

    @property
    def sqnr_db(self) -> float:
        """``10 log10(signal / squared_error)``, see ``sqnr_db``."""
        return sqnr_db(self.signal, self.squared_error)

    @property
    def cosine(self) -> float:
        """``product / sqrt(signal * approximated)``; 1 for two zero matrices, 0 when only one of them is zero."""
        if self.signal == 0.0 or self.approximated == 0.0:
            return 1.0 if self.signal == self.approximated else 0.0
        return self.product / (math.sqrt(self.signal) * math.sqrt(self.approximated))


def error_sums(original: Tensor, approximation: Tensor) -> ErrorSums:
    """Compare two tensors of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if original.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(original.shape)} and {tuple(approximation.shape)}")
    a = original.reshape(-1).to(torch.float64)
    b = approximation.reshape(-1).to(torch.float64)
    difference = a - b
    return ErrorSums(
        elements=a.numel(),
        signal=float(a.dot(a)),
        approximated=float(b.dot(b)),
        product=float(a.dot(b)),
        squared_error=float(difference.dot(difference)),
        max_error=float(difference.abs().max()) if a.numel() else 0.0,
    )


def sqnr_db(signal: float, squared_error: float) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(signal / squared_error)`` in dB.

    Infinite without an error, minus infinity for an error without a signal, NaN when either is NaN.
    """
    if math.isnan(signal) or math.isnan(squared_error):
        return math.nan
    if squared_error == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 10.0 * (math.log10(signal) - math.log10(squared_error))
