"""What became better or worse between two reports of ``parity.json``, and which of it is no chance."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.core.errors import SourceError, UsageError
from qconvert.core.metric import Metric, Verdict
from qconvert.io.strict_json import parse_object
from qconvert.parity.because import interval
from qconvert.parity.limits import JUDGED
from qconvert.parity.outputs.document import SCHEMA

EXACT_SHARE = 1e-4
"""Part by which a number of the weights may move without having changed: it is a sum in float32."""

_RANK = {Verdict.PASS: 0, Verdict.AMBIGUOUS: 1, Verdict.FAIL: 2}


Metrics = Mapping[tuple[str, str, int | None], Metric]
"""By name, place and layer."""


class Turn(enum.Enum):
    """What became of a number."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    UNDECIDED = "undecided"
    """A number of the models without an interval: how far it moves by chance is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What two reports are compared by.

    Attributes:
        tokens: positions that were scored.
        text: what they were of.
        faults: kind and place of every cause that fails a report, with its evidence.
    """

    verdict: Verdict
    tokens: int
    text: str
    faults: Mapping[tuple[str, str], str]
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One number in both reports."""

    turn: Turn
    old: Metric
    new: Metric

    def __str__(self) -> str:
        return f"{self.new.name} of {self.new.place}: {interval(self.old)}, now {interval(self.new)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two reports beside each other.

    Attributes:
        regressions: what fails a comparison, a sentence each.
        changes: every number that both have.
        gained: names of faults that are gone.
    """

    regressions: tuple[str, ...]
    changes: tuple[Change, ...]
    gained: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same with stable keys."""
        return {
            "schema": "qconvert-parity-diff/1",
            "regressions": list(self.regressions),
            "gone_faults": list(self.gained),
            "changes": [
                {
                    "name": one.new.name,
                    "where": one.new.where,
                    "layer": one.new.layer,
                    "turn": one.turn.value,
                    "old": _plain(one.old.value),
                    "new": _plain(one.new.value),
                }
                for one in self.changes
            ],
        }


def difference(old: Recorded, new: Recorded) -> Difference:
    """Compare two reports on the same tokens.

    A number of the models is worse when the intervals do not meet; one of the weights, which is exact, when it moved
    by more than ``EXACT_SHARE``; one that has no interval is told and not judged. Besides, a limit that was kept and is
    not any more, a limit's number that is gone, and a new fault are regressions.

    Raises:
        UsageError: they were not measured on the same tokens.
    """
    if (old.text, old.tokens) != (new.text, new.tokens):
        raise UsageError(
            f"the reports are of different tokens, {old.tokens} of {old.text!r} and {new.tokens} of {new.text!r}: "
            "their numbers cannot be compared; run both on the same text"
        )
    pairs, gone = _paired(old.metrics, new.metrics)
    changes = tuple(Change(turn=_turn(was, now), old=was, new=now) for was, now in pairs)
    regressions = [f"new fault: {said}" for key, said in new.faults.items() if key not in old.faults]
    for one in changes:
        if _RANK[one.new.verdict] > _RANK[one.old.verdict] and one.new.limit is not None:
            regressions.append(f"{one.new.verdict.value} where it was {one.old.verdict.value}: {one}")
        elif one.turn is Turn.WORSE:
            regressions.append(f"worse: {one}")
    regressions += [f"not measured any more: {was.name} of {was.place}" for was in gone if was.limit is not None]
    if _RANK[new.verdict] > _RANK[old.verdict] and not regressions:
        regressions.append(f"the verdict is {new.verdict.value} where it was {old.verdict.value}")
    gained = tuple(said for key, said in old.faults.items() if key not in new.faults)
    return Difference(regressions=tuple(regressions), changes=changes, gained=gained)


def _paired(old: Metrics, new: Metrics) -> tuple[list[tuple[Metric, Metric]], list[Metric]]:
    """The same number in both, and what only the old report has.

    A number that each report has once is the same wherever it stands: the worst tensor may have changed.
    """
    lost = [one for key, one in old.items() if key not in new]
    found = [one for key, one in new.items() if key not in old]
    moved = {
        one.name: theirs[0]
        for one in lost
        if sum(one.name == other.name for other in old.values()) == 1
        and len(theirs := [other for other in new.values() if other.name == one.name]) == 1
        and theirs[0] in found
    }
    pairs = [(one, new[key]) for key, one in old.items() if key in new]
    pairs += [(one, moved[one.name]) for one in lost if one.name in moved]
    return pairs, [one for one in lost if one.name not in moved]


def _turn(old: Metric, new: Metric) -> Turn:
    was, now = _badness(old), _badness(new)
    if was[1] == now[1]:
        return Turn.SAME
    exact = was[0] == was[2] and now[0] == now[2] and all(map(math.isfinite, (*was, *now)))
    known = JUDGED.get(new.name)
    if exact and (known is None or known.of_model):
        return Turn.UNDECIDED
    if exact and math.isclose(old.value, new.value, rel_tol=EXACT_SHARE):
        return Turn.SAME
    return Turn.WORSE if now[0] > was[2] else Turn.BETTER if now[2] < was[0] else Turn.SAME


def _badness(metric: Metric) -> tuple[float, float, float]:
    """Low end, value and high end, the larger the worse; NaN is the worst there is."""
    sign = 1.0 if metric.better == "low" else -1.0
    value = math.inf if math.isnan(metric.value) else sign * metric.value
    ends = [value if math.isnan(end) else sign * end for end in (metric.low, metric.high)]
    return min(ends), value, max(ends)


def read_report(path: Path) -> Recorded:
    """What a ``parity.json`` says.

    Raises:
        UsageError: the file cannot be read.
        SourceError: it is no report, or one of another version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the report {path}: {error.strerror}") from error
    document = parse_object(raw, str(path))
    if document.get("schema") != SCHEMA:
        raise SourceError(
            f"{path} is a report of the schema {document.get('schema')!r}, expected {SCHEMA}: make it anew with "
            "`qconvert parity --report`"
        )
    try:
        return Recorded(
            verdict=Verdict(document["verdict"]),
            tokens=int(document["tokens"]),
            text=str(document["text"]),
            faults={
                (one["kind"], one["where"]): f"{one['kind']} in {one['where']}: {one['evidence']}"
                for one in document["causes"]
                if one["severity"] == "error"
            },
            metrics={(one["name"], one["where"], one["layer"]): _metric(one) for one in document["metrics"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} is no report of the schema {SCHEMA}: {type(error).__name__} {error}") from error


def _metric(one: Mapping[str, Any]) -> Metric:
    return Metric(
        name=str(one["name"]),
        where=str(one["where"]),
        layer=None if one["layer"] is None else int(one["layer"]),
        value=_number(one["value"]),
        low=_number(one["low"]),
        high=_number(one["high"]),
        unit=str(one["unit"]),
        limit=None if one["limit"] is None else _number(one["limit"]),
        reason=str(one["reason"]),
        better="high" if one["better"] == "high" else "low",
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _plain(value: float) -> float | str | None:
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)
