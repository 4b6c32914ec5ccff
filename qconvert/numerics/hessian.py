"""What a matrix's inputs look like together: second moments, and the triangular factor that rounding works with.

K inputs of the matrix, T tokens. ``H = X^T X / T`` [K, K] for inputs X [T, K], so that ``e H e^T`` is the mean squared
error that a row's error e [K] makes in its output. Frantar et al. write 2 X X^T, with which nothing but this meaning
changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.numerics.threads import one_thread

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it (Frantar et al. 2022, section 3.3)."""

_DAMPING_STEP, _DAMPING_TRIES = 10.0, 4
_SQUARE_COLUMNS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Inputs seen so far. Fewer than K tokens are kept as they are, which takes less memory than a [K, K] matrix.

    Attributes:
        inputs: K.
        tokens: T.
        kept: the inputs [T, K] themselves as long as T < K; ``X^T X`` [K, K] from T = K on.
        sum_abs: sum of ``|x|`` over tokens [K], float64.
        sum_squares: sum of ``x**2`` over tokens [K], float64.
    """

    inputs: int
    tokens: int
    kept: Tensor
    sum_abs: Tensor
    sum_squares: Tensor

    def add(self, x: Tensor) -> Moments:
        """These inputs and ``x`` [tokens, K], any float type.

        Products are taken in the type that the record was begun in, on one thread. The same batches in the same order
        give the same bits.

        Raises:
            DataError: NaN, infinity, or numbers whose squares leave the type.
            ValueError: ``x`` does not have K columns.
        """
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"inputs of shape {tuple(x.shape)} for a matrix with {self.inputs} columns")
        if not x.shape[0]:
            return self
        sum_abs = self.sum_abs + x.abs().sum(0, dtype=torch.float64)
        sum_squares = self.sum_squares + x.to(torch.float64).square().sum(0)
        # No sum of products is larger than this one.
        if not float(sum_squares.sum()) < torch.finfo(self.kept.dtype).max * 2.0**-10:
            raise DataError("inputs hold NaN, infinity, or numbers whose squares are too large to be summed")
        rows, tokens = x.to(self.kept.dtype), self.tokens + x.shape[0]
        with one_thread():
            if self.tokens >= self.inputs:
                kept = _square(rows).add_(self.kept)
            else:
                kept = torch.cat((self.kept, rows))
                if tokens >= self.inputs:
                    kept = _square(kept)
        return Moments(inputs=self.inputs, tokens=tokens, kept=kept, sum_abs=sum_abs, sum_squares=sum_squares)

    @property
    def mean_abs(self) -> Tensor:
        """Mean of ``|x|`` per input [K], float64; zeros without a token."""
        return self.sum_abs / max(self.tokens, 1)

    @property
    def mean_squares(self) -> Tensor:
        """Mean of ``x**2`` per input [K], float64, the diagonal of ``hessian``; zeros without a token."""
        return self.sum_squares / max(self.tokens, 1)

    def hessian(self) -> Tensor:
        """``X^T X / T`` [K, K]; zeros without a token."""
        return self.share(1.0)

    def share(self, of: float) -> Tensor:
        """``X^T X / T`` [K, K] times ``of``, a matrix of its own."""
        by = of / max(self.tokens, 1)
        if self.tokens >= self.inputs:
            return self.kept * by
        with one_thread():
            return _square(self.kept).mul_(by)


def _square(rows: Tensor) -> Tensor:
    """``rows^T rows`` [K, K]: the lower half is computed and mirrored, which takes five eighths of the time."""
    inputs = rows.shape[1]
    gram = rows.new_empty(inputs, inputs)
    for begin in range(0, inputs, _SQUARE_COLUMNS):
        end = min(inputs, begin + _SQUARE_COLUMNS)
        gram[begin:, begin:end] = rows[:, begin:].T @ rows[:, begin:end]
        gram[begin:end, end:] = gram[end:, begin:end].T
    return gram


def no_moments(inputs: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Moments:
    """The record of no token, to add to.

    Args:
        inputs: K.
        dtype: of the products: float32, or float64 where time is of no concern.
        device: where inputs will be.
    """
    zeros = torch.zeros(inputs, dtype=torch.float64, device=device)
    nothing = torch.zeros(0, inputs, dtype=dtype, device=device)
    return Moments(inputs=inputs, tokens=0, kept=nothing, sum_abs=zeros, sum_squares=zeros)


class Support(Enum):
    """What a Hessian rests on: what a caller may have to warn of."""

    OWN = "tokens of its own, at least as many as inputs"
    FEW = "fewer tokens of its own than inputs"
    POOLED = "no token of its own: the layer's"
    NONE = "no token, or only zeros: every input counts the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hessian:
    """``matrix`` [K, K], of ``tokens`` of its own, and what it rests on."""

    matrix: Tensor
    tokens: int
    support: Support


def blended(own: Moments, pooled: Moments | None = None, *, prior: int | None = None) -> Hessian:
    """A Hessian drawn towards the one of all tokens of the layer, the more the fewer tokens are its own.

    ``H = (T H_own + prior H_pooled) / (T + prior)``: the mean over T own tokens and ``prior`` others that look as the
    layer's do on average, which is the posterior mean of a covariance under a conjugate prior of that many
    observations (Ledoit and Wolf 2004, doi 10.1016/S0047-259X(03)00096-4, find the same form). Without a token of its
    own an expert has the layer's; without a layer's its own.

    Args:
        own: what reached this expert.
        pooled: inputs of the same matrix if every token, or a sample of them, reached it.
        prior: tokens that the layer counts for; K by default, as many as a Hessian of its own takes to have no
            direction without a token.

    Raises:
        ValueError: ``pooled`` has another number of inputs.
    """
    support = Support.OWN if own.tokens >= own.inputs else Support.FEW
    if pooled is not None and pooled.tokens:
        if pooled.inputs != own.inputs:
            raise ValueError(f"{own.inputs} inputs are pooled with {pooled.inputs}")
        counts = own.inputs if prior is None else prior
        share = counts / (own.tokens + counts) if own.tokens else 1.0
        matrix = own.share(1.0 - share)
        if pooled.tokens >= pooled.inputs:
            matrix.add_(pooled.kept.to(matrix.dtype), alpha=share / pooled.tokens)
        else:
            matrix.add_(pooled.share(share).to(matrix.dtype))
        support = support if own.tokens else Support.POOLED
    else:
        matrix = own.hessian()
    if not bool(matrix.diagonal().any()):
        support = Support.NONE
    return Hessian(matrix=matrix, tokens=own.tokens, support=support)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """``H + damping I`` with inputs in another order, as ``unit diag(pivots) unit^T``, float32.

    Attributes:
        unit: [K, K], upper triangular with ones on its diagonal.
        pivots: [K], positive: the part of each input that none behind it explains.
        order: [K] int64, which input stands at each place.
        damping: what was added to every element of the diagonal, in units of H.
        dead: how many inputs are always zero.
        support: what H rests on.
        diagonal: [K], of H in its own order, without damping: what each input counts for alone.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor
    damping: float
    dead: int
    support: Support
    diagonal: Tensor

    @property
    def importance(self) -> Tensor:
        """What an input's error counts when scales are chosen, [K] in H's own order.

        ``sqrt(pivot * diagonal)``: between what it counts if all behind it makes up for it, and if nothing does. On
        trained weights its scales lose less than those of either.
        """
        pivots = torch.empty_like(self.pivots)
        pivots[self.order] = self.pivots
        return (pivots.to(torch.float64) * self.diagonal).sqrt_()


def factorize(hessian: Hessian, *, damping: float = DAMPING, by_size: bool = True) -> Factor:
    """Damp H, put its inputs in order and split it into triangles.

    Frantar et al. 2022 (arXiv 2210.17323) use U with H^-1 = U^T U. It is the inverse of the R here, upper triangular
    with H = R R^T, and what U tells of errors made so far R tells without an inverse (Chee et al. 2023, arXiv
    2307.13304, theorem 6): one factorisation in place of two and an inverse, and fewer digits lost. All matrices with
    the same inputs, such as gate and up, share it.

    A damped H has a factor in float32 unless its numbers contradict each other by more than rounding; then ten times
    the damping is tried, up to four times, and last the diagonal alone. An input that is always zero has a pivot of
    the damping's size and is connected to no other. Where there is no information, all are alike: rounding to nearest.

    Args:
        hessian: symmetric, of any float type.
        damping: added to the diagonal, as a share of its mean.
        by_size: put inputs with the largest diagonal first (``static`` activation order), else leave them in order.

    Raises:
        DataError: H holds NaN or infinity.
        ValueError: a damping that is not positive.
    """
    if not damping > 0.0:
        raise ValueError(f"a damping of {damping}: without one, inputs that are always zero have no factor")
    matrix = hessian.matrix
    diagonal = matrix.diagonal().to(torch.float64)
    if not bool(torch.isfinite(matrix.sum())) and not bool(torch.isfinite(matrix).all()):
        raise DataError("a Hessian holds NaN or infinite values: the inputs that it was made of do")
    size, inputs = float(diagonal.mean()), len(diagonal)
    order = torch.arange(inputs, device=matrix.device)
    dead = int((diagonal == 0).sum())
    if hessian.support is Support.NONE or size == 0.0:
        return Factor(
            unit=torch.eye(inputs, device=matrix.device),
            pivots=torch.ones(inputs, device=matrix.device),
            order=order,
            damping=1.0,
            dead=dead,
            support=Support.NONE,
            diagonal=diagonal.to(torch.float32),
        )
    if by_size:
        order = diagonal.argsort(descending=True, stable=True)
    # Backwards, because what there is factorises from the top left and the last input has to be the first.
    backwards = order.flip(0)
    scaled = matrix.index_select(0, backwards).index_select(1, backwards).div_(size).to(torch.float32)
    share, undamped = damping, scaled.diagonal().clone()
    with one_thread():
        lower = _cholesky(scaled, undamped + share)
        for _ in range(_DAMPING_TRIES):
            if lower is not None:
                break
            share *= _DAMPING_STEP
            lower = _cholesky(scaled, undamped + share)
    if lower is None:
        lower = (undamped.clamp(min=0.0) + share).sqrt().diag()
    roots = lower.diagonal().flip(0)
    return Factor(
        unit=lower.flip((0, 1)).div_(roots),
        pivots=roots.square().mul_(size),
        order=order,
        damping=share * size,
        dead=dead,
        support=hessian.support,
        diagonal=diagonal.to(torch.float32),
    )


def _cholesky(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """The lower triangle whose square is the matrix with another diagonal; ``None`` where float32 finds none."""
    matrix.diagonal().copy_(diagonal)
    lower, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info) or not bool(torch.isfinite(lower.diagonal()).all()) else lower
