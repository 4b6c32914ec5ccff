"""What a conversion may cost: bounds on numbers of a report, each with its reason.

A file of limits is TOML::

    [[limit]]
    metric = "kl_mean"            # a name from ``JUDGED``
    at_most = 0.003               # or at_least, where large values are good
    reason = "twice what was measured with ..."
    scheme = "int4-g128-*"        # optional: only if the converted checkpoint has tensors of such a scheme
    where = "as served, domain *" # optional: other places than the usual one of the metric
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomlkit
from tomlkit.exceptions import TOMLKitError

from qconvert.core.errors import UsageError
from qconvert.core.metric import Metric
from qconvert.io.strict_table import Types, check_table

SHIPPED = Path(__file__).with_name("parity.toml")
"""Limits by scheme that come along."""

DEFAULT = "default"
"""What users call the shipped limits; a file of that name is ``./default``."""

_SERVED = "as served"
_CALLER = "given by the caller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a limit on a metric means.

    Attributes:
        better: whether the limit is a maximum or a minimum.
        where: the places that a limit speaks of unless it names others, a glob.
        ideal: what a conversion without loss has; ``None`` where it depends on the model.
        of_model: whether the models have to run for it.
    """

    better: Literal["low", "high"] = "low"
    where: str = _SERVED
    ideal: float | None = 0.0
    of_model: bool = True


JUDGED: Mapping[str, Judged] = {
    "kl_mean": Judged(),
    "kl_median": Judged(),
    "kl_p90": Judged(),
    "kl_p99": Judged(),
    "kl_p999": Judged(),
    "kl_max": Judged(),
    **{f"kl_reverse_{part}": Judged() for part in ("mean", "median", "p90", "p99", "p999", "max")},
    "kl_truncation": Judged(),
    "kl_truncation_max": Judged(),
    "top1_agreement": Judged(better="high", ideal=1.0),
    "top5_agreement": Judged(better="high", ideal=1.0),
    "delta_p_mean": Judged(better="high"),
    "delta_p_rms": Judged(),
    "perplexity_original": Judged(ideal=None),
    "perplexity_converted": Judged(ideal=None),
    "perplexity_ratio": Judged(ideal=1.0),
    "draft_acceptance_original": Judged(better="high", ideal=None),
    "draft_acceptance_converted": Judged(better="high", ideal=None),
    "draft_acceptance_lost": Judged(),
    "greedy_common_mean": Judged(better="high", ideal=None),
    "greedy_common_median": Judged(better="high", ideal=None),
    "greedy_never_parted": Judged(better="high", ideal=1.0),
    "router_overlap": Judged(better="high", ideal=1.0),
    "router_flips": Judged(),
    "router_mass_moved": Judged(),
    "hidden_cosine": Judged(better="high", ideal=1.0),
    "hidden_error": Judged(),
    "kl_lens": Judged(),
    "state_drift": Judged(),
    "execution_error": Judged(),
    "sqnr": Judged(better="high", where="all quantized tensors", ideal=None, of_model=False),
    "sqnr_min": Judged(better="high", where="*", ideal=None, of_model=False),
    "cosine_min": Judged(better="high", where="*", ideal=1.0, of_model=False),
    "bits_per_weight": Judged(where="all tensors", ideal=None, of_model=False),
    "zero_codes": Judged(where="*", ideal=None, of_model=False),
    "clipped_codes": Judged(where="*", ideal=None, of_model=False),
    "zero_codes_max": Judged(where="*", ideal=None, of_model=False),
    "clipped_codes_max": Judged(where="*", ideal=None, of_model=False),
    "dead_scales": Judged(where="*", of_model=False),
}
"""Every number that a report can hold and a limit can bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A bound on one metric.

    Attributes:
        metric: a name from ``JUDGED``.
        bound: the largest value, or the smallest where large values are good; for every layer where there are several.
        reason: why it is this number.
        where: places of the metric, a glob; ``None`` is the usual one.
        scheme: glob over the schemes of the converted checkpoint; ``None`` holds for all.

    Raises:
        UsageError: an unknown metric, or a bound that is negative, NaN or infinite: nothing could be judged by it.
    """

    metric: str
    bound: float
    reason: str
    where: str | None = None
    scheme: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in JUDGED:
            raise UsageError(f"the metric {self.metric!r} is unknown; expected one of {', '.join(JUDGED)}")
        if not math.isfinite(self.bound) or self.bound < 0:
            raise UsageError(f"the limit {self.metric} is {self.bound:g}; it must be a finite number, not below 0")

    @property
    def place(self) -> str:
        """The places that it speaks of, a glob."""
        return JUDGED[self.metric].where if self.where is None else self.where

    def speaks_of(self, metric: Metric) -> bool:
        """Whether it bounds this number."""
        return metric.name == self.metric and fnmatch.fnmatchcase(metric.where, self.place)

    def __str__(self) -> str:
        return f"{self.metric} {'at most' if JUDGED[self.metric].better == 'low' else 'at least'} {self.bound:g}"


def bounds(reason: str = _CALLER, **by_metric: float | None) -> tuple[Limit, ...]:
    """Limits by the names of their metrics, for example ``bounds(kl_mean=0.003, top1_agreement=0.97)``."""
    return tuple(
        Limit(metric=name, bound=float(bound), reason=reason) for name, bound in by_metric.items() if bound is not None
    )


def named_limits(limits: str | Path | Mapping[str, float] | Sequence[Limit] | None) -> tuple[Limit, ...]:
    """Limits as a user gives them: a file, ``default`` for those that come along, bounds by metric, or themselves.

    ``None`` is none: a file that nobody named changes no verdict.

    Raises:
        UsageError: see ``read_limits`` and ``Limit``.
    """
    if limits is None:
        return ()
    if isinstance(limits, (str, Path)):
        return read_limits(SHIPPED if limits == DEFAULT else Path(limits))
    if isinstance(limits, Mapping):
        return tuple(Limit(metric=name, bound=float(bound), reason=_CALLER) for name, bound in limits.items())
    return tuple(limits)


def of_model(limits: Iterable[Limit]) -> tuple[str, ...]:
    """Names of the metrics that only a run of the models gives."""
    return tuple(dict.fromkeys(one.metric for one in limits if JUDGED[one.metric].of_model))


def in_force(limits: Sequence[Limit], schemes: Collection[str]) -> tuple[Limit, ...]:
    """Those that hold for a checkpoint with tensors of ``schemes``, at most one for a metric and its places.

    A limit on a scheme goes before one on all. Of several schemes in one checkpoint the loosest limit holds: the
    coarsest rounding is what the number has to allow for.
    """
    groups: dict[tuple[str, str], list[Limit]] = {}
    for one in limits:
        if one.scheme is None or any(fnmatch.fnmatchcase(scheme, one.scheme) for scheme in schemes):
            groups.setdefault((one.metric, one.place), []).append(one)
    out = []
    for (metric, _), members in groups.items():
        special = [one for one in members if one.scheme is not None] or members
        loosest = max if JUDGED[metric].better == "low" else min
        out.append(loosest(special, key=lambda one: one.bound))
    return tuple(out)


def overridden(limits: Sequence[Limit], by: Sequence[Limit]) -> tuple[Limit, ...]:
    """``limits`` without those on a metric and place that ``by`` bounds as well, then ``by``."""
    settled = {(one.metric, one.place) for one in by}
    return (*(one for one in limits if (one.metric, one.place) not in settled), *by)


def judged(metrics: Iterable[Metric], limits: Sequence[Limit]) -> tuple[tuple[Metric, ...], tuple[Limit, ...]]:
    """The numbers with their limits, and the limits that bound none of them.

    Where two limits speak of one number, the stricter holds.
    """
    out, used = [], set()
    for metric in metrics:
        speaking = [one for one in limits if one.speaks_of(metric)]
        used.update(speaking)
        if speaking:
            strictest = (min if metric.better == "low" else max)(speaking, key=lambda one: one.bound)
            metric = replace(metric, limit=strictest.bound, reason=strictest.reason)
        out.append(metric)
    return tuple(out), tuple(one for one in limits if one not in used)


def read_limits(path: Path) -> tuple[Limit, ...]:
    """Limits of a file, see above.

    Raises:
        UsageError: the file cannot be read, or a limit is malformed; the message counts it.
    """
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except OSError as error:
        raise UsageError(f"cannot read limits {path}: {error.strerror}") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise UsageError(f"limits {path} are not TOML: {error}") from error
    if set(document) - {"limit"}:
        raise UsageError(f"limits {path} must hold [[limit]] tables and nothing else; found {sorted(document)}")
    entries = document.get("limit")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"limits {path} hold no [[limit]] table: nothing would be judged")
    read = [_limit(entry, f"limits {path}, limit {i}") for i, entry in enumerate(entries, start=1)]
    seen: set[tuple[str, str, str | None]] = set()
    for i, one in enumerate(read, start=1):
        key = (one.metric, one.place, one.scheme)
        if key in seen:
            raise UsageError(f"limits {path}, limit {i}: {one.metric} of {one.place!r} is bounded twice")
        seen.add(key)
    return tuple(read)


_TYPES: Types = {
    "metric": (str,),
    "at_most": (int, float),
    "at_least": (int, float),
    "reason": (str,),
    "where": (str,),
    "scheme": (str,),
}


def _limit(entry: Any, where: str) -> Limit:
    check_table(entry, _TYPES, where)
    for key in ("metric", "reason"):
        if not entry.get(key, "").strip():
            raise UsageError(f"{where}: no {key!r}")
    metric = entry["metric"]
    if metric in JUDGED:
        bound, other = ("at_most", "at_least") if JUDGED[metric].better == "low" else ("at_least", "at_most")
        if bound not in entry or other in entry:
            raise UsageError(f"{where}: {metric} takes {bound!r} and not {other!r}")
    else:
        bound = "at_most"
    try:
        return Limit(
            metric=metric,
            bound=float(entry.get(bound, 0)),
            reason=entry["reason"],
            where=entry.get("where"),
            scheme=entry.get("scheme"),
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
