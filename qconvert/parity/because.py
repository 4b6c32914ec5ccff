"""The smallest statement of why a report says what it says: one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qconvert.core.metric import Metric, Verdict
from qconvert.parity.causes import Cause, Severity
from qconvert.parity.limits import JUDGED, Limit


def because(causes: Sequence[Cause], metrics: Sequence[Metric], unjudged: Sequence[Limit] = ()) -> str:
    """One sentence: the first fault, else the limit that is exceeded furthest, else the one that is nearest.

    A fault goes first, since it explains numbers and no number explains it.
    """
    errors = [one for one in causes if one.severity is Severity.ERROR]
    if errors:
        first = errors[0]
        return f"{first.kind.value.replace('_', ' ').capitalize()}: {first}{_more(len(errors) - 1, 'fault')}."
    limited = decisive(one for one in metrics if one.limit is not None)
    failed = [one for one in limited if one.verdict is Verdict.FAIL]
    if failed:
        worst = max(failed, key=_use)
        return f"{_measured(worst)}, beyond the limit of {_bound(worst)}{_more(len(failed) - 1, 'exceeded limit')}."
    lost = [one for one in metrics if math.isnan(one.value)]
    if lost:
        return f"{lost[0].name} of {lost[0].place} is not a number{_more(len(lost) - 1, 'such number')}."
    open_ = [one for one in limited if one.verdict is Verdict.AMBIGUOUS]
    if open_:
        worst = max(open_, key=_use)
        return (
            f"{_measured(worst)}, and the limit of {_bound(worst)} lies inside the interval: more tokens decide"
            f"{_more(len(open_) - 1, 'undecided limit')}."
        )
    missing = [one for one in unjudged if JUDGED[one.metric].of_model]
    if missing:
        return (
            f"The limit {missing[0]} of {missing[0].place} judged nothing, for the report has no such number"
            f"{_more(len(missing) - 1, 'such limit')}."
        )
    if not limited:
        return "No fault was found, and no limit judges the numbers."
    nearest = max(limited, key=_use)
    hold = f"all {len(limited)} limits hold" if len(limited) > 1 else "the limit holds"
    return f"No fault was found and {hold}; nearest to its limit, {_bound(nearest)}, {_measured(nearest)}."


def decisive(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Of a number that is limited in every layer the worst layer alone; the others as they are."""
    groups: dict[tuple[str, str, float | None, bool], list[Metric]] = {}
    for i, one in enumerate(metrics):
        alone = f"{one.where} {i}" if one.layer is None else one.where
        groups.setdefault((one.name, alone, one.limit, one.layer is None), []).append(one)
    rank = {Verdict.PASS: 0, Verdict.AMBIGUOUS: 1, Verdict.FAIL: 2}
    return tuple(max(group, key=lambda one: (rank[one.verdict], _use(one))) for group in groups.values())


def number(value: float) -> str:
    """A number for people, four digits and no more than that."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4g}" if abs(value) < 1 or abs(value) >= 1000 else f"{value:.4f}".rstrip("0").rstrip(".")


_UNSAID = ("fraction", "count")
"""Units that numbers are told without: the first is per cent then."""


def interval(metric: Metric) -> str:
    """The value with its unit, and the interval of one that is not exact."""
    value = f"{_figure(metric, metric.value)} {'' if metric.unit in _UNSAID else metric.unit}".strip()
    if metric.low == metric.high:
        return value
    return f"{value} [{_figure(metric, metric.low)}, {_figure(metric, metric.high)}]"


def _figure(metric: Metric, value: float) -> str:
    """A number without its unit; shares are per cent, and nearly all is not all."""
    if metric.unit != "fraction":
        return number(value)
    digits = 4 if value == 1 or f"{100 * value:.4g}" != "100" else 7
    return f"{100 * value:.{digits}g}%"


def bound(metric: Metric) -> str:
    """Its limit in words; empty without one."""
    return "" if metric.limit is None else _bound(metric)


def _bound(metric: Metric) -> str:
    return f"{'at most' if metric.better == 'low' else 'at least'} {_figure(metric, float(metric.limit or 0))}"


def _measured(metric: Metric) -> str:
    return f"{metric.name} of {metric.place} is {interval(metric)}"


def _use(metric: Metric) -> float:
    """How much of what a limit allows is used: above 1 it is exceeded; NaN uses more than there is."""
    value, limit, known = metric.value, float(metric.limit or 0), JUDGED.get(metric.name)
    if math.isnan(value):
        return math.inf
    if metric.unit == "dB":  # how much noise there is of what is allowed
        return math.pow(10, (limit - value) / 10)
    if known is None or known.ideal is None:
        used, allowed = (value, limit) if metric.better == "low" else (limit, value)
    else:
        used, allowed = abs(value - known.ideal), abs(limit - known.ideal)
    return used / allowed if allowed > 0 else math.inf if used > 0 else 1.0


def _more(count: int, what: str) -> str:
    return "" if count == 0 else f" (and {count} more {what}{'s' if count > 1 else ''})"
