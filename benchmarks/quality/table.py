"""From scores to rows: divergence with intervals, what is recovered of rounding to nearest, and how peers compare.

Intervals are 95% percentile bootstraps over blocks of consecutive tokens, the same draws for every candidate, so that
shares and ratios are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert.parity.logits import Floats
from qconvert.parity.summary import Draws

USUAL = "awq"
"""The key of AWQ's default folds; those of other folds begin with it."""
NOT_LARGER = 1.005
"""How many times as many bytes count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, sampled: Floats) -> Interval:
        """From the number itself and from resamples of it."""
        low, high = np.percentile(sampled, (2.5, 97.5))
        return cls(value=value, low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate in one scheme.

    Attributes:
        measured: what it took and how large it is, see ``bench_quality.Measured``.
        kl: mean KL(original || output) in nats; ``None`` where it did not run, as are all others then.
        median: KL of the median position; in eight bits a few positions make up much of the mean.
        kl_experts: the same for its experts between the original's other tensors, where it changed some of them.
        perplexity: ratio of perplexities.
        recovered: share of the baseline's KL in the same scheme that is gone.
        to_ours: KL over that of the measure that is not larger; for peers only.
        to_usual: for ways of AWQ other than the usual one, KL over that of the usual one in the same scheme.
    """

    measured: Mapping[str, Any]
    kl: Interval | None = None
    median: float | None = None
    kl_experts: Interval | None = None
    perplexity: Interval | None = None
    recovered: Interval | None = None
    to_ours: Interval | None = None
    to_usual: Interval | None = None

    @property
    def lower_than_ours(self) -> bool:
        """Whether a peer is better, beyond the interval, than the measure at no more bytes."""
        return self.to_ours is not None and self.to_ours.high < 1


def rows(
    measured: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, str], Mapping[str, Floats]],
    baseline: str, measure: str,
) -> list[Row]:  # fmt: skip
    """One row a candidate and scheme, by scheme; ``scores`` by key and scheme, all of the same positions."""
    lengths = {len(one["kl"]) for one in scores.values()}
    if len(lengths) > 1:
        raise ValueError(f"scores of {sorted(lengths)} positions cannot be compared: measure all on the same tokens")
    draws = Draws(lengths.pop(), 0) if lengths else None
    sizes = {(one["key"], one["scheme"]): one["text_bytes"] for one in measured}
    table = []
    for one in measured:
        found = scores.get((one["key"], one["scheme"]))
        if found is None or draws is None:
            table.append(Row(measured=one))
            continue
        base = scores.get((baseline, one["scheme"]))
        usual = scores.get((USUAL, one["scheme"])) if one["key"].startswith(f"{USUAL}-") else None
        rivals = [
            key for key in scores if key[0] == measure and sizes[key] <= NOT_LARGER * one["text_bytes"]
        ]  # fmt: skip
        rival = max(rivals, key=lambda key: sizes[key], default=None)
        table.append(
            Row(
                measured=one,
                kl=_mean(draws, found["kl"]),
                median=float(np.median(found["kl"])),
                kl_experts=_mean(draws, found["kl_experts"]) if "kl_experts" in found else None,
                perplexity=_perplexity(draws, found["nll_converted"] - found["nll_original"]),
                recovered=None if base is None or one["key"] == baseline else _recovered(draws, found, base),
                to_ours=None if one["ours"] or rival is None else _ratio(draws, found["kl"], scores[rival]["kl"]),
                to_usual=None if usual is None else _ratio(draws, found["kl"], usual["kl"]),
            )
        )
    return table


def _mean(draws: Draws, values: Floats) -> Interval:
    return Interval.of(float(values.mean()), draws.means(values))


def _perplexity(draws: Draws, values: Floats) -> Interval:
    return Interval.of(float(np.exp(values.mean())), np.exp(draws.means(values)))


def _ratio(draws: Draws, ours: Floats, theirs: Floats) -> Interval:
    return Interval.of(float(ours.mean() / theirs.mean()), draws.means(ours) / draws.means(theirs))


def _recovered(draws: Draws, found: Mapping[str, Floats], base: Mapping[str, Floats]) -> Interval:
    left = _ratio(draws, found["kl"], base["kl"])
    return Interval(value=1 - left.value, low=1 - left.high, high=1 - left.low)


_HEAD = (
    "", "bits a weight of experts", "text decoder MB", "all MB", "KL, 1e-3 nats", "median KL, 1e-6", "perplexity ratio",
    "of rtn's KL recovered", "KL over qconvert gptq's", "over the default folds'", "CPU s",
    "peak RSS",
)  # fmt: skip


def markdown(table: Iterable[Row]) -> str:
    """One Markdown table a scheme, then a sentence for what did not run and for tensors that were changed besides."""
    by_scheme: dict[str, list[Row]] = {}
    for row in table:
        by_scheme.setdefault(row.measured["scheme"], []).append(row)
    parts = []
    for scheme, group in by_scheme.items():
        ran = [row for row in group if row.kl is not None]
        lines = [f"### {scheme}", ""]
        if ran:
            lines += [_line(_HEAD), _line(["---", *["---:"] * (len(_HEAD) - 1)]), *(_line(_cells(row)) for row in ran)]
        notes = [note for row in group if (note := _note(row))]
        parts.append("\n".join([*lines, *(["", *notes] if notes else [])]))
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    one = row.measured
    return [
        one["title"],
        f"{one['expert_bits']:.3f}",
        f"{one['text_bytes'] / 1e6:.2f}",
        f"{one['bytes'] / 1e6:.2f}",
        _said(row.kl, 1e3, ".3f"),
        "" if row.median is None else f"{1e6 * row.median:.2f}",
        _said(row.perplexity, 1, ".5f"),
        _said(row.recovered, 100, ".0f", "%"),
        _said(row.to_ours, 1, ".2f"),
        _said(row.to_usual, 1, ".3f"),
        f"{one['cpu']:.0f}",
        f"{one['peak_rss'] / 1e6:.0f} MB",
    ]


def _said(number: Interval | None, factor: float, how: str, unit: str = "") -> str:
    if number is None:
        return ""
    value, low, high = (f"{factor * each:{how}}" for each in (number.value, number.low, number.high))
    return f"{value}{unit} [{low}, {high}]"


def _note(row: Row) -> str:
    one = row.measured
    if row.kl is None:
        return f"- {one['title']} does not run: {one['failure']}"
    if not one["changed"]:
        return ""
    said = f"- {one['title']} changes {one['changed']} other tensors of the text decoder"
    if row.kl_experts is None:
        return f"{said}; routed experts quantized: {one['experts']}"
    return f"{said}; its experts alone: KL {_said(row.kl_experts, 1e3, '.3f')} 1e-3 nats"
