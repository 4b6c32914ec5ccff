"""The numbers, curves and expert statistics of two models that were run over the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from qconvert.core.metric import Metric
from qconvert.core.role import EXPERT_KINDS, Section
from qconvert.numerics.error import ErrorSums
from qconvert.parity.drafts import draft_metrics
from qconvert.parity.layers import drift_curve, layer_metrics
from qconvert.parity.model import Comparison
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.summary import TokenPlaces, percentile_curve, summarize, summarize_parts
from qconvert.parity.tensors import TensorComparison

FORCED = "teacher-forced"


def model_metrics(found: Comparison, places: TokenPlaces, seed: int) -> Iterator[Metric]:
    """Both ways of running the converted model."""
    for model in (found.plain, found.served):
        yield from summarize(model.scores, model.mode, seed)
        yield from summarize_parts(model.scores, model.mode, places, seed)
        if model.drafts is not None:
            yield from draft_metrics(model.drafts, model.mode, seed)
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
