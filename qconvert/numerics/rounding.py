"""Rounding of one matrix to a scheme, with the error that it makes. N rows, K columns."""

from __future__ import annotations

from threading import Lock

from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.scheme import Block, Channel, Float, Group, Int, Scheme
from qconvert.numerics.rounding_bitsandbytes import is_bitsandbytes, quantize_bitsandbytes
from qconvert.numerics.rounding_rule import Rounded, second_scale_for
from qconvert.numerics.rounding_torch import quantize_with_torch

_IMPORTING = Lock()
"""Two threads that import numba at the same time break it."""

__all__ = ["Rounded", "quantize", "second_scale_for"]


def quantize(
    w: Tensor, scheme: Scheme, *, search: bool = False, importance: Tensor | None = None, second: float = 1.0
) -> Rounded:
    """Round a matrix to the nearest codes of its stored scales.

    Symmetric integers of b bits: ``scale = max|w| / (2**(b-1) - 1/2)``, ``code = clamp(round(w / scale))``.
    With zero points: ``scale = (max(w, 0) - min(w, 0)) / (2**b - 1)``, ``zero = round(-min(w, 0) / scale)``,
    ``code = clamp(round(w / scale + zero))``; the sum is taken with both counted from the middle of the codes, as
    compressed-tensors does. FP8 e4m3 (OCP 8-bit floating point specification 1.0): ``scale = max|w| / 448``,
    ``code = e4m3(clamp(w / scale, -448, 448))``. FP4 e2m1 with powers of two for scales (OCP Microscaling Formats 1.0):
    ``scale = 2**(floor(log2(8/7 * max|w|)) - 2)``, ``code = e2m1(clamp(w / scale, -6, 6))``; 8/7 moves up what would
    be cut off by more than rounding. FP4 e2m1 with e4m3 scales and a second one (NVIDIA's NVFP4):
    ``scale = e4m3(max|w| / (6 * second))``, ``code = e2m1(clamp(w / (scale * second), -6, 6))``. Halves go to even.

    All is computed in float32, after the scale has been rounded to its stored type, so codes fit the scale that a
    reader sees. Scales are never zero, infinite or NaN; an all-zero block has scale 1. Rows do not influence each
    other except inside a ``Block`` and in ``PerTensor``.

    On a CPU compiled kernels do it where there are any, with the same codes, scales and zero points as the plain
    torch expression and losses that differ by the order of summation.

    Args:
        w: [N, K], any float type; the result is on its device.
        scheme: integers or e4m3 with ``Channel``, ``Group``, ``Block`` or ``PerTensor``; schemes of bitsandbytes, see
            ``rounding_bitsandbytes``.
        second: of a scheme with a second scale, what ``second_scale_for`` gives for all matrices that share it.
        search: take, block by block, the scale of ``SEARCH_FACTORS`` with the least squared error.
        importance: [K], positive, near 1: what squared errors of each column count in that search; see
            ``importance.quantize_by_importance``.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        FormatError: a grid or blocking that is not available.
        ValueError: the group does not divide K.
    """
    if is_bitsandbytes(scheme):
        return quantize_bitsandbytes(w, scheme)
    if w.device.type == "cpu" and w.numel() and has_kernel(scheme):
        # Here, because importing numba takes a quarter of a second, and most commands round nothing.
        with _IMPORTING:
            from qconvert.numerics.rounding_compiled import quantize_compiled

        return quantize_compiled(w, scheme, search=search, importance=importance, second=second)
    return quantize_with_torch(w, scheme, search=search, importance=importance, second=second)


def has_kernel(scheme: Scheme) -> bool:
    """Whether a compiled kernel rounds to this scheme on a CPU."""
    if is_bitsandbytes(scheme):
        return False
    match scheme.grid, scheme.blocking:
        case Int(bits=4 | 8), Channel() | Group():
            return True
        case Int(bits=4 | 8), Block():
            return scheme.symmetric
        case Float(kind="e4m3fn"), Channel() | Group() | Block():
            return True
        case Float(kind="e2m1"), Group():
            return scheme.scale.dtype in (DType.F8_E8M0, DType.F8_E4M3)
    return False
