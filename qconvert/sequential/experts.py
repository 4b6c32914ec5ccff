"""The experts of a layer, routed and shared: several are rounded at once, each on one thread.

What they give is added up in the order of their numbers: the bits depend on no thread.

Shapes: N tokens, R of an expert's own, D hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.core.plan import Rescale
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.numerics.awq import rescaled
from qconvert.numerics.hessian import Moments, no_moments
from qconvert.numerics.threads import in_order
from qconvert.sequential.mlp import MlpInputs, Name, Shown, inner, round_mlp
from qconvert.sequential.places import LayerSteps, MlpSteps
from qconvert.sequential.shop import Shop, evenly, put_weight
from qconvert.weights.rows import RowStore
from reference_model.layer import DecoderLayer
from reference_model.moe import SharedExpert, Visits, dispatch

LAYER_TOKENS = 4
"""Tokens of the layer, as multiples of D, that experts of few tokens lean on; evenly over all of them."""

ROWS = 4096
"""Rows of an expert's inputs that are in float32 at once."""

_EXPERT_KINDS: dict[Name, Kind] = {"gate": Kind.EXPERT_GATE, "up": Kind.EXPERT_UP, "down": Kind.EXPERT_DOWN}


class Experts:
    """Those of one layer, and what reaches them.

    Attributes:
        inputs: [N, D], of all of them.
        visits: which tokens go to which, and what their outputs count.
        counts: tokens of each.
        columns: [D], what columns of gate and up are multiplied by, because their inputs are divided by it; ``None``
            where they are not.
    """

    def __init__(
        self,
        shop: Shop,
        layer: DecoderLayer,
        place: tuple[Section, int],
        steps: LayerSteps,
        inputs: RowStore,
        visits: Visits,
    ) -> None:
        """``place`` is the section and the number of the layer."""
        self.shop, self.layer, self.steps, self.inputs = shop, layer, steps, inputs
        self._section, self._number = place
        self._moments: Moments | None = None
        self.columns: Tensor | None = None
        self.send(visits)

    def send(self, visits: Visits) -> None:
        """Let the tokens go elsewhere."""
        self.visits = visits
        where = dispatch(visits.experts, self.shop.weights.config.text.stored_experts)
        self.counts, self._token, self._slot = where.counts, where.token, where.slot
        self._ends: list[int] = torch.tensor(where.counts).cumsum(0).tolist()

    @property
    def total(self) -> int:
        """N."""
        return len(self.visits.experts)

    def moments(self) -> Moments:
        """Of what the layer's tokens bring, or of an even sample of them; one thread asks first."""
        if self._moments is None:
            found = no_moments(self.shop.weights.config.text.hidden_size)
            for at in torch.split(evenly(self.total, LAYER_TOKENS * found.inputs), ROWS):
                found = found.add(self.inputs.gather(at))
            self._moments = found
        return self._moments

    def visitors(self, e: int) -> tuple[Tensor, Tensor]:
        """The tokens of a routed expert, int64 [R] ascending, and what its outputs count for them [R]."""
        begin, end = self._ends[e] - self.counts[e], self._ends[e]
        at, slot = self._token[begin:end], self._slot[begin:end]
        return at, self.visits.weights[at, slot]

    def original(self, e: int, name: Name) -> Tensor:
        """A routed expert's matrix as it is in the source, float32."""
        role = TensorRole(section=self._section, kind=_EXPERT_KINDS[name], layer=self._number, expert=e)
        return self.shop.weights.matrix(role)

    def share(self, rows: Tensor) -> Tensor:
        """What the shared expert's outputs count for inputs [R, D], [R]."""
        return torch.sigmoid(self.layer.mlp.shared_expert_gate(rows.to(torch.float32))).flatten()

    def round_routed(self, sums: RowStore | None) -> None:
        """Round the routed experts, and add what they give, times its weight, to ``sums`` [N, D]."""
        steps, width = self.steps.experts, self.shop.weights.config.text.moe_intermediate_size
        layer = self.moments() if steps else None
        sample = self.inputs.gather(evenly(self.total, width)) if steps else None

        def expert(e: int) -> Shown:
            at, weights = self.visitors(e)
            counts = _with_mean_square_one(weights)

            def runs() -> Iterator[tuple[Tensor, Tensor]]:
                cut = zip(torch.split(at, ROWS), torch.split(counts, ROWS), strict=True)
                return ((self.inputs.gather(some), count) for some, count in cut if len(some))

            reads = MlpInputs(
                width=self.shop.weights.config.text.hidden_size, runs=runs, layer=layer, sample=sample,
                columns=self.columns,
            )  # fmt: skip
            return round_mlp(
                steps.get(e) or MlpSteps(), lambda name: self.original(e, name), reads, self.shop.rounder,
                self.shop.calibration, unrounded=lambda name: self._unrounded(e, name),
            )  # fmt: skip

        reached = [e for e, count in enumerate(self.counts) if count or e in steps]
        for e, shown in zip(reached, in_order(self.shop.pool, expert, reached, self.shop.jobs), strict=True):
            if sums is not None:
                self._pass_on(shown, *self.visitors(e), sums)

    def round_shared(self) -> None:
        """Round the shared expert, which every token visits."""
        shared = self.layer.mlp.shared_expert
        if shared is None or not self.steps.shared:
            return
        linears = linears_of(shared)

        def chunks() -> Iterator[Tensor]:
            return (self.inputs.rows(begin, min(begin + ROWS, self.total)) for begin in range(0, self.total, ROWS))

        size = torch.stack([self.share(rows).square().sum() for rows in chunks()]).sum() / self.total

        def runs() -> Iterator[tuple[Tensor, Tensor]]:
            return ((rows, self.share(rows) / size.sqrt()) for rows in chunks())

        reads = MlpInputs(width=shared.gate_proj.in_features, runs=runs, columns=self.columns)
        shown = round_mlp(
            self.steps.shared, lambda name: linears[name].weight.detach(), reads, self.shop.rounder,
            self.shop.calibration,
        )  # fmt: skip
        for name, linear in linears.items():
            put_weight(linear, getattr(shown.weights, name))

    def _unrounded(self, e: int, name: Name) -> Tensor:
        """A matrix that keeps its bits, as layers behind see it: behind a divided norm it is rounded anew."""
        w = self.original(e, name)
        kept = next((step.action for step in self.steps.kept(*EXPERT_KINDS)), None)
        if self.columns is None or name == "down" or not isinstance(kept, Rescale):
            return w
        return rescaled(w, kept.dtype.torch_dtype, columns=self.columns)[1]

    def _pass_on(self, shown: Shown, at: Tensor, weights: Tensor, sums: RowStore) -> None:
        """Add what an expert gives its tokens ``at`` [R], times ``weights`` [R], ``ROWS`` of them at a time."""
        expert = shown.weights

        def given(begin: int) -> Tensor:
            between = shown.inner
            if between is None:
                between = inner(self.inputs.gather(at[begin : begin + ROWS]), expert.gate, expert.up)
            return (between @ expert.down.T).mul_(weights[begin : begin + ROWS, None])

        starts = range(0, len(at), ROWS)
        for begin, rows in zip(starts, in_order(self.shop.pool, given, starts, self.shop.jobs), strict=True):
            sums.add(at[begin : begin + ROWS], rows)


def linears_of(shared: SharedExpert) -> dict[Name, torch.nn.Linear]:
    """The matrices of a shared expert."""
    return {"gate": shared.gate_proj, "up": shared.up_proj, "down": shared.down_proj}


def _with_mean_square_one(weights: Tensor) -> Tensor:
    return weights / weights.square().mean().sqrt().clamp(min=1e-30)
