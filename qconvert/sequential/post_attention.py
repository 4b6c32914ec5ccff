"""The norm before experts, divided by factors that all of them, the router and the shared expert's gate make up for.

One set of factors a layer serves every expert. The router keeps its bits and is rounded anew, so that some tokens go
elsewhere: they are counted, and where they are too many nothing is divided.

Shapes: N tokens, R of one expert, D hidden, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from qconvert.core.awq_fold import AwqFold
from qconvert.core.plan import Step
from qconvert.core.role import Kind
from qconvert.numerics.hessian import blended
from qconvert.numerics.threads import in_order
from qconvert.sequential.calibration import MOST_FLIPS
from qconvert.sequential.experts import Experts, linears_of
from qconvert.sequential.mlp import Name, inner
from qconvert.sequential.places import MlpSteps
from qconvert.sequential.rounder import to_nearest
from qconvert.sequential.scaling import NormScaling, as_kept, as_rounded, scale_norm, squared
from qconvert.sequential.shop import evenly, put_weight
from reference_model.moe import Visits

TRIED_EXPERTS = 16
"""Routed experts whose outputs decide, evenly over those that tokens reach."""

TRIED_ROWS = 256
"""Tokens of each, evenly over its own."""


def fold_before_experts(experts: Experts, inputs: Callable[[], Iterable[Tensor]]) -> None:
    """Divide the norm, tell ``experts`` by what, and write it with all that keeps its bits; nothing if none is to be.

    Args:
        experts: of the layer; tokens go by the router as it is written from then on, unless the layers behind shall see
            the original's.
        inputs: gives what they read again, float32 [n, D] each, in the order of ``experts.inputs``.
    """
    shop, steps, mlp = experts.shop, experts.steps, experts.layer.mlp
    norm = steps.norm(AwqFold.POST_ATTENTION)
    if norm is None:
        return
    weight = shop.weights.raw(norm.role)
    found = scale_norm(AwqFold.POST_ATTENTION, weight, experts.moments().mean_abs, _Trial(experts).losses)
    flips = _flips(experts, found.columns, inputs())
    found = _limited(found, weight, flips)
    shop.rounder.replace(norm, found.weight, found.folded)
    experts.columns = None if found.folded.given_up else found.columns
    for step in steps.kept(*AwqFold.POST_ATTENTION.parts.readers):
        _write(experts, step)
    if shop.calibration.propagate and not found.folded.given_up:
        visits = [mlp.visits(x, mlp.gate(x)) for x in inputs()]
        experts.send(
            Visits(
                experts=torch.cat([one.experts for one in visits]), weights=torch.cat([one.weights for one in visits])
            )
        )


def _flips(experts: Experts, columns: Tensor, inputs: Iterable[Tensor]) -> float:
    """Share of the router's choices that are others once it is rounded between these factors."""
    (step,) = experts.steps.kept(Kind.ROUTER)
    router = experts.layer.mlp.gate
    again = deepcopy(router)
    put_weight(again, as_kept(step, router.weight.detach(), columns))
    before, others, begin = experts.visits.experts[:, : router.top_k], 0, 0
    for x in inputs:
        now = again(x).experts
        same = (before[begin : begin + len(x), :, None] == now[:, None, :]).any(2)
        others += int((~same).sum())
        begin += len(x)
    return others / before.numel()


def _limited(found: NormScaling, weight: Tensor, flips: float) -> NormScaling:
    """What was found, or nothing where too many tokens would go elsewhere."""
    if flips <= MOST_FLIPS:
        return replace(found, folded=replace(found.folded, flips=flips))
    left = replace(found.folded, exponent=0.0, strength=0.0, loss=1.0, flips=flips, given_up=True)
    return NormScaling(weight=weight, columns=torch.ones_like(found.columns), folded=left)


def _write(experts: Experts, step: Step) -> None:
    """Write a matrix that keeps its bits, and let the layer have it."""
    mlp, kind = experts.layer.mlp, step.role.kind
    single: dict[Kind, nn.Module] = {Kind.ROUTER: mlp.gate, Kind.SHARED_EXPERT_GATE: mlp.shared_expert_gate}
    if mlp.shared_expert is not None:
        single |= {Kind.SHARED_GATE: mlp.shared_expert.gate_proj, Kind.SHARED_UP: mlp.shared_expert.up_proj}
    shown = experts.shop.calibration.propagate and kind in single
    meaning = experts.shop.rounder.rescale(step, columns=experts.columns, wanted=shown)
    if shown:
        put_weight(single[kind], meaning)


@dataclass(frozen=True, slots=True)
class _Tried:
    """One expert, routed or shared, whose outputs are looked at.

    Attributes:
        steps: of the whole of it.
        original: gives its matrices.
        rows: inputs [R, D].
        counts: what its outputs count for them [R], times the root of how many others each stands for.
    """

    steps: MlpSteps
    original: Callable[[Name], Tensor]
    rows: Tensor
    counts: Tensor


class _Trial:
    """Runs some experts with gate and up rounded between factors."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self._hessian = blended(experts.moments())
        reached = [e for e, steps in experts.steps.experts.items() if experts.counts[e] and (steps.gate or steps.up)]
        self._chosen = [sorted(reached)[n] for n in evenly(len(reached), TRIED_EXPERTS).tolist()]
        self._of_each = len(reached) / max(len(self._chosen), 1)

    def losses(self, tried: Sequence[Tensor]) -> list[float]:
        """Squared error of what these experts give, for each of several factors of their inputs."""
        shop = self._experts.shop

        def of_one(e: int | None) -> list[float]:
            one = self._shared() if e is None else self._routed(e)
            w: dict[Name, Tensor] = {name: one.original(name) for name in get_args(Name)}
            right = inner(one.rows, w["gate"], w["up"]) @ w["down"].T
            return [self._loss(one, w, right, columns) for columns in tried]

        steps = self._experts.steps.shared
        shared = [None] if self._experts.layer.mlp.shared_expert is not None and (steps.gate or steps.up) else []
        total = [0.0] * len(tried)
        for losses in in_order(shop.pool, of_one, [*self._chosen, *shared], shop.jobs):
            total = [a + b for a, b in zip(total, losses, strict=True)]
        return total

    def _loss(self, one: _Tried, w: dict[Name, Tensor], right: Tensor, columns: Tensor) -> float:
        def seen(name: Name) -> Tensor:
            step = getattr(one.steps, name)
            return w[name] if step is None else as_rounded(step, to_nearest(self._hessian, columns=columns), w[name])

        given = inner(one.rows, seen("gate"), seen("up")) @ w["down"].T
        return squared((given - right) * one.counts[:, None])

    def _routed(self, e: int) -> _Tried:
        at, counts = self._experts.visitors(e)
        some = evenly(len(at), TRIED_ROWS)
        stands = self._of_each * len(at) / len(some)
        return _Tried(
            steps=self._experts.steps.experts[e],
            original=lambda name: self._experts.original(e, name),
            rows=self._experts.inputs.gather(at[some]).to(torch.float32),
            counts=counts[some] * stands**0.5,
        )

    def _shared(self) -> _Tried:
        shared = self._experts.layer.mlp.shared_expert
        linears = {} if shared is None else linears_of(shared)
        some = evenly(self._experts.total, TRIED_ROWS)
        rows = self._experts.inputs.gather(some).to(torch.float32)
        return _Tried(
            steps=self._experts.steps.shared,
            original=lambda name: linears[name].weight.detach(),
            rows=rows,
            counts=self._experts.share(rows) * (self._experts.total / len(some)) ** 0.5,
        )
