"""One expert, routed or shared: its gate, up and down, rounded by the tokens that reach it.

R tokens of its own, S of the whole layer for it to lean on, D hidden, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.core.awq_fold import AwqFold
from qconvert.execute import Folded
from qconvert.numerics.awq import awq
from qconvert.numerics.gptq import row_losses
from qconvert.numerics.hessian import Factor, Hessian, Moments, blended, factorize, no_moments
from qconvert.numerics.rounding import quantize
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.places import MlpSteps
from qconvert.sequential.rounder import Rounder, Way, to_nearest, with_feedback
from qconvert.sequential.scaling import scheme_of, told
from reference_model.load import ExpertWeights

Name = Literal["gate", "up", "down"]

Original = Callable[[Name], Tensor]
"""Gives a matrix as it is in the source, float32: gate and up [F, D], down [D, F]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpInputs:
    """What an expert reads.

    Attributes:
        width: D.
        runs: gives its own tokens, some rows [r, D] at a time, in any float type, and what the expert's output counts
            for each [r], with a mean square of 1 over all of them; the same ones when it is asked again.
        layer: moments of the layer's tokens; ``None`` where all of them are its own.
        sample: some of the layer's tokens [S, D], for what they would be behind gate and up of this expert.
        columns: [D], what columns of gate and up are multiplied by, because a norm divides these inputs by it;
            ``None`` where none does.
    """

    width: int
    runs: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    layer: Moments | None = None
    sample: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An expert as the layers behind it see it.

    Attributes:
        weights: float32.
        inner: what it computes between for its own tokens [R, F], float32, where that is known and not much.
    """

    weights: ExpertWeights
    inner: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mlp:
    """What the two methods have in common."""

    steps: MlpSteps
    original: Original
    inputs: MlpInputs
    rounder: Rounder
    calibration: Calibration
    unrounded: Original

    def hessian(self) -> Hessian:
        """Of what gate and up read."""
        own = no_moments(self.inputs.width)
        for rows, counts in self.inputs.runs():
            own = own.add(counts[:, None] * rows)  # counts are float32
        return blended(own, self.inputs.layer)

    def inner_moments(self, gate: Tensor, up: Tensor) -> tuple[Moments, Moments | None, Tensor | None]:
        """Of what down reads: from the expert's own tokens, and from the layer's; the former, if they are one run."""
        own, given = no_moments(gate.shape[0]), None
        for n, (rows, counts) in enumerate(self.inputs.runs()):
            some = inner(rows, gate, up)
            given = None if n else some
            own = own.add(counts[:, None] * some)
        sample = self.inputs.sample
        return own, None if sample is None else no_moments(gate.shape[0]).add(inner(sample, gate, up)), given

    def factor(self, hessian: Hessian) -> Factor:
        """With the damping that was asked for."""
        return factorize(hessian, damping=self.calibration.damping)

    def round(
        self, name: Name, way: Way, hessian: Hessian | Factor, tokens: int, folded: Folded | None = None
    ) -> Tensor | None:
        """What the matrix means once it is rounded; ``None`` where no step rounds it."""
        step = getattr(self.steps, name)
        if step is None:
            return None
        return self.rounder.round(step, way, tokens, hessian.support.name.lower(), folded=folded)

    def shown(self, name: Name, rounded: Tensor | None) -> Tensor:
        """The matrix that later ones are rounded for: as it is now, or as it was."""
        if not self.calibration.propagate:
            return self.original(name)
        return self.unrounded(name) if rounded is None else rounded


def round_mlp(
    steps: MlpSteps,
    original: Original,
    inputs: MlpInputs,
    rounder: Rounder,
    calibration: Calibration,
    *,
    unrounded: Original | None = None,
) -> Shown:
    """Round the matrices that ``steps`` name, and return all three as the layers behind shall see them.

    ``down`` is rounded for what gate and up give after they are rounded, unless nothing is to be propagated.

    Args:
        steps: the matrices to round.
        original: gives the others, and these where they are wanted as they were.
        inputs: what reaches the expert.
        rounder: writes.
        calibration: how.
        unrounded: gives matrices that no step rounds as they will be; by default as they were.
    """
    mlp = _Mlp(
        steps=steps,
        original=original,
        inputs=inputs,
        rounder=rounder,
        calibration=calibration,
        unrounded=unrounded or original,
    )
    return _by_feedback(mlp) if calibration.method == "gptq" else _by_scaling(mlp)


def inner(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(x gate^T) * (x up^T)``, float32 [R, F] of x [R, D] in any float type."""
    wide = x.to(torch.float32)
    return functional.silu(wide @ gate.T).mul_(wide @ up.T)


def _by_feedback(mlp: _Mlp) -> Shown:
    gate = up = down = given = None
    if mlp.steps.gate is not None or mlp.steps.up is not None:
        hessian = mlp.hessian()
        factor = mlp.factor(hessian)
        tokens = hessian.tokens
        del hessian
        gate, up = (mlp.round(name, with_feedback(factor), factor, tokens) for name in ("gate", "up"))
        del factor
    shown = mlp.shown("gate", gate), mlp.shown("up", up)
    if mlp.steps.down is not None:
        own, layer, given = mlp.inner_moments(*shown)
        factor = mlp.factor(blended(own, layer))
        down = mlp.round("down", with_feedback(factor), factor, own.tokens)
    return Shown(weights=ExpertWeights(gate=shown[0], up=shown[1], down=mlp.shown("down", down)), inner=given)


def _by_scaling(mlp: _Mlp) -> Shown:
    """AWQ from up to down where both are rounded, of what they read as it is in the source; then to nearest."""
    gate = up = down = None
    over: Tensor | None = None
    said: Folded | None = None
    losses = (0.0, 0.0)
    behind: Hessian | None = None
    if mlp.steps.down is not None:
        own, layer, _ = mlp.inner_moments(mlp.original("gate"), mlp.original("up"))
        behind = blended(own, layer)
        if mlp.steps.up is not None and mlp.calibration.folds_by(AwqFold.UP_DOWN):
            sizes = own if own.tokens or layer is None else layer
            scheme = scheme_of(mlp.steps.down)
            factor, w = mlp.factor(behind), mlp.original("down")
            found = awq([w], scheme, sizes.mean_abs, factor, mean_squares=behind.matrix.diagonal())
            nearest = quantize(w, scheme, search=True).quantized.dequantize()
            over, losses = found.factors, (float(row_losses(nearest - w, factor).sum()), found.loss)
            said = told(AwqFold.UP_DOWN, found)
    if mlp.steps.gate is not None or mlp.steps.up is not None:
        hessian, columns = mlp.hessian(), mlp.inputs.columns
        gate = mlp.round("gate", to_nearest(hessian, columns=columns), hessian, hessian.tokens)
        way = to_nearest(hessian, columns=columns, rows_over=over)
        up = mlp.round("up", way, hessian, hessian.tokens, said)
    if behind is not None:
        down = mlp.round("down", to_nearest(behind, columns=over, losses=losses), behind, behind.tokens)
    weights = ExpertWeights(gate=mlp.shown("gate", gate), up=mlp.shown("up", up), down=mlp.shown("down", down))
    return Shown(weights=weights)
