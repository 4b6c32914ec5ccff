"""One sentence says why, and it speaks of what matters most."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qconvert.core.metric import Metric, Verdict, exact
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.parity.because import because, decisive, interval
from qconvert.parity.causes import CauseKind, Severity, cause

ROLE = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=17, expert=203)
SWAP = cause(CauseKind.SWAPPED, ROLE, "cosine 0.9998 with gate and up swapped")


def metric(name: str, value: float, limit: float | None = None, spread: float = 0.0, unit: str = "nats") -> Metric:
    better = "high" if name in ("top1_agreement", "sqnr_min") else "low"
    return Metric(
        name=name, where="as served", value=value, low=value - spread, high=value + spread, unit=unit, limit=limit,
        better=better,
    )  # fmt: skip


def test_nothing_judges() -> None:
    assert because([], [metric("kl_mean", 0.1)]) == "No fault was found, and no limit judges the numbers."


def test_a_fault_goes_before_numbers_and_others_are_counted() -> None:
    warning = cause(CauseKind.CHANGED, ROLE, "moved", severity=Severity.WARNING)
    failing = metric("kl_mean", 0.3, 0.1)
    said = because([SWAP, SWAP, SWAP, warning], [failing])
    assert said == (
        "Gate up swapped: layer 17 expert 203 up: cosine 0.9998 with gate and up swapped (and 2 more faults)."
    )
    assert because([warning], [failing]).startswith("kl_mean of as served is 0.3 nats, beyond")


def test_the_limit_that_is_exceeded_furthest() -> None:
    agreement = metric("top1_agreement", 0.94, 0.95, unit="fraction")  # 0.06 of 0.05 allowed
    divergence = metric("kl_mean", 0.3, 0.1, 0.01)
    assert because([], [agreement, divergence]) == (
        "kl_mean of as served is 0.3 nats [0.29, 0.31], beyond the limit of at most 0.1 (and 1 more exceeded limit)."
    )


def test_an_undecided_limit_asks_for_more_tokens() -> None:
    said = because([], [metric("kl_mean", 0.1, 0.11, 0.02), metric("kl_p99", 0.1, 9.0)])
    assert said == (
        "kl_mean of as served is 0.1 nats [0.08, 0.12], and the limit of at most 0.11 lies inside the interval: "
        "more tokens decide."
    )


def test_a_pass_tells_the_nearest_limit_by_what_is_used_of_it() -> None:
    ratio = metric("perplexity_ratio", 1.001, 1.1, unit="")  # a hundredth of what it allows
    assert because([], [ratio, metric("kl_mean", 0.05, 0.1), metric("sqnr_min", 60.0, 20.0, unit="dB")]) == (
        "No fault was found and all 3 limits hold; nearest to its limit, at most 0.1, kl_mean of as served is "
        "0.05 nats."
    )


def test_a_nan_is_told_without_a_limit_too() -> None:
    found = [exact("perplexity_original", "as served", math.nan), metric("kl_mean", 0.1, 9.0)]
    assert found[0].verdict is Verdict.FAIL
    assert because([], found) == "perplexity_original of as served is not a number."


def test_a_nan_is_the_worst() -> None:
    assert "kl_p99 of as served is nan" in because([], [metric("kl_mean", 9.0, 0.1), metric("kl_p99", math.nan, 9.0)])


def test_the_layer_is_told() -> None:
    overlaps = [exact("router_overlap", "as served", value, "fraction", layer=i) for i, value in enumerate((0.9, 0.2))]
    limited = [
        Metric(
            name=one.name, where=one.where, value=one.value, low=one.low, high=one.high, unit=one.unit, limit=0.8,
            better="high", layer=one.layer,
        )
        for one in overlaps
    ]  # fmt: skip
    assert because([], limited) == ("router_overlap of as served, layer 1 is 20%, beyond the limit of at least 80%.")
    assert decisive(limited) == (limited[1],)
    kept = [metric("kl_mean", 0.1, 1.0), metric("kl_mean", 0.1, 1.0)]
    assert decisive([*kept, *limited]) == (*kept, limited[1])
    passing = [replace(one, limit=0.1) for one in limited]
    assert because([], passing) == (
        "No fault was found and the limit holds; nearest to its limit, at least 10%, router_overlap of as served, "
        "layer 1 is 20%."
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [(1.0, "100%"), (0.999996, "99.9996%"), (0.98992, "98.99%"), (0.0, "0%"), (0.0000123, "0.00123%"), (2.5, "250%")],
)
def test_shares_are_told_per_cent_and_nearly_all_is_not_all(value: float, told: str) -> None:
    assert interval(exact("top1_agreement", "as served", value, "fraction")) == told
    both = Metric(name="top1_agreement", where="m", value=value, low=0.0, high=9.0, unit="fraction")
    assert interval(both) == f"{told} [0%, 900%]"


def test_counts_are_told_without_a_unit() -> None:
    assert interval(exact("dead_scales", "text.expert.up", 3.0, "count")) == "3"
