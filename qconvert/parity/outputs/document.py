"""The report as JSON with stable keys, as ``parity.schema.json`` beside this file describes it."""

from __future__ import annotations

import math
from typing import Any

from qconvert import __version__
from qconvert.core.metric import Metric
from qconvert.parity.attribution import Attribution, Worth
from qconvert.parity.causes import Cause
from qconvert.parity.limits import Limit
from qconvert.parity.report import ParityReport
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.tensors import RoleSummary, TensorComparison

SCHEMA = "qconvert-parity/2"


def as_document(report: ParityReport) -> dict[str, Any]:
    """The record with stable keys; numbers that JSON lacks are ``null`` (NaN) or strings (``inf``)."""
    return {
        "schema": SCHEMA,
        "qconvert": __version__,
        "verdict": report.verdict.value,
        "because": report.because,
        "original": report.original,
        "converted": report.converted,
        "bytes": {"original": report.bytes_original, "converted": report.bytes_converted},
        "text": report.text,
        "tokens": report.tokens,
        "notes": list(report.notes),
        "causes": [_cause(one) for one in report.causes],
        "metrics": [_metric(one) for one in report.metrics],
        "unjudged_limits": [_limit(one) for one in report.unjudged],
        "roles": [_role(one) for one in report.roles],
        "identical_tensors": report.identical,
        "tensors": [_tensor(one) for one in report.tensors],
        "curves": [_curve(one) for one in report.curves],
        "experts": [_expert(one) for one in report.experts],
        "attribution": None if report.attribution is None else _attribution(report.attribution),
    }


def _cause(one: Cause) -> dict[str, Any]:
    return {
        "kind": one.kind.value,
        "severity": one.severity.value,
        "where": one.where,
        "evidence": one.evidence,
        "tensors": list(one.tensors),
    }


def _metric(one: Metric) -> dict[str, Any]:
    return {
        "name": one.name,
        "where": one.where,
        "layer": one.layer,
        "value": _json(one.value),
        "low": _json(one.low),
        "high": _json(one.high),
        "unit": one.unit,
        "limit": None if one.limit is None else _json(one.limit),
        "reason": one.reason,
        "better": one.better,
        "verdict": one.verdict.value,
    }


def _limit(one: Limit) -> dict[str, Any]:
    return {"metric": one.metric, "where": one.place, "limit": one.bound, "reason": one.reason}


def _role(one: RoleSummary) -> dict[str, Any]:
    return {
        "path": one.path,
        "scheme": one.scheme or None,
        "tensors": one.tensors,
        "elements": one.elements,
        "identical": one.identical,
        "sqnr_db": _json(one.sqnr_db),
        "worst_sqnr_db": _json(one.worst_db),
        "worst_tensor": one.worst_name,
        "cosine": _json(one.cosine),
        "max_error": _json(one.max_error),
    }


def _tensor(one: TensorComparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "role": one.role.path,
        "layer": one.role.layer,
        "expert": one.role.expert,
        "outcome": one.outcome.value,
        "scheme": None if one.scheme is None else str(one.scheme),
        "sqnr_db": _json(one.sums.sqnr_db),
        "cosine": _json(one.sums.cosine),
        "max_error": _json(one.sums.max_error),
        "halves": {half.role.part.value: {"sqnr_db": _json(half.sums.sqnr_db)} for half in one.halves},
    }


def _curve(one: Curve) -> dict[str, Any]:
    return {
        "name": one.name,
        "where": one.where,
        "x_label": one.x_label,
        "y_label": one.y_label,
        "points": [[_json(x), _json(y)] for x, y in one.points],
    }


def _expert(one: ExpertUse) -> dict[str, Any]:
    return {"layer": one.layer, "expert": one.expert, "tokens": one.tokens, "sqnr_db": _json(one.sqnr_db)}


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "kl": _json(found.kl),
        "groups": [_worth(one) for one in found.groups],
        "layers": [_worth(one) for one in found.layers],
        "left_out": [{"group": group, "layer": layer} for group, layer in found.left_out],
        "predicted_seconds": round(found.predicted, 3),
        "seconds": round(found.seconds, 3),
        "policy": found.policy,
        "advice": found.advice,
    }


def _worth(one: Worth) -> dict[str, Any]:
    return {
        "group": one.group,
        "layer": one.layer,
        "kl": _json(one.kl),
        "worth": _json(one.worth),
        "low": _json(one.low),
        "high": _json(one.high),
        "bytes": {"original": one.bytes_original, "converted": one.bytes_converted},
    }


def _json(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
