"""What all layers are worked on with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qconvert.numerics.hessian import Moments, blended, factorize
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.rounder import Rounder, Way, to_nearest, with_feedback
from qconvert.weights.source import CheckpointWeights
from reference_model.load import ActivationStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """What all layers are worked on with.

    Attributes:
        weights: the source.
        pool: ``jobs`` threads.
        store: where hidden states wait.
        rows_bytes: what the inputs of a layer's experts, and again their outputs, may have in memory.
        folder: for the rest of them.
    """

    weights: CheckpointWeights
    rounder: Rounder
    calibration: Calibration
    pool: ThreadPoolExecutor
    jobs: int
    store: ActivationStore
    rows_bytes: int
    folder: Path | None = None

    def way(
        self,
        moments: Moments,
        *,
        columns: Tensor | None = None,
        over: Tensor | None = None,
        losses: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[Way, str]:
        """How matrices that read all tokens are rounded, and what that rests on; scaled ones as ``to_nearest`` says."""
        hessian = blended(moments)
        if self.calibration.method != "gptq":
            way = to_nearest(hessian, columns=columns, rows_over=over, losses=losses)
            return way, hessian.support.name.lower()
        factor = factorize(hessian, damping=self.calibration.damping)
        return with_feedback(factor), factor.support.name.lower()


def put_weight(linear: nn.Module, weight: Tensor) -> None:
    """Let a linear module have other weights."""
    linear.weight = nn.Parameter(weight, requires_grad=False)


def evenly(total: int, count: int) -> Tensor:
    """At most ``count`` of ``total`` numbers, evenly apart, ascending."""
    count = min(total, count)
    return torch.arange(count).mul_(total).div_(count, rounding_mode="floor")
