"""Scaling inputs before rounding: what a matrix's columns are multiplied by, and whatever makes its inputs divided by.

N rows, K inputs, S factors. Several inputs may have to share a factor: ``places`` [K] int64 says which of the S each
has. Codes then are those of ``w diag(s)``, and what they mean for the original inputs is that over s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.core.scheme import Scheme
from qconvert.numerics.gptq import row_losses
from qconvert.numerics.hessian import Factor
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import quantize

EXPONENTS: tuple[float, ...] = tuple(step / 20 for step in range(20))
"""What is tried (Lin et al. 2023, section 3.2: a grid of 20 over [0, 1]); 0 is no scaling."""

_LEAST, _MOST = 1e-4, 1e4
"""How small a mean |x| counts, and no factor lies farther from 1 than either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Factors and what they do to the loss of rounding to nearest.

    Attributes:
        factors: [S], float32, positive; consumers' columns times them, producers' rows over them.
        exponent: the one of ``EXPONENTS`` that they come from.
        loss: sum over consumers and rows of ``e H e^T``.
        unscaled_loss: the same with all factors 1; no less.
    """

    factors: Tensor
    exponent: float
    loss: float
    unscaled_loss: float


def awq(
    consumers: Sequence[Tensor],
    scheme: Scheme,
    mean_abs: Tensor,
    factor: Factor,
    *,
    places: Tensor | None = None,
    search: bool = True,
    mean_squares: Tensor | None = None,
) -> Scaling:
    """Find by how much to scale up the inputs that are large, so that their columns are rounded more finely.

    ``best_of`` the factors of ``candidates``, the loss being ``e H e^T``, ``e = rounded(w diag(s)) diag(1/s) - w``.
    With the exponent 0 among them nothing is worse than rounding to nearest.

    Args:
        consumers: all matrices [N, K] that read these inputs.
        scheme: what they are rounded to; of one with a second scale, this is 1.
        mean_abs: [K], not negative: ``Moments.mean_abs``.
        factor: of the inputs' Hessian.
        places: [K] int64, by default one factor an input. A shared one follows from the mean of what shares it.
        search: whether consumers will be rounded with searched scales.
        mean_squares: [K], if they will be rounded by importance, of the inputs as they are now.

    Raises:
        DataError: ``mean_abs`` or a matrix holds NaN or infinity.
        ValueError: sizes that do not belong together.
    """
    if places is None:
        places = torch.arange(len(mean_abs), device=mean_abs.device)
    tried = candidates(mean_abs, places=places)
    losses = [
        sum(scaled_loss(w, scheme, s[places], factor, search=search, mean_squares=mean_squares) for w in consumers)
        for s in tried
    ]
    return best_of(tried, losses)


def candidates(mean_abs: Tensor, *, places: Tensor | None = None) -> tuple[Tensor, ...]:
    """Factors [S] to try, float32, one for each of ``EXPONENTS``; the first are ones.

    Args:
        mean_abs: [K], not negative: ``Moments.mean_abs``.
        places: see ``awq``.

    Raises:
        DataError: ``mean_abs`` holds NaN or infinity.
        ValueError: sizes that do not belong together.
    """
    if not bool(torch.isfinite(mean_abs).all()):
        raise DataError("mean sizes of inputs hold NaN or infinite values")
    shared = mean_abs if places is None else _mean_by_place(mean_abs, places)
    return tuple(factors_from(shared, exponent) for exponent in EXPONENTS)


def best_of(tried: Sequence[Tensor], losses: Sequence[float]) -> Scaling:
    """The first of the ``candidates`` with the least loss: Lin et al. 2023, arXiv 2306.00978, equation 5.

    ``s = mean|x|**a`` for the a with the least error of outputs.
    """
    best = 0
    for n, loss in enumerate(losses):
        best = n if loss < losses[best] else best
    return Scaling(factors=tried[best], exponent=EXPONENTS[best], loss=losses[best], unscaled_loss=losses[0])


def scaled_loss(
    w: Tensor,
    scheme: Scheme,
    columns: Tensor,
    factor: Factor,
    *,
    search: bool = True,
    mean_squares: Tensor | None = None,
) -> float:
    """``sum of e H e^T``, ``e = rounded(w diag(s)) diag(1/s) - w``, for s = ``columns`` [K]; see ``awq``."""
    scaled = scaled_columns(w, columns)
    if mean_squares is None:
        rounded = quantize(scaled, scheme, search=search).quantized
    else:
        rounded = quantize_by_importance(scaled, scheme, mean_squares / columns.square()).quantized
    return float(row_losses(rounded.dequantize() / columns - w.to(torch.float32), factor).sum())


def factors_from(mean_abs: Tensor, exponent: float) -> Tensor:
    """``mean_abs**exponent`` over the root of its largest times its smallest, float32 [S]; ones for 0.

    Inputs that are hardly ever there count as a ten thousandth of the mean.
    """
    if exponent == 0.0 or not bool(mean_abs.any()):
        return torch.ones_like(mean_abs, dtype=torch.float32)
    sizes = mean_abs.to(torch.float64)
    powers = sizes.clamp(min=_LEAST * float(sizes.mean())).pow(exponent)
    return (powers / (powers.max() * powers.min()).sqrt()).clamp_(_LEAST, _MOST).to(torch.float32)


def powers_of_two(factors: Tensor) -> Tensor:
    """The nearest powers of two on a logarithmic scale: producers that keep 16 bits are divided by them exactly."""
    return torch.exp2(torch.log2(factors).round_())


def value_places(heads: int, value_heads: int, width: int) -> Tensor:
    """Places of the inputs of an attention's output matrix, [heads * width] int64, among value_heads * width factors.

    Attention adds values of different tokens, never of different elements of a head, so each element of a head of v
    may have a factor; all heads of queries that read a head of v share them. An output gate changes nothing in it.

    Raises:
        ValueError: ``value_heads`` does not divide ``heads``.
    """
    if heads % value_heads:
        raise ValueError(f"{value_heads} heads of values do not divide {heads} heads")
    head = torch.arange(heads).div_(heads // value_heads, rounding_mode="floor")
    return (head[:, None] * width + torch.arange(width)).flatten()


def repeated_places(heads: int, width: int) -> Tensor:
    """Places of the inputs of a matrix behind a norm over each head whose weight [width] all heads share."""
    return torch.arange(width).repeat(heads)


def rescaled(
    w: Tensor, dtype: torch.dtype, *, columns: Tensor | None = None, over: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a matrix that keeps its bits is stored as between a producer and a consumer, and what that means.

    Args:
        w: [N, K].
        dtype: in which it is stored.
        columns: [K], what columns are multiplied by, because inputs are divided by it.
        over: [N], what rows are divided by, because what reads the outputs is multiplied by it.

    Returns:
        [N, K] in ``dtype``, and the same as it acts on the inputs and outputs that there were, float32.
    """
    scaled = w.to(torch.float32) if columns is None else scaled_columns(w, columns)
    if over is not None:
        scaled = divided_rows(scaled, over)
    stored = scaled.to(dtype)
    meaning = stored.to(torch.float32)
    if columns is not None:
        meaning = meaning / columns
    return stored, meaning if over is None else meaning * over[:, None]


def scaled_columns(w: Tensor, factors: Tensor) -> Tensor:
    """A consumer [N, K] with column k times ``factors[k]``, float32."""
    return w.to(torch.float32) * factors


def divided_rows(w: Tensor, factors: Tensor) -> Tensor:
    """A producer [N, K] with row n over ``factors[n]``, float32: ``up`` before ``down``, ``v`` before ``o``."""
    return w.to(torch.float32) / factors[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedNorm:
    """A norm that divides its output, and what makes up for it.

    Attributes:
        weight: [D], in the type of the weight that was given.
        factors: [D] float32, what columns of every consumer are multiplied by; not the factors that were asked for,
            because ``weight`` is rounded.
        kept: how many elements kept weight and factor 1, because no number of the type does.
    """

    weight: Tensor
    factors: Tensor
    kept: int


def fold_into_norm(weight: Tensor, factors: Tensor, *, offset: float) -> FoldedNorm:
    """Divide what a norm puts out, and give consumers the quotient of the weights as they are stored.

    ``w' = (offset + w) / s - offset`` is rounded to the weight's type first; consumers get
    ``(offset + w) / (offset + w')``. So the product of both is the original up to float32, however coarse w' is.

    Args:
        weight: [D], as it is stored.
        factors: s, [D], positive.
        offset: 1 where the norm multiplies by ``1 + weight``, 0 where by the weight.
    """
    whole = weight.to(torch.float64) + offset
    stored = (whole / factors.to(torch.float64) - offset).to(weight.dtype)
    quotient = whole / (stored.to(torch.float64) + offset)
    # Zero over zero, a weight that vanished, or one whose rounding left next to nothing of the factor.
    usable = torch.isfinite(quotient) & (quotient > 0.0) & torch.isfinite(stored)
    usable &= (quotient / factors).log2().abs() < 1.0
    return FoldedNorm(
        weight=torch.where(usable, stored, weight),
        factors=torch.where(usable, quotient, 1.0).to(torch.float32),
        kept=int((~usable).sum()),
    )


def _mean_by_place(mean_abs: Tensor, places: Tensor) -> Tensor:
    """The mean of what shares a place, float64 [S]."""
    if places.shape != mean_abs.shape:
        raise ValueError(f"{len(places)} places for {len(mean_abs)} inputs")
    count = torch.bincount(places)
    sums = torch.zeros(len(count), dtype=torch.float64, device=places.device)
    return sums.index_add_(0, places, mean_abs.to(torch.float64)) / count
