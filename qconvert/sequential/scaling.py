"""Factors between a tensor that is divided and what reads it, and what is said of them.

K inputs of readers, S factors: several inputs may share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.awq_fold import AwqFold
from qconvert.core.plan import Quantize, Rescale, Step
from qconvert.core.scheme import Scheme
from qconvert.execute import Folded
from qconvert.numerics.awq import EXPONENTS, Scaling, best_of, candidates, fold_into_norm, rescaled
from qconvert.sequential.rounder import Way

Losses = Callable[[Sequence[Tensor]], Sequence[float]]
"""The squared error of outputs for each of several factors [S] of what is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormScaling:
    """A norm whose outputs are divided.

    Attributes:
        weight: [S], in the type that is stored.
        columns: [S] float32, what columns of readers are multiplied by, exactly what ``weight`` leaves to them.
        folded: for the record.
    """

    weight: Tensor
    columns: Tensor
    folded: Folded


def scale_norm(
    fold: AwqFold, weight: Tensor, mean_abs: Tensor, losses: Losses, *, places: Tensor | None = None
) -> NormScaling:
    """Find the factors that a norm is divided by; what is tried is what its stored weight can be divided by.

    Args:
        fold: which norm.
        weight: [S], as it is stored.
        mean_abs: [K], of what readers get.
        losses: of factors, see ``Losses``.
        places: see ``numerics.awq.awq``.
    """
    offset = fold.parts.offset or 0.0
    tried = [fold_into_norm(weight, s, offset=offset) for s in candidates(mean_abs, places=places)]
    found = best_of([one.factors for one in tried], losses([one.factors for one in tried]))
    chosen = tried[EXPONENTS.index(found.exponent)]
    return NormScaling(weight=chosen.weight, columns=chosen.factors, folded=told(fold, found))


def told(fold: AwqFold, found: Scaling) -> Folded:
    """What is said of factors that were found."""
    return Folded(
        fold=fold.value,
        exponent=found.exponent,
        strength=float(found.factors.log2().abs().mean()),
        loss=found.loss / found.unscaled_loss if found.unscaled_loss > 0.0 else None,
    )


def as_rounded(step: Step, way: Way, w: Tensor) -> Tensor:
    """What a matrix [N, K] would mean after a step that rounds it, float32.

    Raises:
        TypeError: the step does not.
    """
    if not isinstance(step.action, Quantize):
        raise TypeError(f"{step.key} is not rounded")
    return way(w, 0, step.action, 1.0).meaning


def as_kept(step: Step, w: Tensor, columns: Tensor) -> Tensor:
    """What a matrix [N, K] would mean after a step that multiplies its columns in the bits that it has, float32.

    Raises:
        TypeError: the step does not.
    """
    if not isinstance(step.action, Rescale):
        raise TypeError(f"{step.key} is not rescaled")
    return rescaled(w, step.action.dtype.torch_dtype, columns=columns)[1]


def scheme_of(step: Step) -> Scheme:
    """What a step rounds to.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(step.action, Quantize):
        raise TypeError(f"{step.key} is not rounded")
    return step.action.scheme


def squared(difference: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(difference.to(torch.float64).square().sum())
