"""The numbers, curves and expert statistics of two models that were run over the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from qconvert.core.metric import Metric, exact
from qconvert.core.role import EXPERT_KINDS, Section
from qconvert.numerics.error import ErrorSums
from qconvert.parity.drafts import draft_metrics
from qconvert.parity.layers import drift_curve, layer_metrics
from qconvert.parity.model import Comparison, ModelComparison
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.summary import TokenPlaces, percentile_curve, summarize, summarize_parts
from qconvert.parity.tensors import TensorComparison

FORCED = "teacher-forced"


def model_metrics(found: Comparison, places: TokenPlaces, seed: int) -> Iterator[Metric]:
    """Both ways of running the converted model."""
    plain = tuple(_of_scores(found.plain, places, seed))
    yield from plain
    yield from _of_layers(found.plain)
    if found.served.scores is found.plain.scores:
        for one in plain:
            yield replace(one, where=one.where.replace(found.plain.mode, found.served.mode, 1))
    else:
        yield from _of_scores(found.served, places, seed)
    yield from _of_layers(found.served)


def _of_scores(model: ModelComparison, places: TokenPlaces, seed: int) -> Iterator[Metric]:
    yield from summarize(model.scores, model.mode, seed)
    yield from summarize_parts(model.scores, model.mode, places, seed)
    if model.drafts is not None:
        yield from draft_metrics(model.drafts, model.mode, seed)


def _of_layers(model: ModelComparison) -> Iterator[Metric]:
    for n, kl in enumerate(model.lens):
        yield exact("kl_lens", model.mode, kl, "nats", layer=n)
    yield from layer_metrics(model.layers, model.mode)
    yield from layer_metrics(model.forced, f"{model.mode}, {FORCED}")


def model_curves(found: Comparison) -> Iterator[Curve]:
    """Percentiles of KL, and the drift of DeltaNet states; once where both ways are the same run."""
    same = found.served.scores is found.plain.scores
    for model in (found.served,) if same else (found.plain, found.served):
        yield percentile_curve(model.scores, model.mode)
        for layers, where in ((model.layers, model.mode), (model.forced, f"{model.mode}, {FORCED}")):
            curve = drift_curve(layers, where)
            if curve is not None:
                yield curve


def expert_use(visits: Tensor, tensors: Iterable[TensorComparison]) -> tuple[ExpertUse, ...]:
    """How many tokens visited each routed expert of the original, beside the error of its three matrices together."""
    sums: dict[tuple[int, int], ErrorSums] = {}
    for one in tensors:
        role = one.role
        if role.section is not Section.TEXT or role.kind not in EXPERT_KINDS:
            continue
        if role.layer is not None and role.expert is not None:
            place = role.layer, role.expert
            sums[place] = sums.get(place, ErrorSums()) + one.sums
    return tuple(
        ExpertUse(layer=layer, expert=expert, tokens=tokens, sqnr_db=sums.get((layer, expert), ErrorSums()).sqnr_db)
        for layer, row in enumerate(visits.tolist())
        for expert, tokens in enumerate(row)
    )
