"""What a report is divided into for people, the same in every output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconvert.core.metric import Metric, Verdict
from qconvert.parity.because import decisive
from qconvert.parity.report import ParityReport

MODES = ("weights only", "as served")
"""The ways in which the models are run, the one that limits judge last."""

HEADLINES = (
    "kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top5_agreement",
    "greedy_common_mean", "greedy_never_parted", "draft_acceptance_original", "draft_acceptance_converted",
    "perplexity_original", "perplexity_converted", "perplexity_ratio",
)  # fmt: skip
"""What most readers want to know of the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """One number of every layer, in each place that it was measured in.

    Attributes:
        name: of the metric.
        wheres: the places.
        layers: ascending.
        found: the numbers by place and layer; some may be missing.
    """

    name: str
    wheres: tuple[str, ...]
    layers: tuple[int, ...]
    found: dict[tuple[str, int], Metric]


def deciding(report: ParityReport) -> tuple[Metric, ...]:
    """The numbers that the verdict is made of: those with a limit, and those that fail without one.

    Of a number that every layer has, the worst layer.
    """
    return decisive(one for one in report.metrics if one.limit is not None or one.verdict is not Verdict.PASS)


def is_part(metric: Metric) -> bool:
    """Whether it is of some positions or of one domain only."""
    return any(metric.where.startswith(f"{mode}, ") for mode in MODES)


def whole(report: ParityReport) -> tuple[Metric, ...]:
    """The numbers of the whole model and of the weights."""
    return tuple(one for one in report.metrics if one.layer is None and not is_part(one))


def parts(report: ParityReport) -> dict[str, tuple[Metric, ...]]:
    """The numbers by what they are of, for example ``as served, positions 64-127``."""
    found = [one for one in report.metrics if one.layer is None and is_part(one)]
    return {where: tuple(one for one in found if one.where == where) for where in dict.fromkeys(m.where for m in found)}


def headlines(report: ParityReport) -> tuple[tuple[str, tuple[Metric | None, ...]], ...]:
    """The numbers that most readers want, by name, in each of ``MODES``."""
    found = {(one.name, one.where): one for one in whole(report)}
    rows = [(name, tuple(found.get((name, mode)) for mode in MODES)) for name in HEADLINES]
    return tuple((name, row) for name, row in rows if any(row))


def by_layer(report: ParityReport) -> tuple[LayerTable, ...]:
    """One table for each number that layers have."""
    found: dict[str, dict[tuple[str, int], Metric]] = {}
    for one in report.metrics:
        if one.layer is not None:
            found.setdefault(one.name, {})[one.where, one.layer] = one
    return tuple(
        LayerTable(
            name=name,
            wheres=tuple(dict.fromkeys(where for where, _ in members)),
            layers=tuple(sorted({layer for _, layer in members})),
            found=members,
        )
        for name, members in found.items()
    )


def words(name: str) -> str:
    """A metric's name as a heading has it."""
    return name.replace("_", " ").replace("kl ", "KL ").replace("sqnr", "SQNR")


def size(nbytes: int) -> str:
    """Bytes with two decimals."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.2f} MB"


def printable(text: str) -> str:
    """``text`` with control characters and lone surrogates written out: no file format takes them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def columns(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Names of the metrics in their order."""
    return tuple(dict.fromkeys(one.name for one in metrics))
