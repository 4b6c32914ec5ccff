"""How far the layers of two models lie apart over the same tokens, summed up batch by batch.

Shapes: B windows, T tokens, D hidden, E experts, k experts a token, P marks of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.metric import Metric, exact
from qconvert.parity.series import Curve

MARKS = 8
"""Places of a window, evenly apart, where DeltaNet states are compared; the last is its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What one layer made of one batch: ``hidden`` [B, T, D]; ``experts`` [B T, k] and their ``weights`` [B T, k]."""

    hidden: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScores:
    """One layer of the converted model against the same one of the original: means over tokens.

    Attributes:
        hidden_cosine: of the outputs h and h' of a token.
        hidden_error: ``|h' - h| / |h|`` of a token.
        router_overlap: the share of the original's k experts that the converted model chose too.
        router_flips: the share of tokens with any other expert.
        router_mass_moved: ``1/2 sum_e |w_e - w'_e|`` of a token, w its k routing weights, zero for other experts.
        state_drift: at each of ``MARKS`` places ``sqrt(sum (S' - S)^2 / sum S^2)`` of the memories of all heads and
            windows; empty where there is none, or where it was not asked for.
    """

    hidden_cosine: float
    hidden_error: float
    router_overlap: float
    router_flips: float
    router_mass_moved: float
    state_drift: tuple[float, ...] = ()


class LayerSums:
    """Sums of which ``LayerScores`` are made; ``sums`` and ``states`` are all there is to keep of it."""

    def __init__(self, sums: Tensor | None = None, states: Tensor | None = None) -> None:
        """Go on from ``sums`` float64 [6] and ``states`` float64 [2, P] of another one, or from zero."""
        self.sums = torch.zeros(6, dtype=torch.float64) if sums is None else sums
        self.states = torch.zeros(2, MARKS, dtype=torch.float64) if states is None else states

    def add(self, ours: Passed, theirs: Passed) -> None:
        """Take one batch of both models."""
        h, other = (one.hidden.flatten(0, 1).to(torch.float32) for one in (ours, theirs))
        size, length, far = (torch.linalg.vector_norm(x, dim=1).to(torch.float64) for x in (h, other, other - h))
        # what is missing to 1 comes of the small difference, so that float32 does for each number of a state
        both = 2 * size * length
        missing = (far.square() - (size - length).square()) / both.where(both > 0, 1.0)
        # nothing and nothing are the same
        cosine = torch.where(far == 0, 1.0, torch.where(both == 0, 0.0, 1.0 - missing))
        error = torch.where(far == 0, 0.0, far / size)
        same = ours.experts.unsqueeze(2) == theirs.experts.unsqueeze(1)
        shared, k = same.sum((1, 2)), ours.experts.shape[1]
        w, v = (one.weights.to(torch.float64) for one in (ours, theirs))
        kept = torch.minimum(w.unsqueeze(2), v.unsqueeze(1)).where(same, 0.0)
        moved = ((w - kept.sum(2)).sum(1) + (v - kept.sum(1)).sum(1)) / 2
        parts = (torch.ones_like(cosine), cosine, error, shared / k, shared < k, moved)
        self.sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def add_states(self, ours: Tensor, theirs: Tensor) -> None:
        """Take the memories [P, ...] of one batch of both models."""
        a, b = (states.flatten(1).to(torch.float64) for states in (ours, theirs))
        self.states += torch.stack((a.square().sum(1), (b - a).square().sum(1)))

    def scores(self) -> LayerScores:
        """The means so far."""
        tokens, *totals = self.sums.tolist()
        cosine, error, shared, flips, moved = (total / tokens for total in totals)
        signal, squared_error = self.states.tolist()
        drift = tuple(math.sqrt(e / s) if s else 0.0 for s, e in zip(signal, squared_error, strict=True))
        return LayerScores(
            hidden_cosine=cosine,
            hidden_error=error,
            router_overlap=shared,
            router_flips=flips,
            router_mass_moved=moved,
            state_drift=drift if any(signal) else (),
        )


def layer_metrics(layers: Iterable[LayerScores], where: str) -> Iterator[Metric]:
    """Every number of every layer."""
    for n, one in enumerate(layers):
        yield exact("hidden_cosine", where, one.hidden_cosine, better="high", layer=n)
        yield exact("hidden_error", where, one.hidden_error, layer=n)
        yield exact("router_overlap", where, one.router_overlap, "fraction", better="high", layer=n)
        yield exact("router_flips", where, one.router_flips, "fraction", layer=n)
        yield exact("router_mass_moved", where, one.router_mass_moved, "fraction", layer=n)
        if one.state_drift:
            yield exact("state_drift", where, one.state_drift[-1], layer=n)


def drift_curve(layers: Iterable[LayerScores], where: str) -> Curve | None:
    """How DeltaNet states drift over a window, in the mean of all layers that have one; ``None`` without any."""
    drifts = [one.state_drift for one in layers if one.state_drift]
    if not drifts:
        return None
    means = [sum(values) / len(drifts) for values in zip(*drifts, strict=True)]
    return Curve(
        name="state_drift",
        where=where,
        x_label="share of the window, %",
        y_label="relative error of DeltaNet states",
        points=tuple((100 * mark / MARKS, mean) for mark, mean in enumerate(means, start=1)),
    )
