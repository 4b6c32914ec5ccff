"""Faults that one tensor shows by itself: scales that are no numbers or too large, lost blocks, changed vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Blocking, Float, Int, Scheme
from qconvert.numerics.error import ErrorSums
from qconvert.numerics.rounding import quantize
from qconvert.parity.blocks import BlockSums, describe_block
from qconvert.parity.causes import Cause, CauseKind, cause
from qconvert.parity.codes import wrong_scales

SAME_DIRECTION = 0.85
"""Cosine from which a block holds the right numbers times a factor.

A block of the right scale has r >= 1 / (1 + (n - 1) / 225) for n int4 codes, reached when one value uses the whole
range and all others round to zero just below half a step; its cosine is then sqrt(r), so every r below 0.72 comes
with a cosine below 0.85 and is not taken for a factor.
"""

FACTOR = 0.7
"""Smallest |log2 r| that is a wrong scale. Rounding up reaches r = 1.4 (log2 0.5) when all of a group's values stand
just above half a step beside one that uses the whole range; a doubled or halved scale has |log2 r| = 1."""

NO_SIGNAL = 1e-30
"""Blocks with less energy are zeros for any engine."""

MARGIN_DB = 6.0
"""How far below plain rounding a tensor may be: error feedback (GPTQ) trades a few dB of weight error away."""


def scale_faults(
    role: TensorRole,
    name: str,
    sums: BlockSums,
    blocking: Blocking | None,
    shape: tuple[int, ...],
    cut: Tensor | None = None,
) -> Iterator[Cause]:
    """Blocks that are the original's times a factor, and blocks whose numbers are gone.

    A block of ``cut`` has no factor but a largest value that its scale gives up.
    """
    lost = (sums.approximated == 0) & (sums.signal > NO_SIGNAL)
    if bool(lost.any()):
        yield cause(CauseKind.LOST, role, f"{counted(lost, blocking, shape)} became zero", (name,))
    wrong = is_factor(sums) if cut is None else is_factor(sums) & ~cut
    if not bool(wrong.any()):
        return
    if sums.total.cosine < 0.5 and int(wrong.sum()) * 2 < wrong.numel():
        # other numbers altogether: some small blocks of any two matrices point in the same direction
        return
    yield factor_cause(role, name, sums, wrong, blocking, shape)


def is_factor(sums: BlockSums) -> Tensor:
    """Which blocks are the original's times a factor that no rounding reaches."""
    return (sums.ratio.log2().abs() >= FACTOR) & (sums.cosine >= SAME_DIRECTION) & (sums.signal > NO_SIGNAL)


def factor_cause(
    role: TensorRole, name: str, sums: BlockSums, wrong: Tensor, blocking: Blocking | None, shape: tuple[int, ...]
) -> Cause:
    """The blocks ``wrong`` hold the original's values times a factor."""
    typical = float(sums.ratio[wrong].median())
    return cause(
        CauseKind.SCALE_FACTOR,
        role,
        f"{counted(wrong, blocking, shape)}: values are {_factor(typical)} the original's "
        f"(block cosine {float(sums.cosine[wrong].median()):.4f})",
        (name,),
    )


def bad_scales(
    role: TensorRole, name: str, parts: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Iterator[Cause]:
    """Stored scales that no rounding makes: zero, infinite, NaN, or negative ones of floats."""
    wanted = scheme.scale_shape(*shape)
    for suffix, part in parts.items():
        if not part.is_floating_point() or tuple(part.shape) != wanted:
            continue
        values = part.to(torch.float32)
        wrong = wrong_scales(values, scheme)
        if bool(wrong.any()):
            example = float(values[wrong][0])
            text = f"{suffix} of {counted(wrong, scheme.blocking, shape)} is {example:g}"
            yield cause(CauseKind.BAD_SCALE, role, text, (f"{name}.{suffix}",))


def not_finite(role: TensorRole, name: str, values: Tensor) -> Cause:
    """NaN or infinite values in a converted tensor."""
    wrong = ~values.isfinite()
    at = tuple(wrong.nonzero()[0].tolist())
    return cause(
        CauseKind.NOT_FINITE, role, f"{int(wrong.sum())} values are NaN or infinite, the first at {list(at)}", (name,)
    )


def floor_db(scheme: Scheme | None) -> float:
    """SQNR below which a tensor is looked at again: 6 dB and more under plain rounding of Gaussian weights.

    Integers of b bits reach about 6 b - 5 dB there (int4 in groups of 128: 19, int8 per channel: 42), e4m3 31, FP4 and
    NF4 18 to 20.
    """
    match None if scheme is None else scheme.grid:
        case None:
            return 40.0
        case Int(bits=bits):
            return 6.0 * bits - 11.0
        case Float(kind="e4m3fn"):
            return 25.0
    return 12.0


def innocent(w: Tensor, sums: ErrorSums, scheme: Scheme | None) -> bool:
    """Whether plain rounding of the same matrix is as bad: weights with outliers are hard for any scheme."""
    if scheme is None:
        return False
    try:
        rounded = quantize(w, scheme)
    except (FormatError, ValueError):
        return sums.cosine > 0.9
    if rounded.squared_error == 0.0:
        return sums.squared_error == 0.0
    return sums.squared_error <= rounded.squared_error * 10 ** (MARGIN_DB / 10)


def is_offset_by_one(w: Tensor, v: Tensor) -> bool:
    """Whether a norm's weight was stored as 1 + w: then v - w is 1 up to the rounding of 16-bit numbers near 1."""
    return w.dim() == 1 and bool(((v - w - 1).abs() < 2.0**-7 * (1 + v.abs())).all())


def counted(mask: Tensor, blocking: Blocking | None, shape: tuple[int, ...]) -> str:
    """The blocks of a mask in words: the only one, or how many and the first."""
    at = mask.nonzero()
    first = describe_block(tuple(at[0].tolist()), blocking, shape)
    if len(at) == 1:
        return first
    return f"{len(at)} of {mask.numel()} blocks (the first: {first})"


def _factor(ratio: float) -> str:
    for value, word in ((2.0, "twice"), (0.5, "half")):
        if abs(math.log2(ratio / value)) < 0.15:
            return word
    return f"{ratio:.3g} times"
